"""What a picture of a graph shows: boxes with the groups that they carry, the flow between them, and blocks folded."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Factor
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.repeated_blocks import NUMBER, folded
from fxwidth.recording.tape import Axes
from fxwidth.runtime.pytrees import deep_tensors

Colour = tuple[float, float, float]

_MOST_KINDS, _LONGEST = 4, 44
# Several results of one module have one title: those after the first get this mark, as groups do.
_AGAIN = "'"


@dataclass(frozen=True)
class Box:
    """Nodes in a row that carry the same groups: what is drawn as one.

    Attributes:
        title: the module, or the op and the module that it is in; of folded blocks with the range of their numbers.
        kinds: what the nodes are.
        groups: the free groups that their tensors carry.
        inner: those inside of them.
        count: how many boxes of repeated blocks it stands for.
        nodes: the names of the nodes, of all of these.
    """

    title: str
    kinds: tuple[str, ...]
    groups: tuple[ChannelGroup, ...]
    inner: tuple[ChannelGroup, ...]
    count: int = 1
    nodes: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The title, as far as there is room for it."""
        return self.title if len(self.title) <= _LONGEST else f"…{self.title[1 - _LONGEST :]}"

    @property
    def subtitle(self) -> str:
        """What the nodes are, in one line, where the title does not say so."""
        if self.kinds == (self.title,):
            return ""
        told = list(self.kinds[:_MOST_KINDS]) + (["…"] if len(self.kinds) > _MOST_KINDS else [])
        return " · ".join(told) + (f", {self.count} times" if self.count > 1 else "")


def flow_of(analysis: Analysis, free: Sequence[ChannelGroup]) -> nx.DiGraph:
    """Return the boxes, as `box` of vertices, and the flow of tensors between them.

    Args:
        analysis: the graph.
        free: the groups that are shown.
    """
    by_factor = {group.factor: group for group in free}
    found = {node: _carried(analysis, node, by_factor) for node in analysis.module.graph.nodes}
    carried = {node: groups for node, groups in found.items() if groups is not None}
    sources = {node: [source for source in node.all_input_nodes if source in carried] for node in carried}
    readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in carried}
    for node, own in sources.items():
        for source in own:
            readers[source].append(node)
    runs: dict[fx.Node, list[fx.Node]] = {}
    for node, own in sources.items():
        run = runs[own[0]] if len(own) == 1 and _hands_on(own[0], node, readers, carried) else []
        run.append(node)
        runs[node] = run
    flow = nx.DiGraph()
    titles: set[str] = set()
    for node, run in runs.items():
        if run[0] is node:
            kinds = tuple(_kind(analysis, part) for part in run)
            inner = [group for part in run for group in _inner(analysis, part, by_factor) if group not in carried[node]]
            title = _title(node)
            while title in titles:
                title += _AGAIN
            titles.add(title)
            names = tuple(part.name for part in run)
            flow.add_node(node, box=Box(title, kinds, carried[node], tuple(dict.fromkeys(inner)), 1, names))
        flow.add_edges_from((runs[source][0], run[0]) for source in sources[node] if runs[source] is not run)
    return flow


def folded_flow(flow: nx.DiGraph) -> nx.DiGraph:
    """Return a flow in which the boxes of blocks that follow each other and are alike are one.

    What goes from one such block to the next would go up, and is left out; the boxes tell how often they are there.
    """
    boxes: dict[str, tuple[fx.Node, Box]] = {
        flow.nodes[node]["box"].title: (node, flow.nodes[node]["box"]) for node in flow
    }
    keys = _block_keys([box for _, box in boxes.values()])
    rows = ((title, keys[title]) for title in boxes)
    result = nx.DiGraph()
    place: dict[fx.Node, fx.Node] = {}
    for title, _, titles in folded(rows):
        first, box = boxes[titles[0]]
        nodes = tuple(name for one in titles for name in boxes[one][1].nodes)
        result.add_node(first, box=replace(box, title=title, count=len(titles), nodes=nodes))
        place |= {boxes[one][0]: first for one in titles}
    order = {node: number for number, node in enumerate(result)}
    for source, reader in flow.edges:
        ends = place[source], place[reader]
        if order[ends[0]] < order[ends[1]]:
            result.add_edge(*ends)
    return result


def _block_keys(boxes: Sequence[Box]) -> dict[str, tuple[str, str]]:
    """Return for each box, by title, what those share that are drawn as one: a run of blocks, and a place in them.

    Blocks are a run that follow each other and are alike in all that is in them, blocks within blocks included.
    """
    contents: dict[str, list[object]] = {}
    for box in boxes:
        for block in _blocks_around(box.title):
            contents.setdefault(block, []).append((_within(box.title, block), box.kinds, _widths(box)))
    runs: dict[str, str] = {}
    last: dict[str, str] = {}
    for block, own in contents.items():
        kind = block.rpartition(".")[0] + NUMBER.sub("#", block.rpartition(".")[2])
        before = last.get(kind)
        runs[block] = runs[before] if before is not None and contents[before] == own else block
        last[kind] = block
    sizes = Counter(runs.values())
    keys = {}
    for box in boxes:
        # Of blocks within blocks the outer ones go first.
        repeated = [block for block in _blocks_around(box.title) if sizes[runs[block]] > 1]
        outer = repeated[0] if repeated else None
        keys[box.title] = ("", box.title) if outer is None else (runs[outer], _within(box.title, outer))
    return keys


