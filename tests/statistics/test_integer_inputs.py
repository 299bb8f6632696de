"""Integers and truth values among the inputs of noise: what is drawn is valid, various, and as good as data are."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.recording.graph_meta import EXAMPLES, notes_of
from fxwidth.statistics.constant_evidence import constant_inputs
from fxwidth.statistics.integer_inputs import Mask, Offsets, Padding
from fxwidth.statistics.moments import moments_from_data, moments_from_noise
from fxwidth.statistics.observation_points import find_probes
from fxwidth.statistics.observers import OTHER_OPS
from fxwidth.statistics.remembered_noise import noise_moments
from fxwidth.statistics.synthetic_inputs import noise_draws
from tests.zoo.models import relative_difference
from tests.zoo.networks_of_integers import (
    CLASSES,
    INTEGER_NETWORKS,
    Masked,
    body,
    floats,
    integer_network,
    tokens,
)

# Networks with a loop over steps take seconds for each.
SEEDS = {"packed tokens": 1}

every_network = pytest.mark.parametrize("name", INTEGER_NETWORKS)


def traced(name: str, seed: int, batch: int = 4, *, forgets: bool = False) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    model, inputs = integer_network(name, seed, batch)
    gm = fxwidth.trace(model, inputs)
    if forgets:
        notes_of(gm).pop(EXAMPLES)
    return gm, inputs


def batches(gm: fx.GraphModule, *, cautious: bool = False, work: float = 1e6) -> list[list[Any]]:
    graph = fxwidth.analyze(gm)
    draws = noise_draws(graph.analysis, find_probes(graph), 0, work, cautious=cautious)
    return [draw.batch() for draw, _ in zip(draws, range(20), strict=False)]


def shrinkable(gm: fx.GraphModule) -> dict[str, int]:
    return {group.name: group.width for group in fxwidth.analyze(gm).free if group.inexact_growth is None}


class TestWhatIsDrawn:
    @pytest.mark.parametrize(("cautious", "forgets"), [(False, False), (True, False), (True, True)])
    @every_network
    def test_the_model_runs_on_it(self, name: str, cautious: bool, forgets: bool) -> None:
        gm, _ = traced(name, 0, forgets=forgets)
        for batch in batches(gm, cautious=cautious):
            with torch.no_grad():
                assert bool(gm(*batch).isfinite().all())

    @every_network
    def test_something_is_known_of_all_readers_without_an_example_too(self, name: str) -> None:
        gm, _ = traced(name, 0, forgets=True)
        moments = moments_from_noise(fxwidth.analyze(gm), work=1e6)
        assert moments is not None
        # What torch does in one_hot is another thing on fake tensors.
        reasons = {reason for reason in moments.missed.values() if reason != OTHER_OPS}
        assert bool(reasons) == (name in ("columns of counts", "columns from the end"))

    @every_network
    def test_it_varies_and_is_of_the_same_kind(self, name: str) -> None:
        gm, inputs = traced(name, 0)
        found = batches(gm)
        for place in INTEGER_NETWORKS[name].drawn:
            values = torch.cat([batch[place] for batch in found])
            assert values.dtype == inputs[place].dtype
            assert values.shape[1:] == inputs[place].shape[1:]
            assert len(values.unique()) > 1
            if values.dim() > 1:
                assert bool((values != values[:1]).flatten(1).any(0).float().mean() > 0.5)

    @pytest.mark.parametrize("name", ["one_hot", "classes compared", "rows of a parameter", "bags"])
    @pytest.mark.parametrize("forgets", [False, True], ids=["example known", "example unknown"])
    def test_each_class_comes(self, name: str, forgets: bool) -> None:
        gm, _ = traced(name, 0, batch=2, forgets=forgets)
        values = torch.cat([batch[0] for batch in batches(gm)])
        assert values.unique().tolist() == list(range(CLASSES))

    @pytest.mark.parametrize("forgets", [False, True], ids=["example known", "example unknown"])
    def test_each_class_that_is_counted_from_one_comes(self, forgets: bool) -> None:
        gm, _ = traced("classes from one", 0, batch=2, forgets=forgets)
        values = torch.cat([batch[0] for batch in batches(gm)])
        assert values.unique().tolist() == list(range(1, CLASSES + 1))

    def test_lengths_go_from_one_to_all(self) -> None:
        for name in ("lengths", "lengths alone"):
            gm, inputs = traced(name, 0, forgets=True)
            values = torch.cat([batch[len(inputs) - 1] for batch in batches(gm)])
            assert values.unique().tolist() == list(range(1, 8))

    def test_bytes_are_smooth_and_white_in_turn_where_places_have_weights(self) -> None:
        for name, kinds in (("images of bytes", 2), ("images of bytes for a convolution", 1)):
            gm, _ = traced(name, 0, forgets=True)
            found = batches(gm)
            likeness = []
            for (drawn,) in found:
                assert drawn.unique().tolist()[::255] == [0, 255]
                assert float(drawn.double().mean()) == pytest.approx(127.5, abs=8)
                centred = drawn.double() - drawn.double().mean()
                likeness.append(float((centred[..., 1:] * centred[..., :-1]).mean() / centred.square().mean()))
            assert len({one > 0.15 for one in likeness}) == kinds

    def test_each_column_of_a_table_has_its_own_range(self) -> None:
        gm, (table,) = traced("columns of counts", 0, batch=16)
        values = torch.cat([batch[0] for batch in batches(gm)])
        low, high = table.amin(0), table.amax(0)
        assert bool(((values >= low) & (values <= high)).all())
        assert bool((values.amax(0) - values.amin(0) >= 0.95 * (high - low)).all())

    @pytest.mark.parametrize(("batch", "is_range"), [(2, True), (7, True), (8, False)])
    def test_one_value_in_a_few_samples_is_no_range(self, batch: int, is_range: bool) -> None:
        model, (table,) = integer_network("columns of counts", 0, batch)
        table[:, 1], table[:, 2] = 7, -5
        values = torch.cat([drawn for (drawn,) in batches(fxwidth.trace(model, table))])
        assert values[:, 1].unique().tolist() == (list(range(8)) if is_range else [7])
        assert values[:, 2].unique().tolist() == (list(range(-5, 1)) if is_range else [-5])

    @pytest.mark.parametrize(("share", "expected"), [(0.02, 0.1), (0.3, 0.3), (0.75, 0.75), (0.98, 0.9)])
    def test_a_mask_is_true_as_often_as_that_of_the_example(self, share: float, expected: float) -> None:
        model, (mask,) = integer_network("a mask alone", 0, 32)
        # One entry of a row is true at least, and one is not: rows of a hundred have room for shares.
        mask = torch.rand(32, 100) < share
        mask[:, :4] = torch.tensor([True, False, True, False])
        model.body = body(100).double()
        values = torch.cat([drawn for (drawn,) in batches(fxwidth.trace(model, mask))])
        told = min(max(float(mask.double().mean()), 0.1), 0.9)
        assert float(values.double().mean()) == pytest.approx(told, abs=0.02)
        assert told == pytest.approx(expected, abs=0.03)

    def test_the_range_of_what_is_looked_up_by_sums_is_guessed_within_the_table(self) -> None:
        for batch in (2, 4, 16):
            gm, (x,) = traced("columns in one table", 0, batch)
            values = torch.cat([drawn for (drawn,) in batches(gm)])
            assert bool((values.amin(0) <= x.amin(0)).all())
            assert bool((values.amax(0) >= x.amax(0)).all())
            assert int(values.min()) >= 0
            assert bool((values + torch.tensor([0, 10, 20])).max() < 30)

    def test_what_is_looked_up_by_products_takes_values_of_the_example(self) -> None:
        class Product(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table, self.body = nn.Embedding(60, 4), body(4)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(self.table(x * 3).sum(1))

        x = tokens(4)
        found = batches(fxwidth.trace(Product().double().eval(), x))
        assert all(bool((drawn[:, None] == x[None]).any(1).all()) for (drawn,) in found)
        assert any(bool((drawn[:, None] != x[None]).any(2).all(1).any()) for (drawn,) in found)

    def test_copies_of_a_graph_draw_the_same(self) -> None:
        gm, _ = traced("columns of counts", 0)
        assert all(
            torch.equal(*pair)
            for (one, two) in zip(batches(gm), batches(copy.deepcopy(gm)), strict=True)
            for pair in zip(one, two, strict=True)
        )

    def test_samples_of_the_users_inputs_are_written_to_no_file(self) -> None:
        gm, _ = traced("columns of counts", 0)
        assert len(notes_of(gm)[EXAMPLES])
        assert not len(notes_of(pickle.loads(pickle.dumps(gm)))[EXAMPLES])

    def test_noise_is_known_again_by_the_example_too(self) -> None:
        gm, (x,) = traced("columns of counts", 0)
        means = [noise_moments(fxwidth.analyze(gm, values)) for values in (x, 2 * x, x)]
        first, second, again = (next(iter(found.contracted.values())).mean for found in means if found is not None)
        assert not torch.equal(first, second)
        assert torch.equal(first, again)

    def test_the_random_states_stay(self) -> None:
        gm, _ = traced("tokens and padding", 0)
        before = torch.get_rng_state()
        fxwidth.resize(gm, {name: width - 1 for name, width in shrinkable(gm).items()})
        assert torch.equal(torch.get_rng_state(), before)


class TestSources:
    @pytest.mark.parametrize("shape", [(40, 6), (40, 1, 1, 5), (40, 2), (40, 6, 1)])
    @pytest.mark.parametrize("source", [Mask(), Mask(0.1), Mask(0.9)])
    def test_no_row_of_a_mask_is_all_true_or_all_false(self, source: Mask, shape: tuple[int, ...]) -> None:
        mask = source.drawn(shape, torch.Generator().manual_seed(0))
        rows = mask.flatten(1)
        assert mask.shape == shape
        assert bool((rows.any(1) & ~rows.all(1)).all())

    @pytest.mark.parametrize("kept", [False, True])
    @pytest.mark.parametrize("from_start", [False, True])
    def test_padding_is_at_one_end_and_of_all_lengths_but_the_whole(self, kept: bool, from_start: bool) -> None:
        rows = Padding(kept, from_start).drawn((200, 5), torch.Generator().manual_seed(0))
        lengths = (rows == kept).sum(1)
        assert lengths.unique().tolist() == [1, 2, 3, 4, 5]
        assert bool((rows[:, 0 if from_start else -1] == kept).all())
        assert bool(((rows[:, 1:] != rows[:, :-1]).sum(1) <= 1).all())

    @pytest.mark.parametrize(("entries", "bags"), [(18, 3), (3, 3), (2, 5), (1, 1), (9, 1), (0, 2)])
    @pytest.mark.parametrize("tells_end", [False, True])
    def test_offsets_begin_at_zero_and_rise(self, entries: int, bags: int, tells_end: bool) -> None:
        for seed in range(20):
            starts = Offsets(entries, tells_end).drawn((bags + tells_end,), torch.Generator().manual_seed(seed))
            sizes = torch.cat([starts[:bags], torch.tensor([entries])]).diff()
            assert int(starts[0]) == 0
            assert bool((sizes >= (1 if entries >= bags else 0)).all())
            assert not tells_end or int(starts[-1]) == entries

    def test_of_an_example_without_padding_padding_is_drawn_where_it_would_be(self) -> None:
        model, x = Masked().double().eval(), floats(4, 10)
        gm = fxwidth.trace(model, (x, torch.zeros(4, 10, dtype=torch.bool)))
        masks = torch.cat([batch[1] for batch in batches(gm)])
        assert not bool(masks[:, 0].any())
        assert bool(masks[:, 1:].any(0).all())


class TestResizes:
    @every_network
    def test_growing_and_shrinking_back_is_exact(self, name: str) -> None:
        for seed in range(SEEDS.get(name, 3)):
            gm, inputs = traced(name, seed)
            before = gm(*inputs)
            widths = shrinkable(gm)
            fxwidth.resize(gm, {group: width + 1 for group, width in widths.items()})
            fxwidth.resize(gm, widths)
            assert shrinkable(gm) == widths
            assert relative_difference(gm(*inputs), before) < 1e-9

    @every_network
    def test_a_channel_that_nobody_reads_goes_first(self, name: str) -> None:
        for seed in range(SEEDS.get(name, 2)):
            model, inputs = integer_network(name, seed)
            last = model.layer.linear2 if name == "attention and padding" else model.body[2]
            group = "layer.linear1" if name == "attention and padding" else "body.0"
            with torch.no_grad():
                last.weight[:, 3] = 0
            gm = fxwidth.trace(model, inputs)
            before = gm(*inputs)
            fxwidth.resize(gm, {group: fxwidth.analyze(gm)[group].width - 1})
            assert relative_difference(gm(*inputs), before) < 1e-9

    @every_network
    def test_halving_costs_about_as_much_as_with_data(self, name: str) -> None:
        network = INTEGER_NETWORKS[name]
        lost = {False: 0.0, True: 0.0}
        for seed in range(SEEDS.get(name, 3)):
            for with_data in lost:
                torch.manual_seed(seed)
                model = network.make().double().eval()
                gm = fxwidth.trace(model, network.inputs(16))
                data, inputs = [network.inputs(16) for _ in range(16)], [network.inputs(16) for _ in range(8)]
                with torch.no_grad():
                    before = torch.cat([gm(*one) for one in inputs])
                    widths = {group: width // 2 for group, width in shrinkable(gm).items()}
                    fxwidth.resize(gm, widths, data=data if with_data else None)
                    after = torch.cat([gm(*one) for one in inputs])
                lost[with_data] += float((after - before).norm() / (before - before.mean(0)).norm())
        assert lost[False] < 1.5 * lost[True]


class Ages(nn.Module):
    """Whole numbers that are reckoned with: nothing tells which there are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.double() / 7)


