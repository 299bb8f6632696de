"""Models of Hugging Face transformers in, models out: configured, saved, loaded, and used as before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxwidth
from tests.modules import transformers_cases
from tests.modules.transformers_cases import TOKENS as _TOKENS
from tests.modules.transformers_cases import call_of as _call
from tests.modules.transformers_cases import logits_of as _logits
from tests.modules.transformers_cases import model_of as _model

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_CASES = transformers_cases.CASES
# The others take as long and are slow.
_SLOW = [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in _CASES]


@pytest.mark.parametrize("name", _SLOW)
def test_half_of_a_model_is_saved_and_loaded_in_a_new_process(name, tmp_path):
    model = _model(name)
    before = sum(p.numel() for p in model.parameters())
    assert fxwidth.evolve(model, _call(name), params=0.5, output="module") is model
    assert sum(p.numel() for p in model.parameters()) <= before / 2
    model.save_pretrained(tmp_path)
    text = "found = model(**call).logits"
    if model.can_generate():
        text = "found = model.generate(given, max_new_tokens=4, do_sample=False)"
    if name == "whisper":
        text += "; found = torch.cat([found.flatten(), model.model.encoder(given).last_hidden_state.flatten()])"
    expected = {"model": model, "call": _call(name), "given": next(iter(_call(name).values())), "torch": torch}
    with torch.no_grad():
        exec(text, expected)
    torch.save((_call(name), _logits(model, name), expected["found"]), tmp_path / "expected.pt")
    code = f"""
import torch, transformers
call, wanted, more = torch.load({str(tmp_path / "expected.pt")!r})
given = next(iter(call.values()))
model = transformers.{type(model).__name__}.from_pretrained({str(tmp_path)!r}).eval()
with torch.no_grad():
    assert torch.equal(model(**call).logits, wanted)
    {text}
assert torch.equal(found, more)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", _CASES)
def test_what_is_planned_for_a_module_is_never_refused_when_it_is_written_back(name):
    model = _model(name)
    gm = fxwidth.trace(model, _call(name))
    reached = []
    # Each from where the one before has ended: by then heads no longer divide what they did.
    for share in (0.9, 0.85, 0.7, 0.6):
        try:
            plan = fxwidth.plan(fxwidth.analyze(gm), params=share, for_module=model)
        except fxwidth.FxwidthError:
            continue
        fxwidth.write_back(fxwidth.resize(gm, plan), model)
        reached.append(share)
        assert torch.allclose(_logits(model, name), gm(**_call(name)).logits, atol=1e-5)
    assert reached


def test_generation_with_a_cache_gives_the_tokens_of_the_graph():
    model = _model("llama").double()
    gm = fxwidth.trace(model, {"input_ids": _TOKENS})
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.5, for_module=model)
    fxwidth.write_back(fxwidth.resize(gm, plan), model)
    told = plan.notes["for_module"]
    assert told["keeps_eps"]
    assert {"hidden_size", "intermediate_size"} <= set(told["entries"])
    tokens = _TOKENS[:, :3]
    found = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
    while tokens.shape[1] < 8:
        # What comes later makes no difference to what comes before.
        padded = torch.nn.functional.pad(tokens, (0, 8 - tokens.shape[1]))
        with torch.no_grad():
            following = gm(input_ids=padded).logits[:, tokens.shape[1] - 1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], 1)
    assert torch.equal(found, tokens)


def test_what_a_configuration_cannot_say_is_refused_and_the_model_stays():
    model = _model("llama")
    config = model.config.to_dict()
    gm = fxwidth.trace(model, {"input_ids": _TOKENS})
    widths = {"model.layers.0.mlp.gate_proj": 30, "model.layers.1.mlp.gate_proj": 20}
    fxwidth.resize(gm, widths)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    pattern = r"LlamaForCausalLM cannot hold .* one number, intermediate_size, where .*(30|20).*for_module=model"
    with pytest.raises(fxwidth.FxwidthError, match=pattern):
        fxwidth.write_back(gm, model)
    assert model.config.to_dict() == config
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_wrong_number_of_heads_of_the_same_shapes_is_refused(monkeypatch):
    """A configuration with the hidden size halved and as many heads as before has the same shapes."""
    from fxwidth.modules.config_fit import _Fit

    model = _model("bert")
    gm = fxwidth.trace(model, {"input_ids": _TOKENS})
    fxwidth.resize(gm, fxwidth.plan(fxwidth.analyze(gm), params=0.5, for_module=model))
    heads = model.config.num_attention_heads
    monkeypatch.setattr(_Fit, "others", lambda self, changes: iter(()))  # heads are in no shape
    with pytest.raises(fxwidth.FxwidthError, match=r"attention.self \(.*modeling_bert.py:\d+\): it does"):
        fxwidth.write_back(gm, model)
    assert model.config.num_attention_heads == heads
    monkeypatch.undo()
    fxwidth.write_back(gm, model)
    assert model.config.num_attention_heads < heads
    assert torch.equal(model(_TOKENS).logits, gm(input_ids=_TOKENS).logits)


def test_sizes_that_change_at_once_are_found_and_heads_told_from_their_sizes():
    """T5's bias has a column for each head, and its projections one for each entry of each head."""
    transformers_t5 = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    model = transformers.T5EncoderModel(transformers_t5).eval()
    gm = fxwidth.trace(model, {"input_ids": _TOKENS})
    heads = {g.name: 2 for g in fxwidth.analyze(gm).free if g.width == 4}
    assert heads
    fxwidth.write_back(fxwidth.resize(gm, heads), model)
    assert (model.config.num_heads, model.config.d_kv) == (2, 8)
    assert torch.equal(model(_TOKENS).last_hidden_state, gm(input_ids=_TOKENS).last_hidden_state)


@pytest.mark.slow
def test_a_parameter_that_nothing_uses_goes_with_the_configuration(tmp_path):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, mlp_ratio=2, image_size=8, patch_size=4
    )
    model = transformers.Dinov2ForImageClassification(config).eval()
    images = torch.randn(2, 3, 8, 8)
    gm = fxwidth.trace(model, images)
    for heads in (2, 1):
        plan = fxwidth.plan(fxwidth.analyze(gm), params=0.7, for_module=model)
        fxwidth.write_back(fxwidth.resize(gm, plan), model)
        assert model.dinov2.embeddings.mask_token.shape == (1, model.config.hidden_size)
        assert model.config.num_attention_heads <= heads + 1
        assert torch.equal(model(images).logits, gm(images).logits)
    model.save_pretrained(tmp_path)
    again = transformers.Dinov2ForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images).logits, model(images).logits)
    assert torch.equal(again.dinov2.embeddings.mask_token, model.dinov2.embeddings.mask_token)


@pytest.mark.slow
def test_it_is_compiled_and_trained_as_before():
    model = fxwidth.evolve(_model("llama"), {"input_ids": _TOKENS}, params=0.5, output="module")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(_TOKENS).logits, model(_TOKENS).logits, atol=1e-6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(_TOKENS, labels=_TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
