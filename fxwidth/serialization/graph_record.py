"""What a graph is, as plain data to compare another one with: its nodes, its literals and its modules' attributes.

A file of tensors is loaded into a graph that is made anew, by the code of the model and of this package. The record
says whether that is the graph that was saved; numbers with fractions, which resizes compute from values, are taken from
it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxwidth.runtime.module_state import is_plain_layer, walk
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.serialization.graph_data import Named, named_target
from fxwidth.serialization.plain_trees import decoded, encoded

# Modes are the user's to choose, and not a part of the structure; nor are the notes of graphs.
_NO_STRUCTURE = frozenset({"training", "meta"})
_PLAIN = (bool, int, float, str, type(None))


class DifferentGraphError(Exception):
    """A graph is not the one that a record tells of; the message says where."""


@dataclass(frozen=True)
class Fingerprint:
    """What a network was before its first resize.

    Attributes:
        shapes: those of its parameters and buffers, by name.
        structure: a digest of its graph, without numbers.
    """

    shapes: Mapping[str, tuple[int, ...]]
    structure: str

    @staticmethod
    def of(gm: fx.GraphModule) -> Fingerprint:
        """Return that of a graph as it is."""
        shapes = {name: tuple(tensor.shape) for name, (tensor, _) in tensor_slots(gm).items()}
        lines = [[node.op, _target(node), [source.name for source in node.all_input_nodes]] for node in gm.graph.nodes]
        return Fingerprint(shapes, hashlib.sha256(json.dumps(lines).encode()).hexdigest())

    def data(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {"shapes": {name: list(shape) for name, shape in self.shapes.items()}, "structure": self.structure}

    @staticmethod
    def of_data(data: Mapping[str, Any]) -> Fingerprint:
        """Return the one of which `data` has been made."""
        return Fingerprint({name: tuple(shape) for name, shape in data["shapes"].items()}, data["structure"])

    def difference(self, other: Fingerprint) -> str | None:
        """Return the first tensor that another network has otherwise, in words, or None."""
        for name in [*self.shapes, *(name for name in other.shapes if name not in self.shapes)]:
            here, there = other.shapes.get(name), self.shapes.get(name)
            if here is None or there is None:
                return f"{name} occurs in only one of them"
            if here != there:
                return f"{name} has shape {there} in the file and {here} here, before any resize"
        return None


def record_of(gm: fx.GraphModule) -> dict[str, Any]:
    """Return the nodes of a graph and of those in it, with all literals, and the plain attributes of its modules."""
    return {
        "graphs": {path: list(map(_node_data, graph.graph.nodes)) for path, graph in _graphs(gm)},
        "attributes": {path: own for path, part in walk(gm) if (own := _attributes_data(part))},
    }


def adopt(gm: fx.GraphModule, record: Mapping[str, Any], *, trusted: bool) -> None:
    """Give a graph the numbers of a record, so that it is what was recorded; if it is another one, nothing changes.

    Args:
        gm: changed in place, but for its `fx.Graph`, in whose place a copy is put.
        record: what `record_of` has returned.
        trusted: whether whole numbers too are taken from it, on which kernels rely.

    Raises:
        DifferentGraphError: it is another graph.
    """
    graphs, parts = dict(_graphs(gm)), dict(walk(gm))
    if graphs.keys() != record["graphs"].keys():
        raise DifferentGraphError(f"there are graphs {sorted(record['graphs'])} in the file, and {sorted(graphs)} here")
    literals = [(graph, _new_literals(graph, record["graphs"][path], trusted)) for path, graph in graphs.items()]
    if missing := sorted(record["attributes"].keys() - parts.keys()):
        raise DifferentGraphError(f"there is no module {missing[0]!r} here")
    attributes = [
        (parts[path], name, value)
        for path, saved in record["attributes"].items()
        for name, value in _new_attributes(path, parts[path], saved, trusted)
    ]
    for graph, changed in literals:
        if changed:
            _put_literals(graph, changed)
    for part, name, value in attributes:
        setattr(part, name, value)


def _graphs(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    return ((path, part) for path, part in walk(gm) if isinstance(part, fx.GraphModule))


def _node_data(node: fx.Node) -> list[Any]:
    place = f"node {node.name}"
    args, kwargs = encoded(list(node.args), place, _leaf), encoded(dict(node.kwargs), place, _leaf)
    return [node.op, _target(node), node.name, args, kwargs]


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return str(_leaf(node.target, "")["other"])


def _leaf(value: Any, _: str) -> Any:
    """Return what tells which node, operator or object something is; it is only compared."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    named = named_target(value)
    if isinstance(named, Named):
        return {"other": named.path}
    kind = value if hasattr(value, "__qualname__") else type(value)
    return {"other": f"{getattr(kind, '__module__', None)}.{kind.__qualname__}"}


