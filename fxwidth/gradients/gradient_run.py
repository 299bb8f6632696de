"""A run of a graph with gradients, in which each op is found on the analysis tape."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fxwidth.analysis.result import Analysis
from fxwidth.errors import FxwidthError
from fxwidth.option_keywords import Loss
from fxwidth.recording import whole_op_gradients  # noqa: F401  (whole ops have gradients by it)
from fxwidth.recording.readonly_runs import copies, looking_on
from fxwidth.recording.tape import OpCall, TapeRecorder
from fxwidth.rules.registry import keeps
from fxwidth.runtime.tensor_slots import substituted
from fxwidth.statistics.observers import Observer, Walker

# One value per placeholder, and what the loss compares with.
Batch = tuple[list[Any], tuple[Any, ...]]


class GradientRun(Observer):
    """What a run has left: the arguments of some ops, and their places in the graph of gradients.

    Attributes:
        calls: those ops as they ran, by their index on the tape.
        leaves: what stood for the parameters.
        samples: how many inputs were seen.
    """

    def __init__(self, analysis: Analysis, wanted: Collection[int], slopes: Collection[int]) -> None:
        super().__init__(analysis, ())
        self.calls: dict[int, OpCall] = {}
        self.leaves: dict[str, Tensor] = {}
        self._wanted, self._slopes = wanted, slopes
        self._nodes: dict[int, Node] = {}
        self._edges: dict[tuple[int, str], GradientEdge] = {}
        self._pending: tuple[int, Tensor] | None = None

    def see(self, call: OpCall) -> None:
        """Take in one op that has just run."""
        self._settle()
        # What autograd keeps for itself.
        if call.name == "detach" and (self.expected is None or self.expected.name != "detach"):
            return
        expected = self.matched(call)
        if expected is None:
            return
        if expected.index in self._wanted:
            self.calls[expected.index] = call
            for name, value in call.arguments.items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    self._edges[expected.index, name] = GradientEdge(value.grad_fn, value.output_nr)
        if (expected.index in self._wanted or expected.index in self._slopes) and call.outputs:
            self._pending = expected.index, call.outputs[0]

    def end(self) -> None:
        """Take in the end of a node."""
        self._settle()
        super().end()

    def _settle(self) -> None:
        """Note the place of a result; it has one only after its op, and another after the next one in place."""
        if self._pending is not None:
            index, output = self._pending
            if output.grad_fn is not None:
                self._nodes[index] = output.grad_fn
            self._pending = None

    def edge(self, index: int, argument: str) -> GradientEdge | None:
        """Return the place of an argument in the graph of gradients; None where none come to it."""
        return self._edges.get((index, argument))

    def gradients(self, loss: Tensor, indices: Sequence[int]) -> dict[int, Tensor]:
        """Return the gradients of a loss by the results of ops; zero where it does not depend on them."""
        asked = [index for index in indices if index in self._nodes]
        edges = [GradientEdge(self._nodes[index], 0) for index in asked]
        found = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True) if edges else ()
        known = dict(zip(asked, found, strict=True))
        return {
            index: grad if (grad := known.get(index)) is not None else torch.zeros_like(self.calls[index].outputs[0])
            for index in indices
        }

    @contextmanager
    def within_group(self, readers: Collection[int]) -> Iterator[None]:
        """Have gradients stop at some ops, and pass nonlinear functions of each number as if their slope were one."""
        with ExitStack() as hooks:
            for index in readers:
                if index in self._nodes:
                    hooks.callback(self._nodes[index].register_prehook(_stopped).remove)
            for index in self._slopes:
                if index in self._nodes:
                    hooks.callback(self._nodes[index].register_hook(_as_they_came).remove)
            yield


def _stopped(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if one is None else torch.zeros_like(one) for one in gradients)


def _as_they_came(made: Sequence[Tensor | None], came: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(came[0] if one is not None and one.shape == came[0].shape else one for one in made)


@contextmanager
def run_with_gradients(
    analysis: Analysis, batch: Batch, loss: Loss, wanted: Collection[int], slopes: Collection[int]
) -> Iterator[tuple[GradientRun, Tensor]]:
    """Run a graph on a batch in eval mode, and leave it as it was; what is left of the run, and the loss, are yielded.

    Raises:
        FxwidthError: the graph does not run on it, or the loss does not return one finite number.
    """
    module, (values, targets) = analysis.module, batch
    run = GradientRun(analysis, wanted, slopes)
    run.samples = analysis.samples_in(values)
    run.leaves = {
        name: entry.tensor.detach().requires_grad_()
        for name, entry in analysis.parameters.items()
        if isinstance(entry.tensor, torch.nn.Parameter) and entry.tensor.is_floating_point()
    }
    run.stand_for(run.leaves)
    recorder = TapeRecorder(keeps, run.see)
    walker = Walker(module, run, recorder)
    with looking_on(module), substituted(module, run.leaves), torch.enable_grad():
        own = copies(values)
        try:
            with recorder:
                output = walker.run(*own, enable_io_processing=False)
        except Exception as error:
            raise FxwidthError(f"a batch of data fails at node {run.node!r}: {error}.") from error
        yield run, loss_of(loss, module.graph.process_outputs(output), targets)


def loss_of(loss: Loss, output: Any, targets: Sequence[Any]) -> Tensor:
    """Return the loss of a batch.

    Raises:
        FxwidthError: there are no targets, it fails, or it does not return one finite number.
    """
    told = "It is called with the model's output and what follows the inputs in a batch of data"
    try:
        result = loss(output, *targets)
    except Exception as error:
        raise FxwidthError(
            f"loss={getattr(loss, '__name__', loss)!r} fails: {type(error).__name__}: {error}. {told}, here "
            f"{len(targets)} values{'' if targets else '; pass batches that hold the targets too, as tuples (x, y)'}."
        ) from error
    if not isinstance(result, Tensor) or result.numel() != 1 or not bool(result.detach().isfinite()):
        found = result if not isinstance(result, Tensor) else _told(result)
        raise FxwidthError(f"loss= returned {found}; it must return one finite number, the mean over a batch. {told}.")
    return result.reshape(())


def _told(result: Tensor) -> str:
    return str(result.item()) if result.numel() == 1 else f"a tensor of shape {list(result.shape)}"
