"""How a model is called: its arguments by name, and the modules by which a graph takes them apart and answers alike."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils.data import DataLoader, Dataset

from fxwidth.errors import FxwidthError
from fxwidth.frontends.labels import labels_told
from fxwidth.runtime.pytree_differences import difference
from fxwidth.runtime.pytrees import Constant, Container, Leaf, Structure, flatten_each, rebuild

UNKNOWN = inspect.Parameter.empty
INPUTS_MODULE, OUTPUTS_MODULE = "fxwidth_inputs", "fxwidth_outputs"
# Stands for the default of an argument without one, behind others that have one; no check lets it pass.
NOT_GIVEN = ...
PLAIN = (type(None), bool, int, float, str)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
CALL_FORMS = "pass a tensor, a tuple of positional inputs, or a dict of inputs by name"


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model.

    Attributes:
        args: those by position.
        kwargs: those by name.
        is_of_one_size: whether an export for it keeps all its sizes but the batch.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_of_one_size: bool = False

    @property
    def value(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as one nested value."""
        return self.args, dict(self.kwargs)


def call_of(example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Call | None:
    """Return the call that examples stand for: a tuple holds positional arguments, a dict holds arguments by name.

    Raises:
        FxwidthError: there are two sets of arguments by name, or their names are not strings.
    """
    if isinstance(example_inputs, Call) or (example_inputs is None and example_kwargs is None):
        return example_inputs
    _refuse_kinds(example_inputs)
    _refuse_kinds(example_kwargs)
    if isinstance(example_inputs, Mapping):
        if example_kwargs is not None:
            raise FxwidthError(
                "example_inputs is a dict, which means arguments by name, and so does example_kwargs; pass one of "
                "them, or wrap a dict that is itself an argument into a tuple: example_inputs=(inputs,)."
            )
        example_inputs, example_kwargs = (), example_inputs
    if example_inputs is None:
        example_inputs = ()
    names = dict(example_kwargs or {})
    if not all(isinstance(name, str) for name in names):
        raise FxwidthError(
            f"the names of arguments are strings, but received {sorted(map(str, names))}; wrap a dict that is itself "
            "an argument into a tuple: example_inputs=(inputs,)."
        )
    return Call(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), names)


def _refuse_kinds(given: Any) -> None:
    """Check that no argument is of a kind that stands for tensors, and is none.

    Raises:
        FxwidthError: one is.
    """
    inner = given.values() if isinstance(given, Mapping) else given if isinstance(given, (tuple, list)) else ()
    for value in (given, *inner):
        if isinstance(value, np.ndarray):
            remedy = "pass torch.from_numpy(array)"
        elif isinstance(value, (DataLoader, Dataset)):
            remedy = "pass the inputs of one batch, as in batch = next(iter(loader))"
        elif isinstance(value, (nn.Module, type)):
            remedy = CALL_FORMS
        else:
            continue
        raise FxwidthError(f"example_inputs holds a {type(value).__name__}, where the model takes tensors; {remedy}.")


class Passing(Enum):
    """How a call passes an argument."""

    BY_POSITION = "by position"
    BY_NAME = "by name"
    LEFT_OUT = "left out"


@dataclass(frozen=True)
class Argument:
    """An argument of a model: its example or else its default, `UNKNOWN` where there is neither.

    Attributes:
        name: that of the placeholder.
        passing: how the example call passes it.
        value: its example or default.
        default: that of the placeholder, if it has one.
        kind: how the graph takes it, one of the kinds of `inspect.Parameter`.
    """

    name: str
    passing: Passing
    value: Any
    default: tuple[Any, ...]
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD


