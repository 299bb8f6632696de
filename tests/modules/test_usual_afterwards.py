"""What people do with a model works after half of it has gone: training, adapters, quantization, compilation."""

import copy

import pytest
import torch
from torch import nn

import fxwidth
from tests.modules.transformers_cases import CASES, TOKENS, call_of, logits_of, model_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # Of peft itself, where experts are no linear layers.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]
_ROWS = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(8, 1)]


def _halved(name: str) -> nn.Module:
    pytest.importorskip("transformers")
    return fxwidth.evolve(model_of(name), call_of(name), params=0.5, output="module")


def _loss_of(model: nn.Module, name: str) -> torch.Tensor:
    given = call_of(name)
    labels = given.pop("decoder_input_ids", TOKENS).contiguous()
    return model(**given, labels=labels).loss


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_it_for_an_epoch(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = _halved("llama")
    with torch.no_grad():
        before = _loss_of(model, "llama").item()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_ROWS)
    trainer.train()
    with torch.no_grad():
        assert _loss_of(model.eval(), "llama").item() < before
    trainer.save_model(str(tmp_path / "saved"))
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits_of(again, "llama"), logits_of(model, "llama"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_low_rank_adapters_of_peft_are_put_on_it_trained_and_merged(name):
    peft = pytest.importorskip("peft")
    model = _halved(name)
    expected = logits_of(model, name)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    # Adapters start as nothing.
    assert torch.equal(logits_of(adapted, name), expected)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = _loss_of(adapted, name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits_of(adapted, name)
    assert torch.allclose(logits_of(adapted.merge_and_unload(), name), expected, atol=1e-5)


@pytest.mark.slow
def test_its_weights_are_quantized_to_eight_bits_by_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    model = _halved("llama")
    expected = logits_of(model, "llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    found = logits_of(model, "llama")
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_compiled(backend):
    model = _halved("bert")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    assert torch.allclose(logits_of(compiled, "bert"), logits_of(model, "bert"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_features_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    model = fxwidth.evolve(model, images, params=0.5, output="module")
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.equal(model.forward_head(features), model(images))


class _Classifier(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.inner = inner
        self.last = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.first(x))
        return self.last(x.mean(1))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("make", [_Attention, _encoder])
def test_the_fast_path_of_attention_is_taken_and_gives_the_same(make):
    torch.manual_seed(0)
    model = _Classifier(make()).double().eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    gm = fxwidth.trace(model, x)
    # torch takes the fast path where the number of heads is even.
    halved = {group.name: group.width // 2 for group in fxwidth.analyze(gm).free if not group.name.endswith("#1")}
    fxwidth.write_back(fxwidth.resize(gm, halved), model)
    slow = model(x).detach()
    # A mode for dispatch would have it go the slow way: the profiler tells which it goes.
    with torch.profiler.profile() as profile, torch.no_grad():
        fast = model(x)
    assert "aten::_native_multi_head_attention" in {event.name for event in profile.events()}
    assert torch.allclose(fast, slow, rtol=0, atol=1e-12)
    assert torch.equal(copy.deepcopy(model)(x), slow)
