"""What sums or reduces over channels that are dropped, and has no weights of its own to make up for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from torch import Tensor

from fxwidth.axes.factors import Axis, Factor, axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.recording.tape import OpCall
from fxwidth.statistics.observation_points import NORMS
from fxwidth.weights.readers import Wiring


def unfitted_uses(wiring: Wiring, maps: IndexMaps, rotated: Collection[Factor] = ()) -> dict[str, str]:
    """Return the nodes that see fewer channels of an activation and stay as they are, and what they do with them.

    Readers take over what they read from dropped channels, and the gains of norms make up for lost variance; a product
    of two activations or a reduction has nothing to do so by.

    Args:
        wiring: that of the graph at the old sizes.
        maps: which channels are kept.
        rotated: the factors of groups in a new basis, whose dropped channels are those that such products miss least.
    """
    told = {}
    for call in wiring.analysis.calls:
        for axis, what in _uses(wiring, call):
            changed = set(maps.changed_factors(axis))
            if changed - set(rotated) and int(np.count_nonzero(maps.indices(axis) != NEW)) < axis_size(axis):
                told[f"node {call.node}"] = what
    return told


def _uses(wiring: Wiring, call: OpCall) -> Iterator[tuple[Axis, str]]:
    """Yield the axes of activations that an op sums or reduces over, and how that is called."""

    def axis_of(tensor: Tensor, dim: int) -> Axis:
        return wiring.analysis.space.normalise(call.axes[tensor][dim])

    for contraction in wiring.roles.activation_products(call):
        for dim in contraction.left_dims:
            yield axis_of(contraction.left, dim), "it sums products of two activations over its channels"
    for reduction in call.reductions:
        if reduction.kind not in NORMS and not wiring.roles.is_parameter(reduction.tensor):
            yield axis_of(reduction.tensor, reduction.dim), f"it takes a {reduction.kind} over its channels"
