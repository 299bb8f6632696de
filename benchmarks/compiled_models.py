"""The models of `compiled_evolution.py`, and what `fxwidth.compile_backend` makes of them beside `fxwidth.evolve`."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.evolution.evolver import parameter_count

BATCH, SAMPLES = 4, 64


def _torchvision(name: str, size: int, **options: Any) -> tuple[nn.Module, Callable[[int], Tensor]]:
    model: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(weights=None, **options)
    return model, lambda count: torch.randn(count, 3, size, size)


def _vision_transformer() -> tuple[nn.Module, Callable[[int], Tensor]]:
    kind = importlib.import_module("torchvision.models.vision_transformer").VisionTransformer
    model = kind(image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # which begins at zero
    return model, lambda count: torch.randn(count, 3, 32, 32)


def _llama() -> tuple[nn.Module, Callable[[int], Tensor]]:
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model, lambda count: torch.randint(0, 256, (count, 24))


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[int], Tensor]]]] = {
    "resnet18": lambda: _torchvision("resnet18", 64),
    "mobilenet_v3_small": lambda: _torchvision("mobilenet_v3_small", 64),
    "vision transformer, 4 blocks of width 64": _vision_transformer,
    "llama, 2 blocks of width 64": _llama,
}


def compare(name: str, inner: str) -> dict[str, Any]:
    """Return what the backend and `evolve` make of a model with the same options and data."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    x, data = inputs(BATCH), [inputs(SAMPLES)]
    counted = parameter_count(model)
    with torch.no_grad():
        before = _tensor(model(x))
        evolved = fxwidth.evolve(copy.deepcopy(model), x, params=0.5, data=data)
        backend = fxwidth.compile_backend(params=0.5, data=data, inner=inner)
        compiled = torch.compile(model, backend=backend)
        start = time.perf_counter()
        found = _tensor(compiled(x))
        seconds = time.perf_counter() - start
        wanted = _tensor(evolved(x))
        other = inputs(BATCH - 1)
        again = (_tensor(compiled(other)) - _tensor(evolved(other))).abs().max().item()
        torch.testing.assert_close(_tensor(model(x)), before)
    own = _shapes(backend._parts[0].shrunk)  # type: ignore[attr-defined]
    return {
        "model": name,
        "parameters": counted,
        "by_evolve": parameter_count(evolved),
        "by_backend": sum(own[shape] * torch.Size(shape).numel() for shape in own),
        "same_shapes": own == _shapes(evolved),
        "largest_output": wanted.abs().max().item(),
        "difference": (found - wanted).abs().max().item(),
        "difference_at_another_batch": again,
        "seconds": seconds,
    }


def _tensor(result: Any) -> Tensor:
    found: Tensor = getattr(result, "logits", result)
    return found


def _shapes(module: nn.Module) -> dict[tuple[int, ...], int]:
    shapes = sorted(tuple(parameter.shape) for parameter in module.parameters())
    return {shape: shapes.count(shape) for shape in shapes}