def _blocks_around(title: str) -> list[str]:
    """Return the paths of the numbered parts of a network that a box is in, the outermost first."""
    path, _, op = title.partition(" ")
    # An op is in the module that it names; a module is in those around it.
    parts = path.split(".") if op else path.split(".")[:-1]
    return [".".join(parts[:place]) for place, part in enumerate(parts, 1) if NUMBER.search(part)]


def _within(title: str, block: str) -> str:
    return title[len(block) :]


def folded_groups(groups: Sequence[ChannelGroup]) -> list[tuple[str, tuple[ChannelGroup, ...]]]:
    """Return groups of repeated blocks that have one width as one entry, with the name for all of them."""
    by_name = {group.name: group for group in groups}
    # Groups of one dim are numbered too, and are no blocks.
    rows = folded((group.name, (group.width, group.name.partition("#")[2])) for group in groups)
    return [(name, tuple(by_name[one] for one in names)) for name, _, names in rows]


def colours_of(entries: Sequence[tuple[str, tuple[ChannelGroup, ...]]]) -> dict[ChannelGroup, Colour]:
    """Return a colour for the groups of each entry; neighbours in the list, and in the network, differ most."""
    golden = 0.6180339887
    result: dict[ChannelGroup, Colour] = {}
    for i, (_, groups) in enumerate(entries):
        lightness, saturation = ((0.76, 0.74), (0.83, 0.66), (0.70, 0.50))[i % 3]
        result |= dict.fromkeys(groups, colorsys.hls_to_rgb((0.58 + i * golden) % 1.0, lightness, saturation))
    return result


def darker(colour: Colour) -> Colour:
    """Return a colour for the edge of what is filled with another."""
    return colour[0] * 0.68, colour[1] * 0.68, colour[2] * 0.68


def _hands_on(
    source: fx.Node,
    node: fx.Node,
    readers: Mapping[fx.Node, Sequence[fx.Node]],
    carried: Mapping[fx.Node, tuple[ChannelGroup, ...]],
) -> bool:
    """Tell whether a node, which reads one other alone, is drawn with it in one box; boxes end where blocks do."""
    if node.op == "output" or source.op == "placeholder" or len(readers[source]) > 1:
        return False
    return carried[source] == carried[node] and _block(source) == _block(node)


def _block(node: fx.Node) -> str:
    """Return the innermost numbered part of a network that a node is in."""
    parts = str(node.target).split(".")[:-1] if node.op == "call_module" else _path(node).split(".")
    places = [place for place, part in enumerate(parts, 1) if NUMBER.search(part)]
    return ".".join(parts[: places[-1]]) if places else ""


def _path(node: fx.Node) -> str:
    """Return the path of the module that a node is in, as far as that is known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _widths(box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(group.width for group in box.groups), tuple(group.width for group in box.inner)


def _carried(
    analysis: Analysis, node: fx.Node, by_factor: Mapping[Factor, ChannelGroup]
) -> tuple[ChannelGroup, ...] | None:
    """Return the free groups in a node's tensors, or None where the node is not drawn."""
    if node.op == "get_attr" or not deep_tensors(analysis.node_values.get(node.name)):
        return None
    return _groups_in(analysis, analysis.node_axes[node.name], by_factor)


def _inner(analysis: Analysis, node: fx.Node, by_factor: Mapping[Factor, ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Return the free groups in what the ops of a module make."""
    if node.op != "call_module":
        return ()
    made = (axes for call in analysis.calls_of(node.name) if call.contractions for axes in call.output_axes)
    return _groups_in(analysis, made, by_factor)


def _groups_in(
    analysis: Analysis, tensors: Iterable[Axes], by_factor: Mapping[Factor, ChannelGroup]
) -> tuple[ChannelGroup, ...]:
    factors = (factor for axes in tensors for axis in axes for factor in analysis.space.factors(axis))
    return tuple(by_factor[factor] for factor in dict.fromkeys(factors) if factor in by_factor)


def _title(node: fx.Node) -> str:
    """Return the module that a node is: itself, that of the parameters which it reads, or that which it is in."""
    if node.op == "call_module":
        return str(node.target)
    if node.op not in ("call_function", "call_method"):
        return str(node.target) if node.op == "placeholder" else node.name
    read = [str(one.target) for one in node.all_input_nodes if one.op == "get_attr"]
    if read and (path := read[0].rpartition(".")[0]):
        return path
    return f"{path} {_op(node)}" if (path := _path(node)) else _op(node)


def _kind(analysis: Analysis, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(analysis.module.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "output"}[node.op]
    return _op(node)


def _op(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
