"""Files: what is loaded computes what was saved, to the bit, after any history; a failed save leaves the old file."""

from __future__ import annotations

import copy
import errno
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError
from tests.oracles import files
from tests.serialization.earlier_form import earlier_texts, tensors_in, write_earlier
from tests.zoo.models import RMSTransformer, set_apart


class Stream(nn.Module):
    """A residual stream of a norm and a block, with attention over the rows of a sequence."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 12) -> None:
        super().__init__()
        self.embed, self.norm_1, self.norm_2 = nn.Linear(6, width), norm(width), norm(width)
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.up, self.down, self.head = nn.Linear(width, 20), nn.Linear(20, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.down(nn.functional.gelu(self.up(self.norm_2(x)))))


class Convolutions(nn.Module):
    """Convolutions with batch norm, group norm and weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3, padding=1)
        self.gn = nn.GroupNorm(4, 16)
        self.c = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 10, 1))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.gn(self.b(torch.relu(self.bn(self.a(x))))))
        return self.head(torch.relu(self.c(x)).mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: Stream(nn.LayerNorm), (5, 4, 6)),
    "rms norm": (lambda: Stream(nn.RMSNorm), (5, 4, 6)),
    "attention in the open": (RMSTransformer, (5, 4, 10)),
    "convolutions": (Convolutions, (5, 3, 6, 6)),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    return set_apart(make()).double().eval(), torch.randn(shape, dtype=torch.float64)


def resized_at_random(gm: fx.GraphModule, x: Tensor, choices: random.Random, count: int) -> None:
    """Shrink and grow some groups again and again, exactly or not, with data or without."""
    for step in range(count):
        groups = fxwidth.analyze(gm).free
        plan = {
            group.name: max(2, group.width + choices.choice([-3, -2, -1, 1, 2]))
            for group in choices.sample(groups, choices.randint(1, min(3, len(groups))))
        }
        # Small activations, for which the eps of norms matters.
        data = [x * 1e-2] if step % 2 else None
        drops = any(width < fxwidth.analyze(gm)[name].width for name, width in plan.items())
        fxwidth.resize(gm, plan, data=data if drops else None, exact=False)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETWORKS)
def test_any_history_comes_back_to_the_bit(tmp_path: Path, name: str, seed: int) -> None:
    model, x = network(name)
    gm = fxwidth.trace(model, x)
    resized_at_random(gm, x, random.Random(seed), 3)
    files: list[tuple[str, nn.Module | None]] = [("a.safetensors", network(name)[0])]
    # torch does not pickle modules with parametrizations.
    files += [("a.fx", None)] if name != "convolutions" else []
    for file, fresh in files:
        fxwidth.save(gm, tmp_path / file)
        again = fxwidth.load(tmp_path / file, fresh, x) if fresh else fxwidth.load(tmp_path / file, trusted=True)
        for batch in (x, x[:2] * 1e-3):
            assert torch.equal(again.eval()(batch), gm(batch))
        assert {n: t.shape for n, t in again.named_parameters()} == {n: t.shape for n, t in gm.named_parameters()}


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5], 6])
def test_a_variance_that_stays_comes_back_too(
    tmp_path: Path, norm: Callable[[int], nn.Module], kept: int | list[int]
) -> None:
    """Of exact copies one each is kept: the norm sees the variance it saw, though half as many channels."""

    def copied() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), norm(12), nn.Linear(12, 3)).double().eval()
        with torch.no_grad():
            model[0].weight[6:], model[0].bias[6:] = model[0].weight[:6], model[0].bias[:6]
        return model

    x = torch.randn(5, 6, dtype=torch.float64) * 1e-2
    gm = fxwidth.trace(copied(), x)
    fxwidth.resize(gm, {"0": kept})
    fxwidth.save(gm, tmp_path / "a.safetensors")
    again = fxwidth.load(tmp_path / "a.safetensors", copied(), x)
    assert torch.equal(again(x), gm(x))
    assert again.get_submodule("1").eps == gm.get_submodule("1").eps


