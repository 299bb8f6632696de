"""Models whose ops depend on values and on how many samples there are: what data tell is found on the tape again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.errors import FxwidthError
from fxwidth.importance.estimates import gather_evidence
from fxwidth.importance.plan_simulation import Rehearsals, _outputs
from fxwidth.statistics.calibration_data import batches_from
from fxwidth.statistics.moments import Moments, moments_from_data
from fxwidth.weights.readers import wiring_of


class Detector(nn.Module):
    """Looks for what is bright in each of a list of images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
        self.head = nn.Conv2d(5, 4, 1)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        batch = torch.stack([(image - image.mean()) / (image.std() + 1) for image in images])
        features = torch.relu(self.second(torch.relu(self.norm(self.first(batch)))))
        found = []
        for places, classes in zip(features.flatten(2), self.head(features).flatten(2), strict=True):
            bright = places.sum(0) > places.sum(0).mean()
            if bright.any():
                found.append(classes.T[bright])
        return found


class Pieces(nn.Module):
    """Looks at each of a list of images by itself, and at the first of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 1)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        features = [self.first(image[None]) for image in images]
        result = self.third(self.second(features[0]).relu())
        return [result[:, :, :2]] if result.sum() > 0 else [result]


def images(count: int) -> list[Tensor]:
    return [torch.rand(3, 8, 8, dtype=torch.float64) for _ in range(count)]


def moments_of(gm: torch.fx.GraphModule, data: list[object]) -> tuple[fxwidth.WidthGraph, Moments]:
    wg = fxwidth.analyze(gm)
    moments = moments_from_data(wg, data)
    assert moments is not None
    return wg, moments


def means(wg: fxwidth.WidthGraph, moments: Moments) -> dict[str, Tensor]:
    """Return the means of what the layers read, by the names of their weights."""
    known = [(one.view.parameter, moments.of(one)) for one in wiring_of(wg).readers if one.view is not None]
    return {name: moment.mean for name, moment in known if moment is not None}


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().double().eval()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_readers_see_lists_of_any_length(count: int, detector: Detector) -> None:
    gm = fxwidth.trace(detector, (images(2),))
    data = [(images(count),) for _ in range(3)]
    seen: dict[str, list[Tensor]] = {}
    for name in ("second", "head"):
        layer = detector.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(f"{name}.weight", []).append(inputs[0])
        )
    wg, moments = moments_of(gm, data)
    seen.clear()
    for (batch,) in data:
        detector(batch)
    assert moments.samples == 3 * count
    assert not moments.missed
    found = means(wg, moments)
    for name, values in seen.items():
        rows = torch.cat([one.movedim(1, -1).flatten(0, -2) for one in values])
        torch.testing.assert_close(found[name], rows.mean(0))


def test_lists_are_never_cut(detector: Detector) -> None:
    wg = fxwidth.analyze(fxwidth.trace(detector, (images(2),)))
    # As many images as an image has channels, so that the one could be taken for the other.
    seen = list(batches_from(wg.analysis, [(images(3),)] * 4, 5))
    assert [len(batch[0]) for batch in seen] == [3, 3]
    assert all(len(image) == 3 for batch in seen for image in batch[0])


def test_outputs_of_other_lengths_are_not_compared(detector: Detector) -> None:
    wg = fxwidth.analyze(fxwidth.trace(detector, (images(2),)))
    evidence = gather_evidence(wg, None)
    plans = [dict.fromkeys(wg.free, width) for width in (1, 2, 4)]
    lengths = {tuple(map(len, _outputs(evidence, plan))) for plan in ({}, *plans)}
    assert len(lengths) > 1
    alone = Rehearsals(evidence).output_errors([{}])
    assert alone == [0.0]
    assert all(error >= 0 for error in Rehearsals(evidence).output_errors(plans))


@pytest.mark.parametrize("data", [None, 4])
def test_a_plan_tells_of_data_and_does_not_compare_other_boxes(data: int | None, detector: Detector) -> None:
    wg = fxwidth.analyze(fxwidth.trace(detector, (images(2),)))
    batches = None if data is None else [(images(data),) for _ in range(4)]
    plan = fxwidth.plan(wg, params=0.6, data=batches)
    gm = fxwidth.resize(wg.analysis.module, plan, data=batches)
    assert plan
    assert all(tensor.shape[1] == 4 for tensor in gm(images(3)))
    assert plan.notes["error"] > 0


def test_an_op_is_found_by_the_parameters_that_it_takes() -> None:
    torch.manual_seed(0)
    model = Pieces().double().eval()
    gm = fxwidth.trace(model, (images(2),))
    one = images(1)
    wg, moments = moments_of(gm, [(one,)])
    found = means(wg, moments)
    torch.testing.assert_close(found["second.weight"], model.first(one[0][None]).mean((0, 2, 3)))
    torch.testing.assert_close(found["third.weight"], model.second(model.first(one[0][None])).relu().mean((0, 2, 3)))


def test_data_that_show_nothing_are_refused() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

        def forward(self, rows: list[Tensor]) -> Tensor:
            if len(rows) > 2:
                return rows[0]
            result = self.layers(torch.stack(rows))
            return result if result.sum() > 0 else result[0]

    torch.manual_seed(0)
    rows = [torch.randn(4, dtype=torch.float64) for _ in range(3)]
    wg = fxwidth.analyze(fxwidth.trace(Switch().double(), (rows[:2],)))
    with pytest.raises(FxwidthError, match=r"other ops.*analyze"):
        fxwidth.plan(wg, params=0.7, data=[(rows,)])


class Halfway(nn.Module):
    """Goes through all its layers for two rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.third, self.norm, self.fourth = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, rows: list[Tensor]) -> Tensor:
        result = self.second(self.first(torch.stack(rows)).relu())
        if len(rows) == 2:
            result = self.fourth(self.norm(self.third(result)).relu())
        return result if result.sum() > 0 else result[0]


def test_what_data_do_not_show_is_told_by_noise() -> None:
    torch.manual_seed(0)
    wg = fxwidth.analyze(fxwidth.trace(Halfway().double().eval(), ([torch.randn(4).double() for _ in range(2)],)))
    data = [([torch.randn(4).double() for _ in range(3)],) for _ in range(200)]
    measured, free, both = moments_from_data(wg, data), gather_evidence(wg, None), gather_evidence(wg, data)
    assert measured is not None
    assert free.moments is not None
    assert both.moments is not None
    known = {"second.weight"}
    assert set(means(wg, measured)) == known
    assert means(wg, both.moments).keys() == means(wg, free.moments).keys() > known
    assert both.moments.deviations.keys() == free.moments.deviations.keys() > measured.deviations.keys()
    shown, unseen = wg["first"], wg["third"]
    assert both.source(unseen) == "data and noise"
    assert both.errors(unseen).tolist() == free.errors(unseen).tolist()
    assert both.errors(shown).tolist() == gather_evidence(wg, data).errors(shown).tolist()
    assert both.errors(shown).tolist() != free.errors(shown).tolist()
    fxwidth.resize(wg.analysis.module, {"third": 4}, data=data)
    assert fxwidth.report(wg.analysis.module).resizes[-1]["not_refitted"] == {}