_Literals = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]


def _new_literals(graph: fx.GraphModule, saved: list[list[Any]], trusted: bool) -> _Literals:
    """Return the arguments of those nodes, by their numbers, that have other numbers in a record."""
    nodes = list(graph.graph.nodes)
    changed: _Literals = {}
    for number, (node, (op, target, name, args, kwargs)) in enumerate(zip(nodes, saved, strict=False)):
        if (node.op, _target(node), node.name) != (op, target, name):
            raise DifferentGraphError(f"{name!r} is {target} in the file, and {node.name!r} is {_target(node)} here")
        own = _node_data(node)
        if own[3:] != [args, kwargs]:
            place = f"node {name!r}"
            new_args = _taken(list(node.args), args, place, trusted)
            changed[number] = tuple(new_args), _taken(node.kwargs, kwargs, place, trusted)
    if len(nodes) != len(saved):
        raise DifferentGraphError(f"there are {len(saved)} nodes in the file, and {len(nodes)} here")
    return changed


def _put_literals(graph: fx.GraphModule, changed: _Literals) -> None:
    copied = copy.deepcopy(graph.graph)
    old, new = list(graph.graph.nodes), list(copied.nodes)
    of = dict(zip(old, new, strict=True))
    for number, (args, kwargs) in changed.items():
        new[number].args = fx.node.map_arg(args, of.__getitem__)
        new[number].kwargs = fx.node.map_arg(kwargs, of.__getitem__)
    graph.graph = copied


def _attributes_data(part: nn.Module) -> dict[str, Any]:
    return {name: encoded(value, name) for name, value in vars(part).items() if _is_recorded(name, value)}


def _is_recorded(name: str, value: Any) -> bool:
    if name.startswith("_") or name in _NO_STRUCTURE:
        return False
    return _is_plain(value)


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) in _PLAIN for key in value) and all(map(_is_plain, value.values()))
    parts = value if type(value) in (list, tuple) else (value,)
    return all(type(part) in _PLAIN for part in parts)


def _new_attributes(path: str, part: nn.Module, saved: Mapping[str, Any], trusted: bool) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that a module has otherwise in a record, as they are there."""
    # What the code of a model counts and switches in its own modules is as much its state as a buffer.
    is_state = not is_plain_layer(part)
    for name, data in saved.items():
        own = vars(part)
        if name not in own or not _is_recorded(name, own[name]):
            raise DifferentGraphError(f"{path or 'the graph'} has no {name} here")
        new = _taken(own[name], data, f"{path}.{name}", trusted or is_state)
        if encoded(new, name) != encoded(own[name], name):
            yield name, new


def _taken(own: Any, data: Any, place: str, whole_numbers: bool) -> Any:
    """Return a value with the numbers of a record in it."""
    if isinstance(own, list) and isinstance(data, list) and len(own) == len(data):
        return [_taken(*pair, place, whole_numbers) for pair in zip(own, data, strict=True)]
    inner = _inner(own, data)
    if inner is not None:
        return inner(lambda value, saved: _taken(value, saved, place, whole_numbers))
    if isinstance(own, torch.device) and isinstance(data, dict) and "device" in data:
        # A graph is where its model is; of one on the meta device, where the values are.
        return torch.device("cpu") if own.type == "meta" else own
    if encoded(own, place, _leaf) == data:
        return own
    saved = decoded(data, lambda kind, content: f"{kind} {content}")
    if type(own) is float and type(saved) is float:
        return saved
    if whole_numbers and type(own) is type(saved) and type(own) in (bool, int):
        return saved
    remedy = "; if you trust the file, pass trusted=True" if type(own) is type(saved) and type(own) is int else ""
    raise DifferentGraphError(f"{place} has {saved!r} in the file, and {own!r} here{remedy}")


def _inner(own: Any, data: Any) -> Callable[[Callable[[Any, Any], Any]], Any] | None:
    """Return the function that goes through a tuple, a slice or a dict and what stands for it, if they fit."""
    if not isinstance(data, dict) or len(data) != 1:
        return None
    ((kind, content),) = data.items()
    if kind == "tuple" and isinstance(own, tuple) and len(own) == len(content):
        return lambda each: tuple(each(*pair) for pair in zip(own, content, strict=True))
    if kind == "slice" and type(own) is slice:
        return lambda each: slice(*(each(*pair) for pair in zip((own.start, own.stop, own.step), content, strict=True)))
    if (
        kind == "dict"
        and isinstance(own, Mapping)
        and [encoded(key, "", _leaf) for key in own] == [k for k, _ in content]
    ):
        return lambda each: {
            key: each(value, saved) for (key, value), (_, saved) in zip(own.items(), content, strict=True)
        }
    return None
