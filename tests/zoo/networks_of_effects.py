"""Networks that do more than compute tensors: with gradients, with what is kept for them, and with random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

WIDTH, HIDDEN, OUT = 6, 8, 3


class Effect(nn.Module):
    """Two layers, between which something is done."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(torch.relu(self.up(x))))

    def between(self, h: Tensor) -> Tensor:
        raise NotImplementedError


def _halved(gradient: Tensor) -> Tensor:
    return 0.5 * gradient


class HookOnGradient(Effect):
    def between(self, h: Tensor) -> Tensor:
        h.register_hook(_halved)
        return h


class HookIfWanted(Effect):
    def between(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(lambda gradient: 0.5 * gradient)
        return h


class HookOnNode(Effect):
    def between(self, h: Tensor) -> Tensor:
        if h.grad_fn is not None:
            h.grad_fn.register_prehook(lambda gradients: (0.5 * gradients[0],))
        return h


class HookOnMany(Effect):
    def between(self, h: Tensor) -> Tensor:
        other = torch.tanh(h)
        torch.autograd.graph.register_multi_grad_hook((h, other), lambda _: None)
        return h + other


class HookOnManyAndParameter(Effect):
    """Its parameter would have a gradient even where what is computed has none."""

    def between(self, h: Tensor) -> Tensor:
        torch.autograd.graph.register_multi_grad_hook((h, self.up.weight), lambda _: None)
        return h


class _Halving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.5 * gradient


class OwnGradient(Effect):
    def between(self, h: Tensor) -> Tensor:
        return _Halving.apply(h)


class GradientScale(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(_halved)
        return h


class HookInPart(Effect):
    def __init__(self) -> None:
        super().__init__()
        self.scale = GradientScale()

    def between(self, h: Tensor) -> Tensor:
        return self.scale(h)


class HookOnModule(Effect):
    """Has a hook on the gradients of a part that is traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.part.register_full_backward_pre_hook(lambda _, gradients: (0.5 * gradients[0],))

    def between(self, h: Tensor) -> Tensor:
        return self.part(h)


def hook_on_root() -> nn.Module:
    model = Identity()
    model.register_full_backward_pre_hook(lambda _, gradients: (0.5 * gradients[0],))
    return model


class Identity(Effect):
    def between(self, h: Tensor) -> Tensor:
        return h


class GradientInside(Effect):
    """Adds the gradient of its own answer, as models of forces do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.down(torch.tanh(self.up(place)))
            (force,) = torch.autograd.grad(energy.sum(), place, create_graph=True)
        return energy + force.sum(1, keepdim=True)


class BackwardInside(Effect):
    def between(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            place = h.detach().requires_grad_()
            place.square().sum().backward()
        assert place.grad is not None
        return h + place.grad


class AsksForGradients(Effect):
    def between(self, h: Tensor) -> Tensor:
        return 2 * h if torch.is_grad_enabled() else h


class InferenceInside(Effect):
    def between(self, h: Tensor) -> Tensor:
        with torch.inference_mode():
            mask = h > h.mean()
        return h * mask.clone()


class KeptOnCpu(Effect):
    def between(self, h: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return torch.tanh(h)


class Seeded(Effect):
    def between(self, h: Tensor) -> Tensor:
        before = torch.get_rng_state()
        torch.manual_seed(3)
        noise = torch.rand_like(h)
        torch.set_rng_state(before)
        return h * noise


class Forked(Effect):
    def between(self, h: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            noise = torch.rand_like(h)
        return h * noise


class ForkedUnseeded(Effect):
    def between(self, h: Tensor) -> Tensor:
        with torch.random.fork_rng():
            noise = torch.rand_like(h)
        return h * noise


class OwnGenerator(Effect):
    """Draws from a generator of its own, which goes on from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def between(self, h: Tensor) -> Tensor:
        return h * torch.rand(HIDDEN, generator=self.generator, dtype=torch.float64)


class MadeGenerator(Effect):
    def between(self, h: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return h + torch.empty_like(h).normal_(generator=generator)


class _Checkpointing(Effect):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(
            nn.Linear(HIDDEN, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, HIDDEN)
        )


class Checkpointed(_Checkpointing):
    def between(self, h: Tensor) -> Tensor:
        return checkpoint(self.part, h, use_reentrant=False)


class CheckpointedInSteps(_Checkpointing):
    def between(self, h: Tensor) -> Tensor:
        return checkpoint_sequential(self.part, 2, h, use_reentrant=False)


class CheckpointedReentrant(_Checkpointing):
    def between(self, h: Tensor) -> Tensor:
        return checkpoint(self.part, h, use_reentrant=True) if h.requires_grad else self.part(h)


class CheckpointedInTraining(_Checkpointing):
    """Is checkpointed when it is trained, as the parts of many libraries are."""

    def between(self, h: Tensor) -> Tensor:
        return checkpoint(self.part, h, use_reentrant=False) if self.training else self.part(h)


def checkpointed_part() -> nn.Module:
    return nn.Sequential(CheckpointedInTraining(), nn.Linear(OUT, OUT))


class HookBesideSize(Effect):
    """Has a width written in beside a hook, so that it must be called as it is."""

    def between(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(_halved)
        return h.view(-1, 2, HIDDEN // 2).softmax(2).flatten(1)


class HookInTraining(HookBesideSize):
    def between(self, h: Tensor) -> Tensor:
        if self.training:
            return super().between(h)
        return h.view(-1, 2, HIDDEN // 2).softmax(2).flatten(1)


class WithoutGradients(Effect):
    """Has a part without gradients beside what no front end follows."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(h).view(-1, 2, HIDDEN // 2).flatten(1)
        if torch.is_grad_enabled():
            h = h * 1.0
        return F.relu(h * gate)


def rows(batch: int = 4) -> Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


EFFECTS: dict[str, Callable[[], nn.Module]] = {
    "a hook on a gradient": HookOnGradient,
    "a hook if there is a gradient": HookIfWanted,
    "a hook on a node": HookOnNode,
    "a hook on many": HookOnMany,
    "a hook on many and a parameter": HookOnManyAndParameter,
    "a gradient of its own": OwnGradient,
    "a hook in a part": HookInPart,
    "a hook on a module": HookOnModule,
    "a hook on the model": hook_on_root,
    "a gradient inside": GradientInside,
    "a backward pass inside": BackwardInside,
    "asks for gradients": AsksForGradients,
    "inference mode inside": InferenceInside,
    "kept elsewhere": KeptOnCpu,
    "seeded": Seeded,
    "forked": Forked,
    "forked, not seeded": ForkedUnseeded,
    "a generator of its own": OwnGenerator,
    "a generator made for it": MadeGenerator,
    "a part without gradients": WithoutGradients,
    "checkpointed": Checkpointed,
    "checkpointed in steps": CheckpointedInSteps,
    "checkpointed, reentrant": CheckpointedReentrant,
    "checkpointed in training, a part": checkpointed_part,
}
CHECKPOINTED: dict[str, Callable[[], Any]] = {name: make for name, make in EFFECTS.items() if "check" in name}
