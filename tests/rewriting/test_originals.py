"""The model that was traced is, after a resize, the resized model or as it was; an optimizer made for it goes on."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.rewriting.attributes import sizes_by_shape
from fxwidth.rewriting.originals import original_of
from tests.oracles.interruptions import differences, state_of
from tests.zoo.models import build, relative_difference


class Bare(nn.Module):
    """A bare parameter between two layers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) * self.scale + self.shift))


class Written(Bare):
    """A size written into its code."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh((self.up(x) * self.scale).view(-1, 8) + self.shift))


class Scaled(Bare):
    """A number in its code that is computed from a size: it runs at other widths, and does something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) * self.scale
        return self.down(torch.tanh(y / y.shape[-1] ** 0.5 + self.shift))


class Auxiliary(Bare):
    """A part for training alone, which the graph of evaluation does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x) * self.scale + self.shift)
        return self.down(y) + self.aside(y) if self.training else self.down(y)


class Exported(Bare):
    """A branch on a size, which symbolic tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum(0).shape[0] > 1 and bool(x.shape[0] > 0) else -y


class Attentive(nn.Module):
    """Attention as one module, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)[:, None].expand(-1, 3, -1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.norm(x + self.mlp(x)).mean(1)


def image_transformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def language_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def features() -> Tensor:
    return torch.randn(4, 6)


def tokens() -> Tensor:
    return torch.randint(0, 32, (4, 5))


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], str | None]
CASES: dict[str, Case] = {
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), features, "resized"),
    "bare": (Bare, features, "resized"),
    "written": (Written, features, "untouched"),
    "scaled": (Scaled, features, "untouched"),
    "auxiliary": (Auxiliary, features, "untouched"),
    "exported": (Exported, features, None),
    "attention": (Attentive, features, None),
    "resnet18": (lambda: build("resnet18", torch.float32)[0], lambda: torch.randn(2, 3, 33, 33), "resized"),
    "vit": (lambda: build("vit", torch.float32)[0], lambda: torch.randn(2, 3, 32, 32), None),
    "hf vit": (image_transformer, lambda: torch.randn(4, 3, 8, 8), None),
    "hf llama": (language_model, tokens, None),
}


def set_apart(model: nn.Module) -> nn.Module:
    """Give every parameter a value that is not zero, so that each is seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def answer(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        result: Any = model.train(training)(x)
    return result if isinstance(result, Tensor) else result["logits"]


def halved(gm: Any, **options: Any) -> str | None:
    plan = {group.name: max(1, group.width // 2) for group in fxwidth.analyze(gm).free}
    fxwidth.resize(gm, plan, **options)
    told: str | None = fxwidth.report(gm).resizes[-1]["original"]
    return told


# A network of the usual size takes as long as the others together.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "resnet18" else name for name in CASES]


@pytest.mark.filterwarnings("ignore:The graph of Auxiliary does not do")
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_resized_one_or_as_it_was(name: str) -> None:
    make, inputs, expected = CASES[name]
    torch.manual_seed(0)
    model, x = set_apart(make()).eval(), inputs()
    gm = fxwidth.trace(model, x)
    before, twin = state_of(model), copy.deepcopy(model)
    told = halved(gm, data=[x] if x.is_floating_point() else None)
    assert told in ("resized", "untouched")
    assert expected in (None, told)
    other = torch.cat([x, x[:1]])
    if told == "untouched":
        after = state_of(model)
        # By value: where the graph has kept a tensor, the model has a copy.
        changed = [key for key in differences(before, after) if key.endswith((" values", " attributes", "training"))]
        assert not [key for key in changed if not key.endswith(" attributes")]
        assert not {id(tensor) for tensor in model.state_dict(keep_vars=True).values()} & {
            id(tensor) for tensor in gm.state_dict(keep_vars=True).values()
        }
    # What prints a layer, copies it by its sizes or checks them reads its attributes.
    for part in [*model.modules(), *gm.modules()]:
        assert {name: getattr(part, name) for name in sizes_by_shape(part)} == sizes_by_shape(part), part
    for training in (True, False):
        torch.manual_seed(0)
        reference = gm if told == "resized" else twin
        assert torch.equal(answer(model, other, training), answer(reference, other, training)), training
    assert sum(p.numel() for p in gm.parameters()) < sum(p.numel() for p in twin.parameters())


@pytest.mark.filterwarnings("ignore:The graph of Auxiliary does not do")
@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_made_for_the_model_trains_the_graph(name: str) -> None:
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model, x = set_apart(make()).eval(), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gm = fxwidth.trace(model, x)
    told = halved(gm, optimizer=optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in gm.parameters()} <= held
    old, own = answer(gm, x, False), answer(model, x, False)
    result = gm(x)
    (result if isinstance(result, Tensor) else result["logits"]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(answer(gm, x, False), old)
    # What stayed as it was is not trained with the graph.
    assert torch.equal(answer(model, x, False), own) == (told == "untouched")


def test_an_untouched_model_is_resized_no_more_and_can_be_trained_itself() -> None:
    model, x = Written(), features()
    gm = fxwidth.trace(model, x)
    assert halved(gm) == "untouched"
    assert original_of(gm) is None
    old = answer(model, x, False)
    assert halved(gm) is None
    assert torch.equal(answer(model, x, False), old)
    assert "the traced model left as it was" in str(fxwidth.report(gm))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_rotation_is_taken_back_where_the_model_stays() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8), Written()), None
    model[4].up = nn.Linear(8, 8)
    x = torch.randn(32, 6)
    gm = fxwidth.trace(model, x)
    old, before = answer(model, x, False), copy.deepcopy(model.state_dict())
    assert halved(gm, data=[x]) == "untouched"
    assert torch.equal(answer(model, x, False), old)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_and_sizes_of_an_untouched_model() -> None:
    model, x = Written(), features()
    seen: list[tuple[int, ...]] = []
    handle = model.up.register_forward_hook(lambda _module, _inputs, result: seen.append(tuple(result.shape)))
    gm = fxwidth.trace(model, x)
    assert halved(gm) == "untouched"
    assert (model.up.out_features, gm.up.out_features) == (8, 4)
    seen.clear()
    gm(x)
    model(x)
    assert seen == [(4, 4), (4, 8)]
    handle.remove()
    gm(x)
    assert len(seen) == 2


def test_a_model_is_not_kept_alive_and_copies_have_none() -> None:
    model, x = Bare(), features()
    gm = fxwidth.trace(model, x)
    assert original_of(gm) is model
    assert original_of(copy.deepcopy(gm)) is None
    assert original_of(pickle.loads(pickle.dumps(gm))) is None
    del model
    gc.collect()
    assert original_of(gm) is None
    assert halved(gm) is None
    assert gm(x).shape == (4, 3)


def test_evolve_says_what_became_of_the_model() -> None:
    x = features()
    for make, told in ((Bare, "resized"), (Written, "untouched")):
        model = make()
        gm = fxwidth.evolve(model, x, params=0.6)
        assert [record["original"] for record in fxwidth.report(gm).resizes] == [told]
        assert relative_difference(model(x), gm(x)) < 1e-6 or told == "untouched"
