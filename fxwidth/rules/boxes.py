"""Ops of torchvision on boxes: which of them stay, and the features inside of them."""

from __future__ import annotations

from collections.abc import Sequence

from fxwidth.axes.factors import Axis
from fxwidth.axes.pins import BOX_SAMPLES, BOXES, POSITION
from fxwidth.rules.registry import RuleContext, rule


@rule("torchvision::nms")
def _nms(c: RuleContext) -> Sequence[Sequence[Axis]]:
    for operand in c.call.inputs:
        c.pin(c.axes(operand), BOXES)
    return [[c.fixed(c.outputs[0].shape[0])]]


@rule("torchvision::roi_align", "torchvision::roi_pool")
def _regions(c: RuleContext) -> Sequence[Sequence[Axis]]:
    """Take a patch of fixed size from [N, C, H, W] for each of [K, 5] boxes; roi_pool also tells from where."""
    signal, boxes = c.axes("input"), c.axes("rois")
    c.pin([signal[0], boxes[1]], BOX_SAMPLES)
    c.pin(signal[2:], POSITION)
    return [[boxes[0], signal[1], *map(c.fixed, output.shape[2:])] for output in c.outputs]
