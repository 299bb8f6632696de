"""What is found when the graphs of both modes are laid side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxwidth.frontends.call_signature import INPUTS_MODULE, OUTPUTS_MODULE


@dataclass(frozen=True)
class Choice:
    """A number that differs between the modes."""

    in_training: Any
    in_eval: Any


@dataclass(frozen=True, eq=False)
class TrainingRegion:
    """What training does in the place of a value of evaluation.

    Attributes:
        nodes: those of the graph of training, in order; none where training uses an earlier value as it is.
        result: the node of training, in the region or before it, whose value is used afterwards; None where it is run
            for what it writes to buffers.
        instead_of: the node of evaluation whose place it takes; None where both modes may run it.
        before: the node of evaluation before which it is run.
    """

    nodes: tuple[fx.Node, ...]
    result: fx.Node | None
    instead_of: fx.Node | None
    before: fx.Node


@dataclass
class Alignment:
    """What one graph of both modes needs, beside the graph of evaluation.

    Attributes:
        partner: the node of evaluation for each node of training that has one.
        arguments: the new arguments of nodes of evaluation, with `Choice` and `TrainingRegion` among them.
        counters: nodes of training that count batches, each with the node of evaluation before which it stands.
        regions: what training does besides, in order.
    """

    partner: dict[fx.Node, fx.Node] = field(default_factory=dict)
    arguments: dict[fx.Node, dict[str, Any]] = field(default_factory=dict)
    counters: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    regions: list[TrainingRegion] = field(default_factory=list)


class DifferentError(Exception):
    """The graphs differ by more than numbers and regions; the nodes are the first of each that have no counterpart."""

    def __init__(self, in_eval: fx.Node, in_training: fx.Node) -> None:
        other = f"runs {told(in_training)} where in evaluation it runs {told(in_eval)}"
        if in_eval.target == in_training.target:
            other = _OTHERWISE.get(str(in_eval.target), other)
        super().__init__(f"in training it {other}")
        self.nodes = (in_eval, in_training)


_OTHERWISE = {
    INPUTS_MODULE: "takes inputs of other shapes than in evaluation",
    OUTPUTS_MODULE: "returns an object of another form than in evaluation",
}


def path_of(node: fx.Node) -> str:
    """Return the path of the module whose code made a node, as far as the tracer knows."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path.removeprefix("L['self']").lstrip(".")


def told(node: fx.Node) -> str:
    """Return what a node does in words."""
    name = node.target if isinstance(node.target, (str, torch._ops.OpOverload)) else node.target.__name__
    return "nothing more" if node.op == "output" else f"{name}"
