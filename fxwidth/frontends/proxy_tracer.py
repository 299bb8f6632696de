"""The tracer that runs a model on proxies: what stays an input, what is a part of its own, and what ends the trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import compress
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxwidth.frontends.call_signature import (
    INPUTS_MODULE,
    OUTPUTS_MODULE,
    UNKNOWN,
    Argument,
    Inputs,
    Outputs,
    Passing,
    has_own_call,
    invoke,
    native,
)
from fxwidth.frontends.forgotten_state import refuse_stores_outside
from fxwidth.frontends.in_place import written_attribute
from fxwidth.frontends.random_draws import refuse_draws
from fxwidth.frontends.tracer_proxies import BufferProxy, TracerProxy
from fxwidth.frontends.watched_tensors import TensorWatch
from fxwidth.runtime.module_state import Held
from fxwidth.runtime.pytrees import Constant, Leaf, flatten, flatten_each, rebuild_each
from fxwidth.runtime.random_states import Generators
from fxwidth.runtime.trace_guards import (
    Belongings,
    UntraceableError,
    refuse_context,
    refuse_iterators,
)
from fxwidth.runtime.unseen_effects import refuse_effects_of, refuse_generator
from fxwidth.work_progress import go_on

_PACKED = "fxwidth_packed"


class ProxyTracer(fx.Tracer):
    """Runs a model on proxies, and ends where the graph would not do what the model does.

    Args:
        arguments: those of the model, with examples or defaults.
        live_numbers: whether numbers stay inputs.
        leaves: submodules that are called as they are.
        failed: takes the innermost submodule in which tracing ends, if it does.
        belongings: what the model is made of.
        held: its tensors and attributes, as they were.
        modes: takes the mode of each submodule when it is called as it is.
    """

    def __init__(
        self,
        arguments: Sequence[Argument],
        live_numbers: bool,
        leaves: Collection[nn.Module],
        failed: list[nn.Module],
        belongings: Belongings,
        held: Held,
        modes: dict[nn.Module, bool],
    ) -> None:
        super().__init__()
        self.watch = TensorWatch(held.tensors)
        self._held = held
        self.generators = held.generators
        self._modes = modes
        self._failed = failed
        self.helpers: dict[str, nn.Module] = {}
        self._arguments = arguments
        self._live_numbers = live_numbers
        self._leaves = {id(leaf) for leaf in leaves}
        self._belongings = belongings
        self.autocasts: list[Any] = []
        self._buffers: dict[int, str] = {}
        self._without_gradients: set[fx.Node] = set()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module."""
        self._buffers = {id(buffer): name for name, buffer in root.named_buffers()}
        graph = super().trace(root, concrete_args)
        for node in graph.find_nodes(op="get_attr"):
            # Of a buffer that code only asks for its shape, or whether it is there.
            if not node.users and node in self._without_gradients:
                graph.erase_node(node)
        return graph

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        """Add a node to the graph."""
        operands: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), operands.append)
        is_constant = kind == "get_attr" and target in self._buffers.values()
        is_constant |= kind.startswith("call_") and bool(operands) and self._without_gradients.issuperset(operands)
        refuse_context(self.autocasts, not is_constant)
        refuse_effects_of(kind, target, args)
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        if (written_attribute(node) or "").startswith("_tensor_constant"):
            raise UntraceableError(f"{target} writes to a tensor that was made while tracing, and not at every call")
        if is_constant:
            self._without_gradients.add(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for the value of a node."""
        return TracerProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return what stands for an attribute of a module."""
        name = self._buffers.get(id(attr_val))
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            factory = partial(BufferProxy, tracer=self, buffer=attr_val)
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=factory)
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Return what stands for a value among the arguments of a node."""
        self.watch.refuse_computed(a)
        refuse_generator(a)
        if isinstance(a, tuple) and isinstance(a, PackedSequence):
            # Its constructor looks at what it is given, which proxies cannot tell.
            leaves, structure = flatten(a)
            packs = sum(name.startswith(_PACKED) for name in self.helpers)
            return self._helper(f"{_PACKED}_{packs}", Outputs(structure), leaves).node
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is called as it is."""
        return id(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a submodule, or call it as it is."""
        go_on()
        is_leaf = self.is_leaf_module(m, "")
        if is_leaf:
            self._note_modes(m)
        try:
            if is_leaf:
                self._belongings.refuse_others(m)
                return super().call_module(m, forward, args, kwargs)
            generators = Generators(self.generators)
            result = super().call_module(m, forward, args, kwargs)
            refuse_draws(generators)
            refuse_stores_outside(self._held)
            return result
        except Exception:
            if not self._failed and id(m) not in self._leaves:
                self._failed.append(m)
            raise

    def _note_modes(self, module: nn.Module) -> None:
        """Note in which modes a module and its parts are called, which must be one for all calls."""
        for part in module.modules():
            if self._modes.setdefault(part, part.training) != part.training:
                raise UntraceableError(f"a {type(part).__name__} is called in both modes, which a graph forgets")

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],  # noqa: ARG002 - fx's arguments
        is_module: bool,  # noqa: ARG002
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return the function to trace and what to call it with: the model on proxies for its arguments."""
        proxies = [
            self.create_proxy("placeholder", argument.name, argument.default, {}) for argument in self._arguments
        ]
        values: list[Any] = list(proxies)
        checked = [i for i, argument in enumerate(self._arguments) if self._is_checked(i, argument)]
        if checked:
            opened = self._opened([self._arguments[i] for i in checked], [proxies[i] for i in checked])
            for i, value in zip(checked, opened, strict=True):
                values[i] = value

        def run(root: nn.Module) -> Any:
            # As a call of the model does: it may have hooks, and a forward of its own put over that of its class.
            called = root if has_own_call(root) else root._call_impl
            return self._answer(invoke(called, self._arguments, values))

        return run, [self.root]

    def _opened(self, arguments: Sequence[Argument], proxies: Sequence[fx.Proxy]) -> list[Any]:
        """Return what the model is given for arguments that are checked at a call: proxies, or what holds them."""
        tensors, structures = flatten_each(argument.value for argument in arguments)
        names, live = [argument.name for argument in arguments], [self._is_live(argument) for argument in arguments]
        is_number = [one and isinstance(part, Constant) for one, part in zip(live, structures, strict=True)]
        helper = Inputs(names, structures, numbers=list(compress(names, is_number)))
        result: Any = self._helper(INPUTS_MODULE, helper, proxies)
        direct = {structure.position for structure in structures if isinstance(structure, Leaf)}
        leaves = [None if i in direct else result[i] for i in range(len(tensors))]
        # The model may write to what it is given, such as an empty cache.
        opened = rebuild_each(copy.deepcopy(structures), leaves)
        return [proxy if one else value for proxy, value, one in zip(proxies, opened, live, strict=True)]

    def _is_checked(self, place: int, argument: Argument) -> bool:
        """Tell whether what a call gives is looked at: the model may have looked whether it is None."""
        is_optional = bool(argument.default) or place > 0
        return not self._is_live(argument) or (is_optional and argument.value is not UNKNOWN)

    def _is_live(self, argument: Argument) -> bool:
        value = argument.value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_given = argument.passing is not Passing.LEFT_OUT
        return value is UNKNOWN or isinstance(value, Tensor) or (number and is_given and self._live_numbers)

    def _answer(self, result: Any) -> Any:
        refuse_iterators(result)
        leaves, structure = flatten(result)
        plain, value = native(structure, leaves)
        return value if plain else self._helper(OUTPUTS_MODULE, Outputs(structure), leaves)

    def _helper(self, name: str, helper: nn.Module, proxies: Sequence[fx.Proxy]) -> fx.Proxy:
        self.helpers[name] = helper
        result: fx.Proxy = self.create_proxy("call_module", name, tuple(proxies), {})
        return result
