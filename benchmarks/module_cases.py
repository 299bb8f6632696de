"""The models of the sweep of modules: which of torchvision and timm, and tiny configurations of transformers.

The tiny ones have the proportions of the real ones, or what no resize can change would hold most of their parameters:
feed-forward layers are four times as wide as the model, a projection that is an output is no wider than it, tables of
positions are no longer than what is looked up, and models that return what their encoder gives, whose size is fixed by
that, have four layers on each side, as the smallest Whisper has.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.coverage_cases import Call, Case, case, transformers_call

TORCHVISION = """
alexnet convnext_tiny deeplabv3_mobilenet_v3_large densenet121 efficientnet_b0 efficientnet_v2_s
fasterrcnn_mobilenet_v3_large_320_fpn googlenet lraspp_mobilenet_v3_large maxvit_t mnasnet0_5 mobilenet_v2
mobilenet_v3_small regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t vit_b_32
""".split()  # noqa: SIM905
TIMM = """
cait_xxs24_224 coat_tiny convit_tiny cs3darknet_focus_s davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8
gcvit_xxtiny ghostnet_050 gmlp_ti16_224 hardcorenas_b hgnetv2_b0 hrnet_w18_small inception_next_atto levit_128s
mobilenetv3_small_050 mobilevit_xxs mvitv2_tiny pit_ti_224 poolformerv2_s12 pvt_v2_b0 regnetx_002 repghostnet_050
res2next50 rexnet_100 swin_tiny_patch4_window7_224 test_byobnet test_convnext test_efficientnet test_resnet test_vit
""".split()  # noqa: SIM905

_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_GPT = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    "d_model": 64,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_position_embeddings": 32,
}
_VISION = {
    **{key: _TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {**_TEXT, "conv_dim": (32,) * 7, "num_feat_extract_layers": 7}
_T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}

# name -> (model class, configuration, kind of input); everything that is not named is as the library has it.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bart": ("BartForConditionalGeneration", _BART, "two texts"),
    "bert": ("BertForMaskedLM", _TEXT, "tokens"),
    "bloom": ("BloomForCausalLM", {**_GPT, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "tokens"),
    "clip_vision": ("CLIPVisionModelWithProjection", {**_VISION, "projection_dim": 64}, "images"),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 32, 48, 64], "depths": [1] * 4}, "images"),
    "deit": ("DeiTForImageClassification", _VISION, "images"),
    "dinov2": ("Dinov2ForImageClassification", _VISION, "images"),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, "vocab_size": 99},
        "tokens",
    ),
    "electra": ("ElectraForMaskedLM", {**_TEXT, "embedding_size": 64}, "tokens"),
    "falcon": ("FalconForCausalLM", {**_TEXT, "new_decoder_architecture": False, "multi_query": False}, "tokens"),
    "gemma": ("GemmaForCausalLM", {**_GROUPED, "head_dim": 16}, "tokens"),
    "gemma2": ("Gemma2ForCausalLM", {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}, "tokens"),
    "gpt2": ("GPT2LMHeadModel", {**_GPT, "n_embd": 64, "n_layer": 2, "n_head": 4}, "tokens"),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT, "tokens"),
    "hubert": ("HubertForCTC", _SPEECH, "audio"),
    "llama": ("LlamaForCausalLM", _GROUPED, "tokens"),
    "mamba": ("MambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}, "tokens"),
    "mistral": ("MistralForCausalLM", _GROUPED, "tokens"),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}, "tokens"),
    "olmo": ("OlmoForCausalLM", _GROUPED, "tokens"),
    "opt": (
        "OPTForCausalLM",
        {**_TEXT, "ffn_dim": 256, "word_embed_proj_dim": 64, "max_position_embeddings": 32},
        "tokens",
    ),
    "phi": ("PhiForCausalLM", _TEXT, "tokens"),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED, "tokens"),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}, "tokens"),
    "roberta": ("RobertaForMaskedLM", _TEXT, "tokens"),
    "swin": (
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2},
        "images",
    ),
    "t5": ("T5ForConditionalGeneration", _T5, "two texts"),
    "vit": ("ViTForImageClassification", _VISION, "images"),
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH, "audio"),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_BART, "max_source_positions": 16, "max_target_positions": 32},
        "mel",
    ),
}


def names(suite: str) -> list[str]:
    """Return the models of a suite, in a stable order."""
    return sorted({"torchvision": TORCHVISION, "timm": TIMM, "transformers": list(TRANSFORMERS)}[suite])


def module_case(suite: str, name: str) -> Case:
    """Return one model of a suite."""
    if suite != "transformers":
        return case(suite, name)
    kind, settings, inputs = TRANSFORMERS[name]
    return Case(partial(_transformers_model, kind, settings), lambda _: _call(inputs))


def _transformers_model(kind: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, kind)
    model: nn.Module = model_class(model_class.config_class(**settings))
    return model


def _call(inputs: str) -> Call:
    call = transformers_call(inputs)
    if inputs != "mel":
        return call
    # Of models of two parts both are called.
    texts = transformers_call("two texts").kwargs["decoder_input_ids"]
    return Call(kwargs={**call.kwargs, "decoder_input_ids": texts})
