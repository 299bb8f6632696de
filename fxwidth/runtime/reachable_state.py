"""What the code of modules may write to outside of them: globals, closures, defaults, caches of functions.

Found by the names that the code mentions, from the methods and hooks of modules on: nothing is run.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections import UserDict, UserList
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn

from fxwidth.runtime.kept_objects import SIMPLE, Kept
from fxwidth.runtime.namespaces import CellSpace, NamedSpace, attributes_of

# Whose code keeps nothing of what a model computes.
_FOREIGN = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "fxwidth"}
_CONTAINERS = (dict, list, set, tuple, frozenset)
# Of foreign classes, yet meant to hold what is put in.
_HOLDERS = (
    *(types.SimpleNamespace, threading.local, UserDict, UserList),
    *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_TORCH = frozenset(vars(nn.Module()))
_CALLS = frozenset({"forward", "__call__", "__torch_function__"})
# How far callables are looked for in containers and objects, and in how long ones.
_DEEPEST, _LONGEST = 2, 256


def is_foreign(value: Any) -> bool:
    """Tell whether a function, class or module is of a library that keeps nothing of what a model computes."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] in _FOREIGN


def called_functions(module: nn.Module) -> list[Any]:
    """Return the functions in Python that the nodes of a graph call, and not torch's."""
    if not isinstance(module, fx.GraphModule):
        return []
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return [target for target in targets if type(target) in _FUNCTIONS and not is_foreign(target)]


def keep_reachable(parts: Iterable[nn.Module]) -> Kept:
    """Remember what the code of modules may write to outside of them: that of their classes, hooks and graphs."""
    reach = _Reach()
    reach.known.update(id(part) for part in parts)
    for part in parts:
        reach.add_module(part)
    for hooks in _global_hooks():
        reach.add_all(hooks.values())
    reach.follow()
    return reach.kept


def has_global_hooks() -> bool:
    """Tell whether there are hooks on the calls of all modules."""
    return any(_global_hooks())


def _global_hooks() -> tuple[dict[int, Any], ...]:
    return nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks


class _Reach:
    """What has been reached from some code.

    Attributes:
        kept: the data among that.
        known: the identities of what need not be looked at again.
    """

    def __init__(self) -> None:
        self.kept = Kept()
        self.known: set[int] = set()
        self._kinds: set[type] = set()  # of modules
        self._ways: dict[type, Callable[[_Reach, Any], object] | None] = {}
        self._names: set[str] = set(_CALLS)
        self._spaces: dict[int, Any] = {}  # the attributes of classes and modules, by name
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}

    def add_module(self, part: nn.Module) -> None:
        """Take the code of a module: its class, its hooks, functions among its attributes, those that a graph calls."""
        own = part.__dict__
        if type(part) not in self._kinds:
            self._kinds.add(type(part))
            self._add_class(type(part))
        for name in _HOOKS:
            if own.get(name):
                self.add_all(own[name].values())
        # The data among attributes is remembered with the module.
        values = [value for name, value in own.items() if type(value) not in _PLAIN and name not in _OF_TORCH]
        if values:
            self.add_all(values, 1)
        if isinstance(part, fx.GraphModule):
            self.add_all(called_functions(part))

    def add_all(self, values: Iterable[Any], depth: int = 0) -> None:
        """Take some values."""
        for value in list(values):
            self._add(value, depth)

    def follow(self) -> None:
        """Take what is mentioned by name, until nothing is new; then remember the globals."""
        done: set[tuple[int, str]] = set()
        while True:
            found = [
                (number, name)
                for number, space in list(self._spaces.items())
                for name in self._names.intersection(space)
                if (number, name) not in done
            ]
            if not found:
                break
            for number, name in found:
                done.add((number, name))
                self._add(self._spaces[number][name], 0)
        for space, names in self._globals.values():
            self.kept.add_namespace(NamedSpace(space, names))

    def _add(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _PLAIN or id(value) in self.known:
            return
        self.known.add(id(value))
        if kind not in self._ways:
            self._ways[kind] = next((way for base, way in _WAYS if issubclass(kind, base)), None)
        way = self._ways[kind]
        if way is not None:
            way(self, value)
        elif issubclass(kind, _CONTAINERS):
            self._add_data(value, value.values() if issubclass(kind, dict) else value, depth)
        elif issubclass(kind, _HOLDERS) or not is_foreign(kind):
            self._add_class(kind)
            self._add_data(value, (attributes_of(value) or {}).values(), depth)

    def _add_data(self, value: Any, inner: Iterable[Any], depth: int) -> None:
        if depth == 0:
            self.kept.add_value(value)
        inner = list(inner)
        if depth < _DEEPEST and len(inner) <= _LONGEST:
            self.add_all(inner, depth + 1)

    def _add_function(self, function: types.FunctionType) -> None:
        if is_foreign(function):
            return
        for cell in function.__closure__ or ():
            self.kept.add_namespace(CellSpace(cell))
            self.add_all(dict(CellSpace(cell)).values())
        self.add_all((function.__defaults__ or (), function.__kwdefaults__ or {}))
        self.kept.add_namespace(function.__dict__)
        self.add_all(function.__dict__.values())
        names = set(_names_in(function.__code__))
        self._names |= names
        space = function.__globals__
        known = self._globals.setdefault(id(space), (space, set()))[1]
        new = names - known
        known |= new
        self.add_all(space[name] for name in new if name in space)

    def _add_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not is_foreign(base) and id(base) not in self._spaces:
                self._spaces[id(base)] = vars(base)
                self.kept.add_class(base)

    def _add_python_module(self, module: types.ModuleType) -> None:
        if not is_foreign(module):
            self._spaces[id(module)] = vars(module)
            self._globals.setdefault(id(vars(module)), (vars(module), set()))

    def _add_other_model(self, model: nn.Module) -> None:
        """Take a module that is none of those given, such as one that keeps features by hooks."""
        for part in model.modules():
            self.known.add(id(part))
            self.kept.add_attributes(part)
            self.add_module(part)

    def _add_cache(self, cache: Any) -> None:
        self.kept.add_cache(cache)
        self._add(cache.__wrapped__, 0)


_FUNCTIONS = (types.FunctionType, functools._lru_cache_wrapper)
_PLAIN = (SIMPLE - {types.FunctionType, types.MethodType}) | {nn.Parameter}
_WAYS: tuple[tuple[Any, Callable[[_Reach, Any], object]], ...] = (
    (types.FunctionType, _Reach._add_function),
    (types.MethodType, lambda reach, value: reach.add_all((value.__func__, value.__self__))),
    (functools._lru_cache_wrapper, _Reach._add_cache),
    (functools.partial, lambda reach, value: reach.add_all((value.func, value.args, value.keywords))),
    ((staticmethod, classmethod), lambda reach, value: reach.add_all((value.__func__,))),
    (property, lambda reach, value: reach.add_all((value.fget, value.fset))),
    (functools.cached_property, lambda reach, value: reach.add_all((value.func,))),
    (type, _Reach._add_class),
    (types.ModuleType, _Reach._add_python_module),
    (nn.Module, _Reach._add_other_model),
    (Tensor, lambda reach, value: reach.kept.tensors.append(value)),
    ((fx.Graph, fx.Node, weakref.ref), lambda _, __: None),
)


@functools.lru_cache(4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """Return the names of globals and attributes that a piece of code mentions, with the code in it."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)
