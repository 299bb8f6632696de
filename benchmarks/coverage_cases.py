"""The models of the coverage sweeps: how each is made with random weights, and an example call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A model of a suite."""

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Call]


def names(suite: str) -> list[str]:
    """Return the models of a suite, in a stable order."""
    return sorted(_SUITES[suite][0]())


def case(suite: str, name: str) -> Case:
    """Return one model of a suite."""
    return _SUITES[suite][1](name)


def _images(size: int, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def _video(frames: int, size: int) -> Tensor:
    return torch.randn(2, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


# torchvision -------------------------------------------------------------------------------------------------------

_TORCHVISION_SIZES = {"vit_": 224, "vit_h": 224, "maxvit": 224, "inception": 96, "swin": 64}
_TORCHVISION_VIDEO = {"mvit": (16, 224), "swin3d": (8, 64), "s3d": (16, 224)}


def _torchvision_names() -> list[str]:
    import torchvision

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]


# Detectors scale their images to this: nothing is learned of widths from larger ones, but their time.
_DETECTION_SIZE = 256


def _torchvision_case(name: str) -> Case:
    import torchvision

    extra: dict[str, Any] = {}
    builder = torchvision.models.get_model_builder(name)
    package = builder.__module__.split(".")[2]
    if package in ("detection", "segmentation"):
        extra["weights_backbone"] = None
    if package == "detection" and not name.startswith("ssd"):
        extra["min_size"] = _DETECTION_SIZE
    if name in ("googlenet", "inception_v3"):
        extra["init_weights"] = False
    return Case(partial(builder, weights=None, **extra), lambda _: _torchvision_call(package, name))


def _torchvision_call(package: str, name: str) -> Call:
    if package == "detection":
        return Call(([_images(128)[0], _images(128)[1]],))
    if package == "optical_flow":
        return Call((_images(128), _images(128).flip(0)))
    if package == "video":
        sizes = next((sizes for prefix, sizes in _TORCHVISION_VIDEO.items() if name.startswith(prefix)), (4, 64))
        return Call((_video(*sizes),))
    size = next((size for prefix, size in _TORCHVISION_SIZES.items() if name.startswith(prefix)), 64)
    return Call((_images(size),))


# timm --------------------------------------------------------------------------------------------------------------


# The smallest model, by parameters, of every module file of timm 1.0.31.
_TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano crossvit_tiny_240
cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050
gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge
nest_tiny nextvit_small pit_ti_224 pnasnet5large poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
repghostnet_050 repvit_m1 res2next50 resnest14d resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16_224
selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout
test_nfnet test_resnet test_vit test_vit_relpos tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
vgg11 visformer_tiny vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p
xcit_nano_12_p8_224
"""


def _timm_case(name: str) -> Case:
    import timm

    return Case(partial(timm.create_model, name, pretrained=False), _timm_call)


def _timm_call(model: Any) -> Call:
    """Return images of 128 pixels where the model takes them, else of the size it was made for."""
    channels, *sizes = model.default_cfg.get("input_size", (3, 224, 224))
    small = _images(128, channels)
    try:
        with torch.no_grad():
            model(small)
    except Exception:
        return Call((_images(sizes[0], channels),))
    return Call((small,))


# Hugging Face transformers -----------------------------------------------------------------------------------------

_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 99,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_VISION = {key: value for key, value in _TEXT.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}

# name -> (model class, configuration, kind of input); everything that is not named is as the library has it.
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertModel", _TEXT, "tokens"),
    "distilbert": (
        "DistilBertModel",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99},
        "tokens",
    ),
    "roberta": ("RobertaModel", _TEXT, "tokens"),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}, "tokens"),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT, "tokens"),
    "llama": ("LlamaForCausalLM", _GROUPED, "tokens"),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED, "tokens"),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}, "tokens"),
    "mistral": ("MistralForCausalLM", _GROUPED, "tokens"),
    "gemma": ("GemmaForCausalLM", {**_GROUPED, "head_dim": 16}, "tokens"),
    "phi": ("PhiForCausalLM", _TEXT, "tokens"),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}, "tokens"),
    "t5": (
        "T5Model",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
        "two texts",
    ),
    "bart": ("BartModel", {**_BART, "vocab_size": 99}, "two texts"),
    "vit": ("ViTModel", _VISION, "images"),
    "deit": ("DeiTModel", _VISION, "images"),
    "swin": (
        "SwinModel",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2},
        "images",
    ),
    "convnext": ("ConvNextModel", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, "images"),
    "clip_vision": ("CLIPVisionModel", _VISION, "images"),
    "whisper_encoder": (
        "WhisperModel.encoder",
        {**_BART, "vocab_size": 99, "max_source_positions": 16, "pad_token_id": 0},
        "mel",
    ),
    "wav2vec2": ("Wav2Vec2Model", {**_TEXT, "conv_dim": (32,) * 7, "num_feat_extract_layers": 7}, "audio"),
    "mamba": ("MambaForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99}, "tokens"),
}
# Models that have no attention, or only one form of it.
_ONE_FORM = {"convnext", "mamba", "swin", "t5"}


def _transformers_names() -> list[str]:
    return [
        f"{name}-{attention}"
        for name in _TRANSFORMERS
        for attention in (("eager",) if name in _ONE_FORM else ("eager", "sdpa"))
    ]


def _transformers_case(name: str) -> Case:
    kind, _, attention = name.rpartition("-")
    path, settings, inputs = _TRANSFORMERS[kind]
    return Case(partial(_transformers_model, path, settings, attention), lambda _: transformers_call(inputs))


def _transformers_model(path: str, settings: dict[str, Any], attention: str) -> nn.Module:
    import transformers

    kind, _, part = path.partition(".")
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**settings)
    config._attn_implementation = attention
    model: nn.Module = model_class(config)
    return model.get_submodule(part) if part else model


def transformers_call(inputs: str) -> Call:
    """Return a call of a model of transformers, by the kind of its inputs."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 99, (2, 12), generator=generator)
    if inputs == "tokens":
        return Call(kwargs={"input_ids": tokens})
    if inputs == "two texts":
        return Call(kwargs={"input_ids": tokens, "decoder_input_ids": tokens[:, :7]})
    if inputs == "images":
        return Call(kwargs={"pixel_values": _images(32)})
    if inputs == "mel":
        return Call(kwargs={"input_features": torch.randn(2, 80, 32, generator=generator)})
    return Call(kwargs={"input_values": torch.randn(2, 4000, generator=generator)})


_SUITES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Case]]] = {
    "torchvision": (_torchvision_names, _torchvision_case),
    "timm": (_TIMM.split, _timm_case),
    "transformers": (_transformers_names, _transformers_case),
}