class TestNothingKnown:
    """Where no value but one is known, nothing is folded from it, and the report says so."""

    def resized(self, change: int) -> tuple[fx.GraphModule, float]:
        torch.manual_seed(0)
        gm = fxwidth.trace(Ages().double().eval(), torch.ones(4, 5, dtype=torch.long))
        x = torch.randint(0, 50, (64, 5))
        before = gm(x)
        if change > 0:
            fxwidth.resize(gm, {"body.0": 8 + change})
        fxwidth.resize(gm, {"body.0": min(8, 8 + change)})
        return gm, relative_difference(gm(x), before)

    def test_readers_are_not_refitted_and_the_record_says_why(self) -> None:
        gm, _ = self.resized(-4)
        told = fxwidth.report(gm).resizes[-1]["not_refitted"]
        assert list(told) == ["body.2.weight"]
        assert "it depends on input 'x' alone, of which it is not known what values there are" in told["body.2.weight"]

    def test_what_is_exact_is_still_done(self) -> None:
        assert self.resized(+2)[1] < 1e-12


class SilentNoise(Ages):
    """Draws numbers of which, so far, nothing comes through."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.double() / 7
        return self.body(x + torch.relu(torch.rand_like(x) - 2))


class BesidePair(Ages):
    def forward(self, pair: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return super().forward(x) * (pair[0] + pair[1])


class TestConstants:
    """What is the same in all noise, and who hears of nothing else."""

    def missed(self, model: nn.Module, *inputs: Any) -> dict[str, str]:
        torch.manual_seed(0)
        moments = moments_from_noise(fxwidth.analyze(fxwidth.trace(model.double().eval(), inputs)), work=1e6)
        assert moments is not None
        return {str(node): reason for node, reason in moments.missed.items()}

    def test_inputs_are_constant_if_all_samples_of_all_batches_are_alike(self) -> None:
        rows = {
            "alike": [torch.full((2, 3), 4), torch.full((3, 3), 4)],
            "by column": [torch.tensor([[1, 2], [1, 2]]), torch.tensor([[1, 2]])],
            "by batch": [torch.full((2, 3), 4), torch.full((2, 3), 5)],
            "in a batch": [torch.tensor([[1, 2], [1, 3]])] * 2,
            "numbers": [torch.ones(2, 3)] * 2,
            "a truth value": [torch.tensor(True)] * 2,
            "two truth values": [torch.tensor(True), torch.tensor(False)],
        }
        found = [list(batch) for batch in zip(*rows.values(), strict=True)]
        constant = [list(rows)[place] for place in sorted(constant_inputs(found))]
        assert constant == ["alike", "by column", "a truth value"]

    def test_readers_of_a_constant_alone_are_told_with_its_name(self) -> None:
        ones = torch.ones(4, 5, dtype=torch.long)
        assert all("depends on input 'x' alone" in reason for reason in self.missed(Ages(), ones).values())
        pair = floats(4, 3), floats(4, 3)
        missed = self.missed(BesidePair(), pair, ones)
        assert missed
        assert all("depends on input 'x' alone" in reason for reason in missed.values())

    def test_random_numbers_are_no_constant(self) -> None:
        assert not self.missed(SilentNoise(), torch.ones(4, 5, dtype=torch.long))


class TestBagsInData:
    """Entries of bags and where these begin go together: neither is cut without the other."""

    def test_more_data_than_are_wanted(self) -> None:
        gm, _ = traced("bags by offsets", 0)
        data = [INTEGER_NETWORKS["bags by offsets"].inputs(4) for _ in range(50)]
        moments = moments_from_data(fxwidth.analyze(gm), data, limit=100)
        assert moments is not None
        assert moments.samples == 5 * 24

    def test_bags_of_one_entry_each(self) -> None:
        model, _ = integer_network("bags by offsets", 0)
        entries, starts = tokens(4, 1).flatten(), torch.arange(4)
        gm = fxwidth.trace(model, (entries, starts))
        data = [(tokens(4, 1).flatten(), torch.arange(4)) for _ in range(20)]
        graph = fxwidth.analyze(gm)
        found, wanted = (
            moments_from_data(graph, data),
            torch.cat([model.get_submodule("bag")(*batch) for batch in data]),
        )
        assert found is not None
        seen = {len(moment.mean): moment.mean for moment in found.contracted.values()}
        torch.testing.assert_close(
            seen[8], torch.relu(model.get_submodule("body.0")(wanted)).mean(0), rtol=1e-9, atol=1e-9
        )


def test_masks_that_leave_nothing_over_are_given_up() -> None:
    class FirstKept(nn.Module):
        """A softmax over the first entry alone, which is never masked in what the network is given."""

        def __init__(self) -> None:
            super().__init__()
            self.body = body(6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            first = x[:, :1].masked_fill(mask[:, :1], -torch.inf).softmax(1)
            return self.body(x.masked_fill(mask, 0.0) * first)

    gm = fxwidth.trace(FirstKept().double().eval(), (floats(4, 6), torch.zeros(4, 6, dtype=torch.bool)))
    notes_of(gm).pop(EXAMPLES)
    assert not bool(gm(*batches(gm)[0]).isfinite().all())
    moments = moments_from_noise(fxwidth.analyze(gm), work=1e6)
    assert moments is not None
    assert not moments.missed
