"""Recurrent layers: cells that are one op each, where gates are not matrix products, and sequences that are packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxwidth.axes.factors import Axis
from fxwidth.axes.pins import FOUND
from fxwidth.rules.op_families import Cell
from fxwidth.rules.registry import RuleContext, rule

aten = torch.ops.aten


def _couple_gates(c: RuleContext, state: list[Axis], count: int) -> Axis:
    """Say that every gate is as wide as the state; return the axis of all of them, end to end."""
    gates = c.space.concatenation([state[1]] * count)
    for name in ("input_gates", "hidden_gates"):
        c.unify(state[0], c.axes(name)[0])
        c.unify(c.axes(name)[1], gates)
    for name in ("input_bias", "hidden_bias"):
        if name in c:
            c.unify(c.axes(name)[0], gates)
    return c.space.normalise(gates)


@rule(aten._thnn_fused_lstm_cell, family=Cell())
def _lstm_cell(c: RuleContext) -> Sequence[Sequence[Axis]]:
    state = c.axes("cx")
    gates = _couple_gates(c, state, 4)
    return [state, state, [state[0], gates]]


@rule(aten._thnn_fused_gru_cell, family=Cell())
def _gru_cell(c: RuleContext) -> Sequence[Sequence[Axis]]:
    state = c.axes("hx")
    _couple_gates(c, state, 3)
    # For the backward pass it keeps five numbers per unit.
    return [state, [state[0], c.space.concatenation([state[1]] * 5)]]


@rule(aten._pack_padded_sequence)
def _pack(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Put the steps of sequences that are not padding one below the other."""
    steps = c.axes("input")
    c.pin([*steps[:2], *c.axes("lengths")], FOUND)
    rows, counts = c.outputs
    return [[c.fixed(rows.shape[0], FOUND), *steps[2:]], [c.fixed(counts.shape[0], FOUND)]]


@rule(torch.ops.fxwidth.pad_packed_sequence)
def _pad(c: RuleContext) -> Sequence[Sequence[Axis]]:
    rows = c.axes("data")
    c.pin([rows[0], *c.axes("batch_sizes")], FOUND)
    padded, lengths = c.outputs
    return [
        [*(c.fixed(size, FOUND) for size in padded.shape[:2]), *rows[1:]],
        [c.fixed(lengths.shape[0], FOUND)],
    ]