def test_without_the_scales_of_norms_outputs_would_differ(tmp_path: Path) -> None:
    """Planted fault: a file as it was written before they were noted. It still loads."""
    model, x = network("layer norm")
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, {"embed": 7}, data=[x * 1e-2])
    fxwidth.save(gm, tmp_path / "new.safetensors")
    old = {"fxwidth.resizes": earlier_texts(tmp_path / "new.safetensors")["fxwidth.resizes"]}
    assert json.loads(old["fxwidth.resizes"]) == [{"embed": 7}]
    write_earlier(tmp_path / "old.safetensors", tensors_in(tmp_path / "new.safetensors"), old)
    again = fxwidth.load(tmp_path / "old.safetensors", network("layer norm")[0], x)
    assert again.norm_1.normalized_shape == (7,)
    assert not torch.equal(again(x * 1e-3), gm(x * 1e-3))


@pytest.mark.parametrize("file", ["a.safetensors", "a.fx"])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("layer norm")
    gm = fxwidth.trace(model, x)
    fxwidth.save(gm, tmp_path / file)
    before = (tmp_path / file).read_bytes()

    def full(value: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("fxwidth.serialization.tensor_files.save_file", full)
    monkeypatch.setattr("fxwidth.checkpoint.saving.torch.save", full)
    with pytest.raises(FxwidthError, match=r"cannot be written \(.*no space left on device\); make room"):
        fxwidth.save(gm, tmp_path / file)
    assert (tmp_path / file).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_saving_follows_links_and_keeps_permissions(tmp_path: Path) -> None:
    model, x = network("layer norm")
    gm = fxwidth.trace(model, x)
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.safetensors", tmp_path / "link.safetensors"
    fxwidth.save(gm, target)
    target.chmod(0o640)
    link.symlink_to(target)
    fxwidth.resize(gm, {"embed": 7})
    fxwidth.save(gm, link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert torch.equal(fxwidth.load(target, network("layer norm")[0], x)(x), gm(x))


def pickled(gm: fx.GraphModule) -> fx.GraphModule:
    return pickle.loads(pickle.dumps(gm))


@pytest.mark.parametrize(
    "copied", [pickled, copy.deepcopy, lambda gm: pickled(copy.deepcopy(gm)), lambda gm: pickled(pickled(gm))]
)
def test_notes_survive_pickling_and_copying(copied: Callable[[fx.GraphModule], fx.GraphModule]) -> None:
    model, x = network("attention in the open")
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, {"gate": 20})
    again = copied(gm)
    assert fxwidth.report(again).resizes == fxwidth.report(gm).resizes
    assert str(fxwidth.analyze(again)) == str(fxwidth.analyze(gm))
    fxwidth.resize(again, {"gate": 10})
    assert len(fxwidth.report(again).resizes) == 2
    assert len(fxwidth.report(gm).resizes) == 1


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    model, x = network("layer norm")
    gm = fxwidth.trace(model, x)
    with pytest.raises(FxwidthError, match=r"there is no folder .*nowhere"):
        fxwidth.save(gm, tmp_path / "nowhere" / "a.fx")


def test_parametrized_modules_are_not_pickled(tmp_path: Path) -> None:
    model, x = network("convolutions")
    gm = fxwidth.trace(model, x)
    with pytest.raises(
        FxwidthError, match=r"torch does not pickle modules with parametrizations, as 'c' has them; save"
    ):
        fxwidth.save(gm, tmp_path / "a.fx")


class WithSpare(nn.Module):
    """A weight that has another name too, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.spare = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(4, 4)
        self.again = nn.Module()
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_files_without_what_is_never_used_and_with_second_names_are_loaded(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    gm = fxwidth.trace(WithSpare(), x)
    fxwidth.resize(gm, {"up": 5})
    fxwidth.save(gm, tmp_path / "whole.safetensors")
    tensors, texts = tensors_in(tmp_path / "whole.safetensors"), earlier_texts(tmp_path / "whole.safetensors")
    # As it was written before unused parameters were kept, under another of the names.
    tensors["again.weight"] = tensors.pop("up.weight")
    old = {name: tensor for name, tensor in tensors.items() if not name.startswith("spare")}
    write_earlier(tmp_path / "old.safetensors", old, texts)
    assert torch.equal(fxwidth.load(tmp_path / "old.safetensors", WithSpare(), x)(x), gm(x))
    del old["down.bias"]
    write_earlier(tmp_path / "torn.safetensors", old, texts)
    with pytest.raises(FxwidthError, match=r"does not fit this model: down\.bias occur in only one"):
        fxwidth.load(tmp_path / "torn.safetensors", WithSpare(), x)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("buffer", "told"),
    [
        (torch.eye(4).to_sparse(), "is torch.sparse_coo"),
        (torch.eye(4, device="meta"), "is on the meta device"),
    ],
)
def test_what_a_file_of_tensors_cannot_hold_is_named(tmp_path: Path, buffer: Tensor, told: str) -> None:
    model, x = network("layer norm")
    gm = fxwidth.trace(model, x)
    gm.register_buffer("near", buffer)
    with pytest.raises(FxwidthError, match=rf"near {told}.*; save to another path"):
        fxwidth.save(gm, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    fxwidth.save(gm, tmp_path / "a.pt")
    near = fxwidth.load(tmp_path / "a.pt", trusted=True).near
    assert (near.layout, near.device, near.shape) == (buffer.layout, buffer.device, buffer.shape)
    assert near.is_meta or torch.equal(near.to_dense(), buffer.to_dense())


class SharedMemory(nn.Module):
    """Two parameters in one piece of memory, one of them transposed, and numbers that are seen as their conjugates."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(2, 6, 6)
        self.one, self.other = nn.Parameter(both[0]), nn.Parameter(both[1].T)
        self.register_buffer("turn", torch.randn(6, dtype=torch.complex64).conj())

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.one @ self.other) * self.turn).real


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    gm = fxwidth.trace(SharedMemory(), x)
    fxwidth.save(gm, tmp_path / "a.safetensors")
    assert torch.equal(fxwidth.load(tmp_path / "a.safetensors", SharedMemory(), x)(x), gm(x))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6, dtype=dtype), nn.Tanh(), nn.Linear(6, 2, dtype=dtype))

    x = torch.randn(3, 4, dtype=dtype)
    gm = fxwidth.trace(model(), x)
    fxwidth.resize(gm, {"0": 4})
    fxwidth.save(gm, tmp_path / "a.safetensors")
    again = fxwidth.load(tmp_path / "a.safetensors", model(), x)
    assert torch.equal(again(x), gm(x))
    assert again.get_parameter("0.weight").dtype == dtype