def has_own_call(model: nn.Module) -> bool:
    """Tell whether a call of a model does not start in torch, but in a `__call__` of its class."""
    kind = type(model)
    own = next(base for base in kind.__mro__ if "__call__" in vars(base))
    return own is not nn.Module and not own.__module__.startswith("torch.")


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return what a model takes when it is called: what its forward takes, or a `__call__` of its own."""
    if has_own_call(model):
        signature = inspect.signature(type(model).__call__)
        parameters = list(signature.parameters.values())[1:]
        # One that takes anything passes it on.
        if any(parameter.kind not in _VARIABLE for parameter in parameters):
            return signature.replace(parameters=parameters)
    return inspect.signature(model.forward)


def arguments_of(model: nn.Module, call: Call | None) -> list[Argument]:
    """Return the arguments that a model takes, those of a call bound to them.

    Raises:
        FxwidthError: the model does not take this call.
    """
    signature = signature_of(model)
    positional: dict[str, Any] = {}
    bound: dict[str, Any] = {}
    if call is not None:
        try:
            bound = signature.bind(*call.args, **call.kwargs).arguments
            positional = signature.bind_partial(*call.args).arguments
        except TypeError as error:
            taken = [one.name for one in signature.parameters.values() if one.kind in _POSITIONAL]
            name = f"{type(model).__name__}.forward"
            if not call.kwargs and (told := labels_told(name, taken, call.args)) is not None:
                raise FxwidthError(told) from error
            raise FxwidthError(
                f"the model takes {len(signature.parameters)} inputs ({', '.join(signature.parameters)}), but "
                f"example_inputs has {_given(call)}: {error}; {CALL_FORMS}."
                f"{_of_shape(call.args)}{_of_dict(signature, call)}"
            ) from error
    result: list[Argument] = []
    for parameter in _taken_by_graph(signature, bound):
        name, plain = parameter.name, isinstance(parameter.default, PLAIN)
        behind_default = parameter.kind != inspect.Parameter.KEYWORD_ONLY and any(other.default for other in result)
        default = (parameter.default,) if plain else (NOT_GIVEN,) if behind_default else ()
        take = partial(Argument, default=default, kind=parameter.kind)
        if parameter.kind == inspect.Parameter.VAR_POSITIONAL:
            take = partial(take, kind=inspect.Parameter.POSITIONAL_ONLY)
            many = enumerate(bound.get(name, ()))
            result += [take(f"{name}_{i}", Passing.BY_POSITION, value) for i, value in many]
        elif parameter.kind == inspect.Parameter.VAR_KEYWORD:
            take = partial(Argument, default=(), kind=inspect.Parameter.KEYWORD_ONLY)
            result += [take(key, Passing.BY_NAME, value) for key, value in bound.get(name, {}).items()]
        elif name in bound:
            result.append(take(name, Passing.BY_POSITION if name in positional else Passing.BY_NAME, bound[name]))
        elif parameter.default is UNKNOWN:
            by_name = parameter.kind == inspect.Parameter.KEYWORD_ONLY
            result.append(take(name, Passing.BY_NAME if by_name else Passing.BY_POSITION, UNKNOWN))
        else:
            result.append(take(name, Passing.LEFT_OUT, parameter.default))
    return result


def _given(call: Call) -> str:
    """Return how many arguments a call has, with the names of those that have one."""
    names = ", ".join(call.kwargs)
    return f"{len(call.args) + len(call.kwargs)}{f' ({names})' if names else ''}"


def _of_shape(given: Sequence[Any]) -> str:
    """Return what helps where a shape was given in the place of a tensor."""
    if not given or not all(type(value) is int for value in given):
        return ""
    return f" These are whole numbers: for an input of that shape, pass torch.randn{tuple(given)}."


def _of_dict(signature: inspect.Signature, call: Call) -> str:
    """Return what helps where a dict that may be one input was given as one of inputs by name."""
    needed = [one.name for one in signature.parameters.values() if one.default is UNKNOWN and one.kind in _POSITIONAL]
    if call.args or len(needed) != 1 or signature.parameters.keys() & call.kwargs.keys():
        return ""
    shown = ", ".join(f"{name!r}: ..." for name in call.kwargs)
    return f" Where the dict is itself the one input, {needed[0]!r}, wrap it: ({{{shown}}},)."


def _taken_by_graph(signature: inspect.Signature, bound: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    """Yield the parameters that a graph takes, each as the graph takes it.

    One whose default no graph can hold is not taken unless it is given: what would be passed by position behind it is
    taken by name.
    """
    by_name = False
    for parameter in signature.parameters.values():
        is_variable = parameter.kind in _VARIABLE
        holds = is_variable or parameter.default is UNKNOWN or isinstance(parameter.default, PLAIN)
        if parameter.name in bound or holds:
            kind = inspect.Parameter.KEYWORD_ONLY if by_name and not is_variable else parameter.kind
            yield parameter.replace(kind=kind)
        else:
            by_name = True


def invoke(function: Callable[..., Any], arguments: Sequence[Argument], values: Sequence[Any]) -> Any:
    """Call a function with values for its arguments, as the example call did."""
    pairs = list(zip(arguments, values, strict=True))
    by_position = [value for argument, value in pairs if argument.passing is Passing.BY_POSITION]
    by_name = {argument.name: value for argument, value in pairs if argument.passing is Passing.BY_NAME}
    return function(*by_position, **by_name)


class Inputs(nn.Module):
    """Checks the arguments of a call against those that a graph was traced with, and returns their tensors in order.

    Args:
        names: the names of the arguments.
        structures: those of the arguments.
        shapes: of each tensor, a size or None for each dim; None where nothing is known.
        guards: conditions on `leaves`, the tensors, in Python.
        numbers: the names of those that may be any number.
    """

    def __init__(
        self,
        names: Sequence[str],
        structures: Sequence[Structure],
        shapes: Sequence[Sequence[int | None] | None] = (),
        guards: Sequence[str] = (),
        numbers: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._is_impure = True  # a check is no dead code
        self.names = tuple(names)
        self.structures = copy.deepcopy(tuple(structures))  # the caller may go on to write to what it gave
        self.shapes = tuple(shapes)
        self.guards = tuple(guards)
        self.numbers = tuple(numbers)

    # Where training has others.
    guards_in_training: tuple[str, ...] | None = None
    # What earlier versions have saved has none.
    numbers: tuple[str, ...] = ()

    def forward(self, *values: Any) -> Any:
        """Return the tensors among the arguments, as a list.

        Raises:
            FxwidthError: the call differs from that of the trace by more than what tensors hold.
        """
        node = _in_a_trace(self, values)
        if node is not None:
            return node
        leaves, found = flatten_each(values)
        for name, own, other in zip(self.names, self.structures, found, strict=True):
            if isinstance(other, Constant) and other.value is NOT_GIVEN:
                raise FxwidthError(f"argument {name!r} is left out, but was given when the graph was traced.")
            text = None if name in self.numbers and _is_number(other) else difference(own, other, f"argument {name!r}")
            if text is not None:
                raise FxwidthError(
                    f"{text} as when the graph was traced. Trace the model with example_inputs like these."
                )
        others = self.guards_in_training if self.training else None
        self.refuse_sizes(leaves, self.guards if others is None else others)
        return leaves

    def refuse_sizes(self, leaves: Sequence[Tensor], guards: Sequence[str]) -> None:
        """Check the sizes of tensors.

        Args:
            leaves: the tensors among the arguments, in order.
            guards: the conditions that they are to fulfil.

        Raises:
            FxwidthError: the graph was traced for others.
        """
        for leaf, shape in zip(leaves, self.shapes, strict=False):
            sizes = list(leaf.shape)
            if shape is not None and (len(sizes) != len(shape) or any(map(_differs, sizes, shape))):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                raise FxwidthError(
                    f"a tensor of shape {tuple(sizes)} was given where the graph was traced with ({wanted}); "
                    "trace the model with example_inputs of that shape."
                )
        refuse_guarded(guards, leaves)


def takes_other_sizes(module: nn.Module) -> bool:
    """Tell whether a graph that was exported takes inputs of other sizes than the example's, beside the batch."""
    checks = getattr(module, INPUTS_MODULE, None)
    return isinstance(checks, Inputs) and any(None in shape[1:] for shape in checks.shapes if shape is not None)


