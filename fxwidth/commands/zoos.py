"""Models by their names in libraries: how each library makes them, and what they take."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxwidth.commands.faults import InputError, did_you_mean, needing

if TYPE_CHECKING:
    from torch import nn

# As many tokens, or samples of sound, as an example has.
_TOKENS, _SAMPLES = 16, 16_000
_IMAGE, _YOLO_IMAGE, _DETECTOR_IMAGE, _FLOW_IMAGE, _FRAMES = 224, 640, 320, 128, 16


@dataclass(frozen=True)
class Found:
    """A model of a library, still to be made.

    Attributes:
        make: makes it, with random weights, or with trained ones where it is given True.
        inputs: makes an example of its inputs, given the model.
        needs_values: whether its code looks at values, so that sizes alone are not enough.
    """

    make: Callable[[bool], nn.Module]
    inputs: Callable[[nn.Module], Any]
    needs_values: bool = False


def torchvision_model(name: str) -> Found:
    """Return a model of torchvision.

    Raises:
        InputError: torchvision is not installed, or has no such model.
    """
    with needing("torchvision"):
        from torchvision import models
    known = models.list_models()
    if name not in known:
        raise InputError(f"torchvision has no model {name!r}{did_you_mean(name, known)}")
    if name.startswith("quantized_"):
        other = name.removeprefix("quantized_")
        raise InputError(
            f"the weights of {name!r} are 8-bit integers, whose widths are packed; take torchvision:{other}."
        )
    family = models.get_model_builder(name).__module__.split(".")[2]
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    size = (list(getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None) or []) or [_IMAGE])[
        0
    ]

    def make(is_trained: bool) -> nn.Module:
        options: dict[str, Any] = {"weights": "DEFAULT" if is_trained else None}
        if family in ("detection", "segmentation") and not is_trained:
            options["weights_backbone"] = None
        if name in ("googlenet", "inception_v3") and not is_trained:
            # init_weights spares a deprecation warning.
            options |= {"aux_logits": False, "init_weights": True}
        made: nn.Module = models.get_model(name, **options)
        return made

    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "video": ((1, 3, _FRAMES, size, size),),
        "optical_flow": ((1, 3, _FLOW_IMAGE, _FLOW_IMAGE),) * 2,
    }
    if family == "detection":
        return Found(make, lambda _: ([_random(3, _DETECTOR_IMAGE, _DETECTOR_IMAGE)],), needs_values=True)
    return Found(make, lambda _: tuple(_random(*shape) for shape in shapes.get(family, ((1, 3, size, size),))))


def timm_model(name: str) -> Found:
    """Return a model of timm.

    Raises:
        InputError: timm is not installed, or has no such model.
    """
    with needing("timm"):
        import timm
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")

    def inputs(model: Any) -> Any:
        return (_random(1, *model.default_cfg.get("input_size", (3, _IMAGE, _IMAGE))),)

    return Found(lambda is_trained: timm.create_model(name, pretrained=is_trained), inputs)


def hugging_face_model(name: str) -> Found:
    """Return a model of transformers, by its name on the hub, its folder, or the file of its configuration.

    Raises:
        InputError: transformers is not installed, the configuration cannot be read, or names no class that is there.
    """
    with needing("transformers"):
        import transformers
    if name.endswith(".json") and not Path(name).is_file():
        raise InputError(
            f"there is no file {name}; pass the config.json of a model, its folder, or its name on the hub."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the configuration of {name!r} cannot be read: {line}") from error
    kind = _class_of(transformers, config, name)

    def make(is_trained: bool) -> nn.Module:
        made: nn.Module = kind.from_pretrained(name) if is_trained else kind(config)
        return made

    return Found(make, lambda model: _hugging_face_inputs(model, config))


def _class_of(transformers: Any, config: Any, name: str) -> Any:
    named = next(iter(config.architectures or ()), None)
    if named is not None:
        kind = getattr(transformers, named, None)
        if kind is None:
            raise InputError(f"{name!r} is a {named}, which transformers {transformers.__version__} does not have.")
        return kind
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            kind = mapping[type(config)]
            return kind[0] if isinstance(kind, tuple) else kind
    raise InputError(f"{name!r} names no architecture, and transformers has none for {type(config).__name__}.")


def _hugging_face_inputs(model: Any, config: Any) -> dict[str, Any]:
    import torch

    main = model.main_input_name
    tokens = torch.ones(1, _TOKENS, dtype=torch.int64)
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", _IMAGE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        found = {main: _random(1, getattr(vision, "num_channels", 3), height, width)}
    elif main == "input_features":
        length = 2 * getattr(config, "max_source_positions", 1500)
        found = {main: _random(1, getattr(config, "num_mel_bins", 80), length)}
    elif main == "input_values":
        found = {main: _random(1, _SAMPLES)}
    else:
        found = {main: tokens}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = tokens.clone()
    return found


def ultralytics_model(name: str) -> Found:
    """Return a model of ultralytics, by its file of layers, such as yolo11n.yaml, or of weights.

    Raises:
        InputError: ultralytics is not installed, or cannot make it.
    """
    with needing("ultralytics"):
        import ultralytics
    is_of_weights = name.endswith(".pt")

    def make(is_trained: bool) -> nn.Module:
        named = name if is_of_weights or not is_trained else f"{Path(name).stem}.pt"
        try:
            # It prints what it makes.
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
                made: nn.Module = ultralytics.YOLO(named).model
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"ultralytics cannot make {named!r}: {error}") from error
        return made

    return Found(make, lambda _: (_random(1, 3, _YOLO_IMAGE, _YOLO_IMAGE),), needs_values=True)


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(shape)


ZOOS: dict[str, Callable[[str], Found]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "hf": hugging_face_model,
    "ultralytics": ultralytics_model,
}
