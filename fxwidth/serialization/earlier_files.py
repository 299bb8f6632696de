"""Files of earlier versions: where what they name is now, and the graphs that they hold as generated code.

This module stands for `pickle` where `torch.load` reads a file.
"""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import types
from collections.abc import Callable
from pickle import load
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverloadPacket
from torch.fx import graph_module
from torch.fx.proxy import GraphAppendingTracer

from fxwidth.errors import FxwidthError
from fxwidth.serialization.graph_data import WRAPPED
from fxwidth.serialization.graph_pickling import blank, pickle_as_data

__all__ = ["Unpickler", "load"]

# By module of an earlier version; of those that files name something from.
_MOVED = {
    "fxwidth.analysis": "fxwidth.analysis.result",
    "fxwidth.calls": "fxwidth.frontends.call_signature",
    "fxwidth.exporting": "fxwidth.frontends.export",
    "fxwidth.in_place": "fxwidth.frontends.in_place",
    "fxwidth.known_axes": "fxwidth.analysis.known_axes",
    "fxwidth.mode_merging": "fxwidth.frontends.train_eval_merge",
    "fxwidth.notes": "fxwidth.recording.graph_meta",
    "fxwidth.pins": "fxwidth.axes.pins",
    "fxwidth.structures": "fxwidth.runtime.pytrees",
    "fxwidth.tracer_proxies": "fxwidth.frontends.tracer_proxies",
    "fxwidth.value_record": "fxwidth.recording.data_dependent",
}
# By module and name: what did what another function does now.
_RENAMED = {
    ("fxwidth.recording.graph_meta", "_carry"): ("fxwidth.serialization.graph_pickling", "pickle_as_data"),
    ("fxwidth.frontends.export", "Region"): ("fxwidth.frontends.export_reassembly", "Region"),
}
_IMPORT = re.compile(r"^from (fxwidth\.\w+) import (\w+) as (\w+)$", re.MULTILINE)
_WRAP = re.compile(r"^torch\.fx\._symbolic_trace\.wrap\(['\"](\w+)['\"]\)", re.MULTILINE)


class Unpickler(pickle.Unpickler):
    """Finds what earlier versions have named, and reads their graphs as they were."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a file names.

        Raises:
            FxwidthError: it is not there.
        """
        if (module, name) == ("torch.fx.graph_module", "reduce_graph_module"):
            return module_of_code
        place = _MOVED.get(module, module), name
        try:
            return super().find_class(*_RENAMED.get(place, place))
        except (AttributeError, ImportError) as error:
            raise FxwidthError(
                f"the file needs {name} of {module}, which is not there ({error}); make that module importable, as it "
                "was when the file was written."
            ) from error


def module_of_code(body: dict[str, Any], imports: str) -> fx.GraphModule:
    """Return the graph module that torch.fx has pickled as code: each statement becomes a node again.

    Args:
        body: the attributes of the module.
        imports: the code that imports what the graph calls.

    Raises:
        FxwidthError: the graph that the code gives would generate other code.
    """
    imports, code = _in_present_names(imports, body["_code"])
    module = blank(fx.GraphModule, body.get("_graphmodule_cls_name", "GraphModule"))
    module.__setstate__(body)
    try:
        module.graph = _graph_of_code(module, imports, code, body.get("_tracer_cls"))
    except Exception as error:
        raise FxwidthError(f"{_UNREADABLE} ({type(error).__name__}: {error})") from error
    if ast.dump(ast.parse(module._code.strip())) != ast.dump(ast.parse(code.strip())):
        raise FxwidthError(_UNREADABLE)
    pickle_as_data(module)
    return module


_UNREADABLE = (
    "the file is of an earlier version, and its graph cannot be read back from its code without a change; load it "
    "with the versions of fxwidth and torch that wrote it, and save it there to a path that ends in '.safetensors'."
)


def _in_present_names(imports: str, code: str) -> tuple[str, str]:
    """Return imports and code with functions of this package named as torch.fx would name them now."""
    for old, function, name in _IMPORT.findall(imports):
        module = _MOVED.get(old, old)
        now = f"{module}.{function}".replace(".", "_")
        imports = imports.replace(
            f"from {old} import {function} as {name}", f"from {module} import {function} as {now}"
        )
        code = re.sub(rf"\b{name}\b", now, code)
    return imports, code