def _is_number(structure: Structure) -> bool:
    # No tensor: the model's code may have asked which of the two it is.
    return isinstance(structure, Constant) and isinstance(structure.value, (int, float))


def refuse_guarded(guards: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that conditions on `leaves`, the tensors of a call, hold.

    Raises:
        FxwidthError: one does not.
    """
    for guard in guards:
        if not eval(guard, {**SYMPY_INTERP, "leaves": leaves}):
            raise FxwidthError(
                f"the graph holds only for inputs with {guard}, since the model branches on it. "
                "Trace the model with example_inputs like these."
            )


def _differs(size: int, wanted: int | None) -> bool:
    return wanted is not None and size != wanted


class Outputs(nn.Module):
    """Puts the tensors that a graph has computed into the object that the model returned."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, *leaves: Any) -> Any:
        """Return what the model returns."""
        node = _in_a_trace(self, leaves)
        return rebuild(self.structure, leaves) if node is None else node


def _in_a_trace(module: nn.Module, arguments: Sequence[Any]) -> fx.Proxy | None:
    """Return a call of a module as a node where some symbolic trace looks into it: what it does is no op."""
    tracer = next((one.tracer for one in arguments if isinstance(one, fx.Proxy)), None)
    if not isinstance(tracer, fx.Tracer):
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), tuple(arguments), {})


def native(structure: Structure, leaves: Sequence[Any]) -> tuple[bool, Any]:
    """Return whether an fx graph can return a structure without help, and what its output node must hold then."""
    if isinstance(structure, Leaf):
        return True, leaves[structure.position]
    if isinstance(structure, Constant):
        return isinstance(structure.value, PLAIN), structure.value
    if not isinstance(structure, Container) or structure.spec.type not in (tuple, list, dict):
        return False, None
    parts = [native(part, leaves) for part in structure.parts]
    if not all(plain for plain, _ in parts):
        return False, None
    values = [value for _, value in parts]
    if structure.spec.type is dict:
        return True, dict(zip(structure.spec.context, values, strict=True))
    return True, structure.spec.type(values)
