"""Tiny models of Hugging Face transformers, of which half of the parameters can go, and how they are called."""

from typing import Any

import torch
from torch import nn

TOKENS = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(1))
_SOUND = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2))
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 99, "eos_token_id": 2}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}
# The hidden size is that of what the encoder gives, which the model returns: the feed-forward layers must do.
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "vocab_size": 99,
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
# name -> (model class, configuration, how it is called).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED, {"input_ids": TOKENS}),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED, {"input_ids": TOKENS}),
    "gemma": ("GemmaForCausalLM", {**_GROUPED, "intermediate_size": 128}, {"input_ids": TOKENS}),
    "gpt2": ("GPT2LMHeadModel", _GPT2, {"input_ids": TOKENS}),
    "bert": ("BertForMaskedLM", _TEXT, {"input_ids": TOKENS}),
    # With an embedding of another size than the layers' it has more parameters: both sizes change at once.
    "electra": ("ElectraForMaskedLM", {**_TEXT, "embedding_size": 32}, {"input_ids": TOKENS}),
    # It is traced as it is exported.
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}, {"input_ids": TOKENS}),
    "t5": ("T5ForConditionalGeneration", _T5, {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}),
    "whisper": (
        "WhisperForConditionalGeneration",
        _WHISPER,
        {"input_features": _SOUND, "decoder_input_ids": TOKENS[:, :5]},
    ),
}


def model_of(name: str) -> nn.Module:
    """Return a model, in evaluation, with the same weights each time."""
    import transformers

    kind, settings, _ = CASES[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model: nn.Module = model_class(model_class.config_class(**settings)).eval()
    return model


def call_of(name: str) -> dict[str, torch.Tensor]:
    """Return the arguments of a call, by name."""
    return dict(CASES[name][2])


def logits_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return what a model makes of its call."""
    with torch.no_grad():
        found: torch.Tensor = model(**call_of(name)).logits
    return found
