"""What stands in new slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.directions import Direction, orthogonal_directions
from fxwidth.growth.new_entries import new_entries
from tests.oracles.growth import check_together, grown_maps, grown_parameters, sequence, width_graph
from tests.zoo.models import build


def grown(wg: WidthGraph, name: str, more: int) -> dict[str, Tensor]:
    return grown_parameters(wg, grown_maps(wg, {wg[name]: wg[name].width + more}))


def test_new_rows_are_orthogonal_to_the_present_ones_and_alike_in_size() -> None:
    wg = width_graph(nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)), sequence(2, 9))
    weight = grown(wg, "0", 3)["0.weight"]
    old, new = weight[:4], weight[4:]
    assert (new @ old.T).abs().max() < 1e-12
    torch.testing.assert_close(new @ new.T, torch.eye(3, dtype=torch.float64) * old.norm(dim=1).mean() ** 2)
    assert not grown(wg, "0", 3)["2.weight"][:, 4:].any()
    assert not grown(wg, "0", 3)["0.bias"][4:].any()


def test_new_entries_are_the_same_every_time() -> None:
    wg = width_graph(nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)), sequence(2, 9))
    torch.manual_seed(1)
    first = grown(wg, "0", 3)
    torch.manual_seed(2)
    assert all(torch.equal(tensor, first[name]) for name, tensor in grown(wg, "0", 3).items())


@pytest.mark.parametrize(("rows", "columns", "rank", "count"), [(3, 8, 3, 4), (3, 4, 3, 5), (9, 4, 4, 3), (9, 6, 2, 3)])
def test_directions_leave_the_row_space_while_there_is_room(rows: int, columns: int, rank: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    present = left @ right
    made = orthogonal_directions(present, count, generator)
    assert made.shape == (count, columns)
    size = present.norm(dim=1).mean()
    torch.testing.assert_close(made.norm(dim=1), size.expand(count))
    room = min(count, columns - rank)
    assert torch.count_nonzero((made[:room] @ present.T).abs() > 1e-4 * size**2) == 0


def test_directions_beside_rows_of_zeros_have_norm_one() -> None:
    made = orthogonal_directions(torch.zeros(2, 5), 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.norm(dim=1), torch.ones(2))


class OneChannelOfImages(nn.Module):
    """A convolution of each copy of the input with a number of its own: those of all copies are one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x.unsqueeze(1).expand(-1, 3, -1), self.weight.view(3, 1, 1), groups=3)
        return self.out(x.mean(-1))


@pytest.mark.parametrize("directions", ["orthogonal", "random", lambda rows, count, _: rows[:count] * 2])
def test_vectors_grow_by_numbers(directions: Direction) -> None:
    """Each channel of a vector is a row of one number, and nothing is orthogonal to it."""
    x = sequence(2, 5)
    gm = fxwidth.trace(OneChannelOfImages().double(), x)
    expected = gm(x)
    fxwidth.resize(gm, {"weight": 5}, directions=directions)
    torch.testing.assert_close(gm(x), expected)
    old, new = gm.get_parameter("weight").detach().split([3, 2])
    assert old.tolist() == [1, -2, 3]
    if directions == "orthogonal":
        torch.testing.assert_close(new.abs(), torch.full_like(new, 2))  # the mean length
    elif callable(directions):
        assert new.tolist() == [2, -4]
    assert new.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_new_entries_have_the_dtype_of_the_parameter(dtype: torch.dtype) -> None:
    wg = width_graph(nn.Sequential(nn.Linear(9, 4), nn.LayerNorm(4), nn.Linear(4, 2)), sequence(2, 9))
    wg.analysis.module.to(dtype)
    parameters = grown(wg, "0", 3)
    assert {tensor.dtype for tensor in parameters.values()} == {dtype}
    mean = parameters["0.weight"][:4].double().mean(0)
    torch.testing.assert_close(parameters["0.weight"][4:].double(), mean.expand(3, -1), rtol=1e-2, atol=1e-3)


def test_where_new_rows_and_new_columns_cross_there_is_nothing() -> None:
    x = sequence(2, 3, 6, 6)
    wg = width_graph(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)), x)
    maps = grown_maps(wg, {group: group.width + 2 for group in wg.free})
    assert not grown_parameters(wg, maps)["1.weight"][8:, 8:].any()


def test_parameters_without_values_get_shapes_alone() -> None:
    wg = width_graph(nn.Sequential(nn.Linear(9, 4), nn.LayerNorm(4), nn.Linear(4, 2)), sequence(2, 9))
    maps = grown_maps(wg, {wg["0"]: 7})
    assert new_entries(wg.analysis, wg.growths(maps), maps, "0.weight", torch.empty(7, 9, device="meta")).shape == (
        7,
        9,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["seed_resnet", "vit", "rms_transformer"])
def test_growth_on_cuda(name: str) -> None:
    model, x = build(name)
    wg = width_graph(model.cuda(), x.cuda())
    check_together(wg, x.cuda())
    maps = grown_maps(wg, {group: group.width + 2 for group in wg.free})
    assert all(tensor.is_cuda for tensor in grown_parameters(wg, maps).values())
