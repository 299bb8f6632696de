"""Torch-Pruning, as its documentation says to use it: one-shot, at the strength that meets a parameter budget.

It is told the heads of attention, and to leave the classifier alone. It does not follow a tiled shortcut (an
IndexError in 1.6.1), so it is told as well to leave the streams of the seed network alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from benchmarks.trained_networks import Images, TransformerBlock
from fxwidth.evolution.evolver import parameter_count
from fxwidth.training.networks import TiledResidualBlock

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "L1": lambda: tp.importance.MagnitudeImportance(p=1),
    "L2, group": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "Taylor": tp.importance.GroupTaylorImportance,
    "Hessian": tp.importance.GroupHessianImportance,
}
NEEDS_IMAGES = ("Taylor", "Hessian")
_BISECTIONS = 9


def pruned(model: nn.Module, kind: str, share: float, images: Images | None) -> nn.Module:
    """Return a copy of a model that was pruned once, to the widest layers of at most a share of its parameters.

    Args:
        model: one of the trained networks; it stays as it is.
        kind: a key of `IMPORTANCES`.
        share: the parameters to keep, in (0, 1).
        images: what importances that need gradients get them from.
    """
    return _pruned_at(model, kind, _ratio(model, share), images)


@lru_cache(maxsize=8)
def _ratio(model: nn.Module, share: float) -> float:
    """Return the smallest pruning ratio that leaves at most a share of the parameters."""
    budget = share * parameter_count(model)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        ratio = (low + high) / 2
        # Without `global_pruning` all layers lose the same share whatever the importance.
        if parameter_count(_pruned_at(model, "L1", ratio, None)) <= budget:
            high = ratio
        else:
            low = ratio
    return high


def _pruned_at(model: nn.Module, kind: str, ratio: float, images: Images | None) -> nn.Module:
    model = copy.deepcopy(model)
    importance = IMPORTANCES[kind]()
    heads = {
        projection: block.heads
        for block in model.modules()
        if isinstance(block, TransformerBlock)
        for projection in (block.query, block.key, block.value)
    }
    ignored: list[nn.Module] = [[part for part in model.modules() if isinstance(part, nn.Linear)][-1]]
    ignored += [part.conv2 for part in model.modules() if isinstance(part, TiledResidualBlock)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            torch.zeros(1, 1, 28, 28),
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=ignored,
            num_heads=heads,
        )
        if images is not None:
            _accumulate_gradients(model, importance, images)
        pruner.step()
    model.zero_grad()
    return model


def _accumulate_gradients(model: nn.Module, importance: Any, images: Images) -> None:
    # The Hessian is that of single images. In eval mode they may as well pass one by one, in a fraction of the time.
    is_hessian = isinstance(importance, tp.importance.GroupHessianImportance)
    size = 1 if is_hessian else 128
    model.zero_grad()
    for part, labels in zip(images.images.split(size), images.labels.split(size), strict=True):
        if is_hessian:
            model.zero_grad()
        F.cross_entropy(model(part), labels, reduction="sum").backward()
        if is_hessian:
            importance.accumulate_grad(model)


@torch.no_grad()
def re_estimated(model: nn.Module, images: Images) -> nn.Module:
    """Return a copy of a model whose batch norms have the statistics of some images."""
    model = copy.deepcopy(model)
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    model.train()
    for part in images.images.split(128):
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def has_batch_norm(model: nn.Module) -> bool:
    """Tell whether there is anything to re-estimate."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
