"""Reading a graph from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxwidth.checkpoint.exported import load_exported
from fxwidth.checkpoint.extra_state import put_extra_state
from fxwidth.checkpoint.file_record import read
from fxwidth.checkpoint.other_forms import EXPORTED, TENSORS
from fxwidth.checkpoint.pickled import load_pickled, refuse_plain
from fxwidth.checkpoint.replay import Replay, state_tensor
from fxwidth.checkpoint.training_state import Evolving, check_training, further_of, put_state, refuse_missing
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import call_of, takes_other_sizes
from fxwidth.rewriting.optimizers import Optimizers
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.atomic_files import path_of, unreadable
from fxwidth.runtime.contexts import plain_surroundings
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.serialization.tensor_files import TensorFile, damaged, open_tensors
from fxwidth.tracing.trace import trace

Factory = Callable[[], nn.Module]


@plain_surroundings()
def load(
    path: str | Path,
    model: nn.Module | Factory | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer: Optimizers | None = None,
    evolver: Evolving | None = None,
    trusted: bool = False,
    convert: bool = False,
) -> fx.GraphModule:
    """Read a graph written by `save`.

    A ".safetensors" file is checked as a whole, by its digest, and its header against the model, before anything
    changes; on any error, Ctrl-C included, the model, the optimizer and the Evolver are as they were, to the bit. No
    code of a file is run, but for a pickle's.

    Args:
        path: the file.
        model: for ".safetensors", a fresh model of the original architecture, or a function that makes one; it is
            resized if it can be, as by `fxwidth.resize`. It may be on the meta device, and takes its values from the
            file then. What a function makes also takes the dtypes of the file, the order of dims in memory, and
            evaluation, if the graph was in `eval()`; a model that is given stays in its mode. A graph from `trace` is
            taken as it is; if it has been resized, the file must tell of the same resizes, and others may follow.
        example_inputs: for the tracing of `model`, as for `fxwidth.trace`.
        example_kwargs: likewise.
        optimizer: takes the state that was saved with the graph: one of the same class for the same parameters, those
            of `model`.
        evolver: likewise the `fxwidth.Evolver`, of the graph that is given as `model`.
        trusted: whether the file is from someone whom you trust: for Python's pickle, which can run any code, for
            whole numbers in the graph that differ from the model's, for sizes far beyond those of the file, and for
            ops of a ".pt2" file that do not check what they are given, such as `nn.LSTM` and `nn.EmbeddingBag`.
        convert: whether values of another floating dtype are rounded to that of the model; by default they are refused.

    Raises:
        FxwidthError: the file is missing, damaged, not one of ours, or does not fit the model; or it is Python's pickle
            and not trusted.

    Example:
        >>> import copy, tempfile, pathlib
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(copy.deepcopy(net), torch.randn(2, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "narrow.safetensors"
        ...     fxwidth.save(fxwidth.resize(gm, {"0": 10}), path)
        ...     again = fxwidth.load(path, net, torch.randn(2, 8))
        >>> torch.equal(again.get_parameter("0.weight"), gm.get_parameter("0.weight"))
        True
    """
    path = path_of(path)
    try:
        is_file = path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_file:
        raise FxwidthError(f"there is no file {path}; pass the path that fxwidth.save was given.")
    form = path.suffix.lower()
    if form == TENSORS:
        with open_tensors(path) as file:
            try:
                return _load_tensors(
                    file, model, (example_inputs, example_kwargs), optimizer, evolver, trusted=trusted, convert=convert
                )
            except FxwidthError:
                raise
            except Exception as error:
                raise FxwidthError(
                    f"{path} cannot be loaded ({type(error).__name__}: {error}); nothing has changed. Use another copy "
                    "of the file, and the model that was saved."
                ) from error
    if model is not None or optimizer is not None or evolver is not None:
        if form != EXPORTED:
            refuse_plain(path)
        raise FxwidthError(
            f"{path} holds the whole graph; leave out model=, optimizer= and evolver=, which go with a path that ends "
            f"in {TENSORS!r}."
        )
    return load_exported(path, trusted=trusted) if form == EXPORTED else load_pickled(path, trusted=trusted)


def further_in(path: Path) -> Any:
    """Return what else `save_tensors` has written beside a graph, or None; checked as a whole, and no code is run.

    Raises:
        FxwidthError: the file is damaged, or not one of ours.
    """
    with open_tensors(path) as file:
        try:
            return further_of(read(file).state, lambda name: state_tensor(file, name))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise damaged(path, f"its record says {error!r}") from error


def _load_tensors(
    file: TensorFile,
    model: nn.Module | Factory | None,
    example: tuple[Any, Mapping[str, Any] | None],
    optimizer: Optimizers | None,
    evolver: Evolving | None,
    *,
    trusted: bool,
    convert: bool,
) -> fx.GraphModule:
    record = read(file)
    if model is None:
        raise FxwidthError(
            f"{file.path} holds tensors only; pass model=, a fresh model of the original architecture, or a function "
            "that makes one."
        )
    refuse_missing(record.state, file.path, optimizer, evolver)
    is_fresh = not isinstance(model, nn.Module)
    made = _made(model)
    if is_fresh and (optimizer is not None or evolver is not None):
        raise FxwidthError(
            "optimizer= and evolver= are for parameters that are there already; pass a model, or load the graph first, "
            "make them for it, and load the same file into that graph: load(path, gm, optimizer=..., evolver=...)."
        )
    if isinstance(made, fx.GraphModule):
        module = made
        if example != (None, None):
            Transaction(made).run(lambda: trace(made, *example))
    else:
        call = call_of(*example)
        module = trace(made, call and replace(call, is_of_one_size=not record.takes_other_sizes))
    if optimizer is not None and any(tensor.is_meta for tensor, _ in tensor_slots(module).values()):
        raise FxwidthError(
            "optimizer= trains parameters on the meta device, which have no values; load the graph first."
        )
    check_training(module, optimizer, evolver)
    whole = resize_transaction(module, optimizer=optimizer, objects=() if evolver is None else (evolver,))
    replay = Replay(file, record, module, whole, optimizer, trusted, is_fresh, convert)

    def work() -> None:
        replay.run()
        put_extra_state(module, record.state, lambda name: state_tensor(file, name))
        put_state(module, record.state, optimizer, evolver, lambda name: state_tensor(file, name))

    try:
        whole.run(work)
    except FxwidthError as error:
        if not isinstance(made, fx.GraphModule) or record.takes_other_sizes or not takes_other_sizes(made):
            raise
        raise FxwidthError(
            f"{error} The graph in the file takes inputs of one size, as those of earlier versions do, and the graph "
            "that was passed takes others: pass the model itself in its place, and example_inputs=."
        ) from error
    if is_fresh and record.evaluates:
        module.eval()
    return module


def _made(model: nn.Module | Factory) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    made = model() if callable(model) else model
    if not isinstance(made, nn.Module):
        raise FxwidthError(
            f"model= takes an nn.Module or a function that makes one, but received {type(made).__name__}."
        )
    return made
