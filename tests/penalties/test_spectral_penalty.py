"""The penalty of a graph's own groups: its values, its gradients, and that it is of the graph as it is now."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from fxwidth.recording.graph_meta import NOTES
from fxwidth.weights.writers import writers_of
from tests.penalties.networks import ALL, made
from tests.zoo.nets import conv

by_network = pytest.mark.parametrize("name", ALL)
KINDS: dict[str, dict[str, Any]] = {
    "l1": {"orthogonality": 0},
    "hoyer": {"sparsity": "hoyer"},
    "orthogonality": {"sparsity": None},
    "group_lasso": {"kind": "group_lasso"},
    "batch_norm": {"kind": "batch_norm"},
}


def by_spectra(gm: fx.GraphModule, sparsity: str = "l1") -> float:
    """Return the sparsity of all groups by their spectra."""
    graph, result = fxwidth.analyze(gm), 0.0
    for name, found in fxwidth.spectrum(graph).items():
        if writers_of(graph, graph[name]):
            values = np.array(found.singular_values)
            result += values.sum() / (1 if sparsity == "l1" else np.sqrt((values**2).sum()))
    return result


@by_network
@pytest.mark.parametrize("sparsity", ["l1", "hoyer"])
def test_it_is_the_sum_over_spectra(name: str, sparsity: str) -> None:
    gm, _ = made(name)
    found = fxwidth.spectral_penalty(gm, sparsity=sparsity, orthogonality=0)
    assert found.shape == ()
    assert float(found.detach()) == pytest.approx(by_spectra(gm, sparsity), rel=1e-9)


def test_orthogonality_by_hand() -> None:
    gm, _ = made("conv")
    scale = gm.get_parameter("3.weight") * (gm.get_buffer("3.running_var") + 1e-5).rsqrt()
    rows = gm.get_parameter("2.weight").flatten(1) * scale[:, None]
    gram = rows @ rows.T
    off = gram - torch.diag(gram.diagonal())
    expected = 0.7 * 8 * off.square().sum() / gram.square().sum()
    torch.testing.assert_close(fxwidth.spectral_penalty(gm, sparsity=None, orthogonality=0.7, only="2"), expected)


def test_channel_norms_by_hand() -> None:
    gm, _ = made("conv")
    first, second, third, head = (gm.get_parameter(f"{i}.weight") for i in (0, 2, 5, 8))
    rows = [
        torch.cat([first.flatten(1), second.transpose(0, 1).flatten(1)], 1),
        torch.cat([second.flatten(1), third.transpose(0, 1).flatten(1)], 1),
        torch.cat([third.flatten(1), head.unflatten(1, (5, 4)).transpose(0, 1).flatten(1)], 1),
    ]
    expected = sum(torch.linalg.vector_norm(one, dim=1).sum() for one in rows)
    torch.testing.assert_close(fxwidth.spectral_penalty(gm, kind="group_lasso"), expected)
    gains = gm.get_parameter("3.weight").abs().sum()
    torch.testing.assert_close(fxwidth.spectral_penalty(gm, kind="batch_norm"), gains)


def test_channel_norms_are_of_normed_weights() -> None:
    gm, _ = made("normed")
    norm = "parametrizations.weight"
    first = torch._weight_norm(gm.get_parameter(f"0.{norm}.original1"), gm.get_parameter(f"0.{norm}.original0"), 0)
    second = gm.get_parameter(f"2.{norm}.original")
    second = second / (gm.get_buffer(f"2.{norm}.0._u") @ second @ gm.get_buffer(f"2.{norm}.0._v"))
    expected = torch.linalg.vector_norm(torch.cat([first, second.T], 1), dim=1).sum()
    torch.testing.assert_close(fxwidth.spectral_penalty(gm, kind="group_lasso", only="0*"), expected)


@by_network
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_differences(name: str, kind: str) -> None:
    gm, _ = made(name)
    if kind == "batch_norm" and name != "conv":
        with pytest.raises(FxwidthError, match="penalises the gains of batch norms, but there are none in the groups"):
            fxwidth.spectral_penalty(gm, **KINDS[kind])
        return
    fxwidth.spectral_penalty(gm, **KINDS[kind]).backward()
    generator = torch.Generator().manual_seed(0)
    found, eps = 0.0, 1e-6
    moves = {p: torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in gm.parameters()}
    for parameter, move in moves.items():
        found += 0 if parameter.grad is None else float((parameter.grad * move).sum())
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, move in moves.items():
                parameter += sign * eps * move
            values.append(float(fxwidth.spectral_penalty(gm, **KINDS[kind])))
    assert found == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [[1], [1, 3, 4], slice(None)], ids=["one", "several", "all"])
def test_gradients_are_finite_where_channels_have_gone(kind: str, places: Any) -> None:
    gm, _ = made("conv")
    with torch.no_grad():
        for name in ("2.weight", "3.weight", "5.weight", "8.weight"):
            gm.get_parameter(name)[places if name != "8.weight" else slice(None)] = 0
        gm.get_parameter("0.weight")[2] = gm.get_parameter("0.weight")[3]
    found = fxwidth.spectral_penalty(gm, **KINDS[kind])
    found.backward()
    assert found.isfinite()
    gradients = [parameter.grad for parameter in gm.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@by_network
def test_every_writer_gets_a_gradient(name: str) -> None:
    gm, _ = made(name)
    graph = fxwidth.analyze(gm)
    fxwidth.spectral_penalty(gm).backward()
    reached = {name for name, parameter in gm.named_parameters() if parameter.grad is not None}
    wanted = {w.weight for group in graph.free for w in writers_of(graph, group) if isinstance(w.weight, str)}
    extra = {
        "conv": {"3.weight"},
        "normed": {"0.parametrizations.weight.original0", "4.weight_orig"},
        "low-rank update": {"a", "b", "weight"},
    }
    assert wanted | extra.get(name, set()) == reached


@by_network
def test_it_changes_nothing_and_is_the_same_in_both_modes(name: str) -> None:
    gm, _ = made(name)
    before = _saved(gm)
    state = torch.get_rng_state()
    values = []
    for mode in (False, True, False):
        gm.train(mode)
        values.append(fxwidth.spectral_penalty(gm).detach())
        assert all(part.training is mode for part in gm.modules() if type(part) in (nn.BatchNorm2d, nn.Linear))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert _saved(gm) == before


def _saved(gm: fx.GraphModule) -> tuple[bytes, ...]:
    """Return all that a file would hold of a graph but its code, and what is set on its modules."""
    notes = pickle.dumps({name: gm.meta[name] for name in NOTES if name in gm.meta})
    attributes = repr([sorted(vars(part)) for part in gm.modules()])
    return notes, attributes.encode(), *(tensor.numpy().tobytes() for tensor in gm.state_dict().values())


@by_network
def test_after_a_resize_it_is_that_of_the_new_groups(name: str) -> None:
    gm, _ = made(name)
    fxwidth.spectral_penalty(gm)
    graph = fxwidth.analyze(gm)
    for plan in (
        {group.name: max(group.width - 1, group.least.width) for group in graph.free},
        {group.name: group.width + 1 for group in graph.free if group.inexact_growth is None},
    ):
        gm.zero_grad()
        fxwidth.resize(gm, plan)
        found = fxwidth.spectral_penalty(gm, orthogonality=0)
        assert float(found.detach()) == pytest.approx(by_spectra(gm), rel=1e-9)
        found.backward()
        assert any(parameter.grad is not None for parameter in gm.parameters())


def test_a_resize_lets_go_of_what_was_before() -> None:
    gm, x = made("conv")
    fxwidth.spectral_penalty(gm)
    old = weakref.ref(gm.get_parameter("2.weight"))
    fxwidth.resize(gm, {"2": 5}, data=[x])
    gc.collect()
    assert old() is None
    fxwidth.spectral_penalty(gm)
    last = weakref.ref(gm)
    del gm
    gc.collect()
    assert last() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_a_copy_has_its_own(copied: Any) -> None:
    gm, _ = made("tile")
    value = fxwidth.spectral_penalty(gm)
    other = copied(gm)
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.zero_()
    found = fxwidth.spectral_penalty(other)
    torch.testing.assert_close(found, value, rtol=1e-12, atol=0)
    found.backward()
    assert all(parameter.grad is None for parameter in gm.parameters())
    assert any(parameter.grad is not None for parameter in other.parameters())


def test_a_graph_of_another_module_is_not_taken_for_it() -> None:
    gm, _ = made("conv")
    value = float(fxwidth.spectral_penalty(gm).detach())
    twin = fx.GraphModule(copy.deepcopy(gm), gm.graph)
    twin.meta.update(gm.meta)
    with torch.no_grad():
        twin.get_parameter("2.weight").mul_(2)
    assert float(fxwidth.spectral_penalty(twin).detach()) > value
    assert float(fxwidth.spectral_penalty(gm).detach()) == value


def test_it_follows_other_parameters_and_dtypes() -> None:
    gm, _ = made("conv")
    value = fxwidth.spectral_penalty(gm)
    gm.get_submodule("2").weight = nn.Parameter(2 * gm.get_parameter("2.weight").detach())
    other = fxwidth.spectral_penalty(gm, orthogonality=0, only="2")
    torch.testing.assert_close(other, torch.linalg.svdvals(_scaled(gm)).sum())
    gm.get_submodule("2").weight = nn.Parameter(gm.get_parameter("2.weight").detach() / 2)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        gm.to(dtype)
        found = fxwidth.spectral_penalty(gm)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), value, rtol=tolerance, atol=0)
        gm.zero_grad()
        found.backward()
        gradient = gm.get_parameter("2.weight").grad
        assert gradient is not None
        assert gradient.dtype == dtype


def _scaled(gm: fx.GraphModule) -> Tensor:
    scale = gm.get_parameter("3.weight") * (gm.get_buffer("3.running_var") + 1e-5).rsqrt()
    return gm.get_parameter("2.weight").flatten(1) * scale[:, None]


def test_autocast_does_not_reach_it() -> None:
    gm, x = made("conv")
    fxwidth.analyze(gm.float(), x[:4].float())
    value = fxwidth.spectral_penalty(gm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fxwidth.spectral_penalty(gm)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(inside, value)


def test_without_values_there_is_no_value() -> None:
    with torch.device("meta"):
        model = conv()
    gm = fxwidth.trace(model.eval(), torch.empty(4, 1, 8, 8, device="meta"))
    for kind in KINDS.values():
        assert fxwidth.spectral_penalty(gm, **kind).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv", "packed attention", "normed"])
def test_on_a_gpu(name: str) -> None:
    gm, x = made(name)
    kinds = [kind for kind in KINDS.values() if kind.get("kind") != "batch_norm" or name == "conv"]
    before = [fxwidth.spectral_penalty(gm, **kind) for kind in kinds]
    fxwidth.analyze(gm.cuda(), x[:4].cuda())
    for kind, value in zip(kinds, before, strict=True):
        found = fxwidth.spectral_penalty(gm, **kind)
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), value, rtol=1e-9, atol=0)
        found.backward()


def test_groups_are_chosen_by_name() -> None:
    gm, _ = made("conv")
    parts = [fxwidth.spectral_penalty(gm, only=name) for name in ("0", "2", "5")]
    torch.testing.assert_close(fxwidth.spectral_penalty(gm), torch.stack(parts).sum())
    torch.testing.assert_close(fxwidth.spectral_penalty(gm, keep=["0", "5"]), parts[1])
    torch.testing.assert_close(fxwidth.spectral_penalty(gm, only="[02]", keep="0"), parts[1])


def test_where_no_group_is_free_it_is_zero() -> None:
    gm = fxwidth.trace(nn.Linear(3, 2).double(), torch.randn(2, 3).double())
    for kind in KINDS.values():
        assert float(0.1 * fxwidth.spectral_penalty(gm, **kind)) == 0


class TestBadInput:
    """Each is told of by what was given and what helps."""

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"kind": "lasso"}, "kind='lasso' is none of 'spectral', 'group_lasso', 'batch_norm'"),
            ({"sparsity": "l2"}, "sparsity='l2' must be"),
            ({"orthogonality": -1}, "orthogonality=-1 must be a number of at least 0"),
            ({"orthogonality": float("nan")}, "orthogonality=nan must be"),
            ({"orthogonality": True}, "orthogonality=True must be"),
            ({"sparsity": None, "orthogonality": 0}, "leave nothing to penalise; give one"),
            ({"kind": "group_lasso", "sparsity": "hoyer"}, "kind='group_lasso' ignores them"),
            ({"kind": "batch_norm", "orthogonality": 1}, "kind='batch_norm' ignores them"),
            ({"only": "9*"}, r"only='9\*' matches no group"),
            ({"keep": 3}, "keep= takes names or patterns of groups, or modules, but received 3"),
            ({"only": "2", "keep": "2"}, "leaves no group that may change"),
            ({"kind": "batch_norm", "only": "0"}, "there are none in the groups '0'; choose another kind"),
        ],
    )
    def test_options(self, options: dict[str, Any], told: str) -> None:
        gm, _ = made("conv")
        with pytest.raises(FxwidthError, match=told):
            fxwidth.spectral_penalty(gm, **options)

    def test_what_is_no_graph(self) -> None:
        gm, _ = made("conv")
        with pytest.raises(FxwidthError, match=r"received Sequential; pass what fxwidth\.trace returns"):
            fxwidth.spectral_penalty(conv())  # type: ignore[arg-type]
        with pytest.raises(FxwidthError, match="received DataParallel; pass the graph in it, its attribute module"):
            fxwidth.spectral_penalty(nn.DataParallel(gm))  # type: ignore[arg-type]
        with pytest.raises(FxwidthError, match="example_inputs"):
            fxwidth.spectral_penalty(fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Flatten())))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, value: float) -> None:
        gm, _ = made("conv")
        with torch.no_grad():
            gm.get_parameter("2.weight")[1] = value
        with pytest.raises(FxwidthError, match="the weights that write group '2' have no singular values"):
            fxwidth.spectral_penalty(gm)
        fxwidth.spectral_penalty(gm, keep="2").backward()


class TestTraining:
    """A network of a few hundred parameters that tells classes made by a smaller one."""

    @staticmethod
    def _data(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(256, 12, generator=generator, dtype=torch.float64)
        first, second = (torch.randn(4, size, generator=generator, dtype=torch.float64) for size in (12, 4))
        return x, ((x @ first.T).tanh() @ second[:3].T).argmax(1)

    @staticmethod
    def _network(seed: int, x: Tensor) -> fx.GraphModule:
        torch.manual_seed(seed)
        layers = [nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)]
        return fxwidth.trace(nn.Sequential(*layers).double(), x[:4])

    def _trained(self, seed: int, factor: float, every: int, **options: Any) -> tuple[list[float], float]:
        """Return the effective ranks after training, and what the loss rises by at a fifth of the parameters."""
        x, y = self._data(seed)
        gm = self._network(seed, x)
        optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
        for step in range(250):
            loss = nn.functional.cross_entropy(gm(x), y)
            if factor and step % every == 0:
                loss = loss + every * factor * fxwidth.spectral_penalty(gm, **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ranks = [one.effective_rank or 0.0 for one in fxwidth.spectrum(fxwidth.analyze(gm)).values()]
        with torch.no_grad():
            before = float(nn.functional.cross_entropy(gm(x), y))
            fxwidth.resize(gm, fxwidth.plan(fxwidth.analyze(gm), params=0.2, data=[x]), data=[x])
            return ranks, float(nn.functional.cross_entropy(gm(x), y)) - before

    @pytest.mark.parametrize(
        ("factor", "options"),
        [(1e-3, {}), (1e-2, {"sparsity": "hoyer"}), (2e-3, {"kind": "group_lasso"})],
    )
    def test_less_is_lost_in_a_resize(self, factor: float, options: dict[str, Any]) -> None:
        plain, with_it = ([self._trained(seed, f, 5, **options) for seed in range(3)] for f in (0.0, factor))
        for (ranks, _), (lower, _) in zip(plain, with_it, strict=True):
            assert all(one < other for one, other in zip(lower, ranks, strict=True))
        assert sum(lost for _, lost in with_it) < 0.5 * sum(lost for _, lost in plain)

    def test_beside_an_evolver(self) -> None:
        x, y = self._data(0)
        gm = self._network(0, x)
        optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
        evolver = fxwidth.Evolver(gm, optimizer, every=10, rounds=3, params=0.3)
        for step in range(40):
            loss = nn.functional.cross_entropy(gm(x), y)
            if step % 3 == 0:
                found = fxwidth.spectral_penalty(gm, orthogonality=0)
                assert float(found.detach()) == pytest.approx(by_spectra(gm), rel=1e-9)
                loss = loss + 1e-3 * found
            optimizer.zero_grad()
            loss.backward()
            assert all(parameter.grad is not None for parameter in gm.parameters())
            optimizer.step()
            evolver.step(x)
        assert evolver.finished