DTYPES = sorted({one for one in vars(torch).values() if isinstance(one, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore:.*omplex")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_or_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    gm = fxwidth.trace(nn.Linear(3, 2), torch.randn(2, 3))
    try:
        numbers = torch.ones(32, dtype=torch.uint8).view(dtype)
    except (RuntimeError, TypeError):
        pytest.skip("this torch makes no tensor of it")
    gm.register_buffer("near", numbers)
    try:
        fxwidth.save(gm, tmp_path / "a.safetensors")
    except FxwidthError:
        with pytest.raises(FxwidthError, match=r"near is (of torch\.|quantized).*; save to another path"):
            fxwidth.save(gm, tmp_path / "a.safetensors")
        assert not dtype.is_floating_point or dtype.itemsize < 2
        return
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        saved = file.get_tensor("near")
    saved = saved if saved.dtype == dtype else torch.view_as_complex(saved)
    assert saved.dtype == dtype
    assert torch.equal(saved.view(torch.uint8), numbers.view(torch.uint8))


@pytest.mark.parametrize("saved", ["train", "eval"])
@pytest.mark.parametrize("given", ["function", "train", "eval"])
def test_what_a_function_makes_takes_evaluation_from_the_file(saved: str, given: str, tmp_path: Path) -> None:
    net = files.network()
    gm = fxwidth.trace(getattr(net, saved)(), files.inputs())
    fxwidth.save(gm, tmp_path / "a.safetensors")
    model = (lambda: files.network().train()) if given == "function" else getattr(files.network(), given)()
    again = fxwidth.load(tmp_path / "a.safetensors", model, files.inputs())
    assert again.training is ((saved if given == "function" else given) == "train")