def _graph_of_code(module: nn.Module, imports: str, code: str, tracer: type[fx.Tracer] | None) -> fx.Graph:
    # As torch.fx does when it reads a file.
    forward = graph_module._forward_from_src(imports + code, {})
    graph = fx.Graph(tracer_cls=tracer)
    recorder = _Recorder(graph, code)
    space = forward.__globals__
    space.update({name: recorder.shown(value) for name, value in space.items() if not name.startswith("__")})
    _, *parameters = inspect.signature(forward).parameters.values()
    results = forward(_Part(recorder, "", module), *map(recorder.placeholder, parameters))
    annotation = inspect.signature(forward).return_annotation
    wrapped = _WRAP.findall(code)
    for node in graph.nodes:
        if node.op == "call_function" and fx.node._get_qualified_name(node.target).replace(".", "_") in wrapped:
            node.meta[WRAPPED] = True
    graph.output(recorder.create_arg(results), None if annotation is inspect.Signature.empty else annotation)
    return graph


def _names(code: str) -> tuple[dict[str, str], list[str]]:
    """Return the names that code gives to its parameters where these are others, and to what it computes, in order."""
    function = next(part for part in ast.parse(code.strip()).body if isinstance(part, ast.FunctionDef))
    parameters = {argument.arg for argument in function.args.args}
    of_parameters: dict[str, str] = {}
    names: list[str] = []
    for statement in function.body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        value = statement.value
        if not isinstance(target, ast.Name) or (isinstance(value, ast.Constant) and value.value is None):
            continue  # what is no longer needed is set to None
        if isinstance(value, ast.Name) and value.id in parameters:
            of_parameters[value.id] = target.id
        else:
            names.append(target.id)
    return of_parameters, names


class _Recorder(GraphAppendingTracer):
    """Makes a node of everything that is called, whatever it is called with."""

    def __init__(self, graph: fx.Graph, code: str) -> None:
        super().__init__(graph)
        self._of_parameters, names = _names(code)
        self._names = iter(names)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Add a node to the graph, by the name that it has in the code."""
        name = next(self._names) if name is None else name
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.name = name
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for the value of a node."""
        return _Value(node, self)

    def placeholder(self, parameter: inspect.Parameter) -> fx.Proxy:
        """Return what stands for a parameter of the code."""
        empty = inspect.Parameter.empty
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        if parameter.kind in stars:
            raise ValueError(f"it takes {stars[parameter.kind]}{parameter.name}")
        default = () if parameter.default is empty else (parameter.default,)
        name = self._of_parameters.get(parameter.name, parameter.name)
        proxy: fx.Proxy = self.create_proxy("placeholder", parameter.name, default, {}, name=name)
        proxy.node.type = None if parameter.annotation is empty else parameter.annotation
        return proxy

    def shown(self, value: Any) -> Any:
        """Return what the code is to see in the place of something that it imports."""
        if isinstance(value, (types.ModuleType, OpOverloadPacket)):
            return _Namespace(self, value)
        if callable(value) and not isinstance(value, type):
            return self._calling(value)
        return value

    def _calling(self, function: Callable[..., Any]) -> Callable[..., fx.Proxy]:
        return lambda *args, **kwargs: self.create_proxy("call_function", function, args, kwargs)


class _Value(fx.Proxy):
    """Stands for a result of the code."""

    def __getattr__(self, k: str) -> Any:
        """Return what stands for an attribute, which is read at once, or a method."""
        found = getattr(Tensor, k, None)
        if found is not None and not callable(found):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)


class _Namespace:
    """Stands for a module, or an operator with several overloads."""

    def __init__(self, recorder: _Recorder, value: Any) -> None:
        self._recorder = recorder
        self._value = value

    def __getattr__(self, name: str) -> Any:
        """Return what stands for something in it."""
        return self._recorder.shown(getattr(self._value, name))

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Return what stands for the result of a call."""
        result: fx.Proxy = self._recorder.create_proxy("call_function", self._value, args, kwargs)
        return result


class _Part:
    """Stands for a module of the graph, by its path."""

    def __init__(self, recorder: _Recorder, path: str, value: nn.Module) -> None:
        self._recorder = recorder
        self._path = path
        self._value = value

    def __getattr__(self, name: str) -> Any:
        """Return what stands for a part of it, or for a tensor in it."""
        path = f"{self._path}.{name}" if self._path else name
        value = getattr(self._value, name)
        if isinstance(value, nn.Module):
            return _Part(self._recorder, path, value)
        return self._recorder.create_proxy("get_attr", path, (), {})

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Return what stands for the result of a call."""
        result: fx.Proxy = self._recorder.create_proxy("call_module", self._path, args, kwargs)
        return result
