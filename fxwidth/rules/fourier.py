"""Fourier transforms, and complex numbers as pairs of real ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.pins import COMPLEX, TRANSFORMED
from fxwidth.rules.op_families import Positions
from fxwidth.rules.registry import RuleContext, pointwise, rule

aten = torch.ops.aten

# Of each entry alone, and linear in what is there.
pointwise(aten._conj, aten._conj_physical, aten._neg_view, aten.complex, aten.polar)


@rule(aten._fft_r2c, aten._fft_c2c, aten._fft_c2r, family=Positions(linear=True))
def _transform(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Transform some dims, whose sizes tell the frequencies; what is beside these is transformed alike."""
    signal = c.axes("self")
    shape = c.outputs[0].shape
    for dim in {c.dim(dim, len(signal)) for dim in c["dim"]}:
        c.pin([signal[dim]], TRANSFORMED)
        # Of a real signal half of the frequencies say what the others do.
        signal[dim] = signal[dim] if axis_size(signal[dim]) == shape[dim] else c.fixed(shape[dim], TRANSFORMED)
    return [[c.space.normalise(axis) for axis in signal]]


@rule(aten.view_as_real)
def _view_as_real(c: RuleContext) -> Sequence[Sequence[Axis]]:
    return [[*c.axes("self"), c.fixed(2, COMPLEX)]]


@rule(aten.view_as_complex)
def _view_as_complex(c: RuleContext) -> Sequence[Sequence[Axis]]:
    *signal, parts = c.axes("self")
    c.pin([parts], COMPLEX)
    return [signal]
