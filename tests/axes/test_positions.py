"""The positions of channels against index maps: what is left without those of dropped channels is what is kept."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.positions import positions_by_channel
from fxwidth.axes.unification import unify
from tests.oracles.axes_strategy import SIZES, Plan, kept_indices, plans


@given(st.data(), SIZES.flatmap(plans), st.booleans())
def test_dropping_positions_is_keeping_the_others(data, plan: Plan, twice: bool):
    space = FactorSpace()
    axis = plan.build(space)
    # Grams of channels, as a flattened outer product has them: a position is of two channels of one group.
    axis = space.product(axis, axis) if twice else axis
    kept = data.draw(kept_indices(space.factors(axis), False))
    stay = np.full(axis_size(axis), True)
    for factor, channels in kept.items():
        positions = positions_by_channel(axis, factor)
        assert len(positions) == factor.size
        assert all((np.diff(own) > 0).all() for own in positions)
        for channel in np.setdiff1d(np.arange(factor.size), channels):
            stay[positions[channel]] = False
    np.testing.assert_array_equal(np.flatnonzero(stay), IndexMaps(space, kept).indices(axis))


def test_channels_of_a_flattened_image_and_of_a_concatenation():
    space = FactorSpace()
    one, other = space.fresh(3, "one"), space.fresh(2, "other")
    axis = space.concatenation([other, space.product(one, ((2,),)), one])
    (factor,) = space.factors(one)
    assert [own.tolist() for own in positions_by_channel(axis, factor)] == [[2, 3, 8], [4, 5, 9], [6, 7, 10]]


def test_pinned_channels_have_positions_too():
    space = FactorSpace()
    one, other = space.fresh(3, "one"), space.fresh(2, "other")
    whole = space.fresh(9, "whole")
    unify(space, whole, space.concatenation([other, space.product(one, ((2,),)), ((1,),)]))
    (factor,) = space.factors(one)
    before = [own.tolist() for own in positions_by_channel(whole, factor)]
    assert before == [[2, 3], [4, 5], [6, 7]]
    space.pin(one, "as it is")
    assert [own.tolist() for own in positions_by_channel(whole, factor)] == before
