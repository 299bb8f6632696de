"""Models that read and write buffers and other tensors of their own, in every way in which Python lets them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, OUT = 6, 10, 3


class Scaled(nn.Module):
    """Two layers, and what is between them is scaled by something."""

    def __init__(self, scale: Callable[[Scaled, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.register_buffer("n", torch.ones(HIDDEN))
        self.register_buffer("var", torch.ones(HIDDEN), persistent=False)
        self.fixed = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)
        self.plain, self.listed = torch.ones(HIDDEN), [torch.ones(HIDDEN)]
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.down(h * self.scale(self, h))


def _clamped(m: Scaled, _: Tensor) -> Tensor:
    return m.n.clamp(min=0.1)


def _root(m: Scaled, _: Tensor) -> Tensor:
    return torch.rsqrt(m.n.square() + 1e-5)


def _exponential(m: Scaled, _: Tensor) -> Tensor:
    return torch.exp(-m.var)


def _repeated(m: Scaled, _: Tensor) -> Tensor:
    return m.n[:1].repeat(m.n.shape[0])


def _by_size(m: Scaled, _: Tensor) -> Tensor:
    return m.n.view(m.n.size(0), 1)[:, 0] if m.n.dim() == 1 and len(m.n) > 1 and m.n.is_floating_point() else m.n


def _without_gradients(m: Scaled, _: Tensor) -> Tensor:
    with torch.no_grad():
        return m.n.square() + 1


def _chosen(m: Scaled, _: Tensor) -> Tensor:
    return m.n if m.n[0].item() > 100 else m.n + 1


def _plain(m: Scaled, _: Tensor) -> Tensor:
    return m.plain


def _plain_clamped(m: Scaled, _: Tensor) -> Tensor:
    return m.plain.clamp(min=0.1)


def _number_of_plain(m: Scaled, _: Tensor) -> Tensor:
    return m.n * m.plain[0].item()


def _listed_clamped(m: Scaled, _: Tensor) -> Tensor:
    return m.listed[0].clamp(min=0.1)


def _fixed(m: Scaled, _: Tensor) -> Tensor:
    return m._parameters["fixed"].clamp(min=0.1)


def _all_buffers(m: Scaled, _: Tensor) -> Tensor:
    return sum(buffer.exp() for buffer in m.buffers())


def _detached(m: Scaled, _: Tensor) -> Tensor:
    return next(iter(m.buffers())).detach()


def _add(m: Scaled, _: Tensor) -> Tensor:
    m.n.add_(1)
    return m.n


def _add_by_operator(m: Scaled, _: Tensor) -> Tensor:
    m.n += 1
    return m.n


def _add_to_a_view(m: Scaled, _: Tensor) -> Tensor:
    view = m.n[2:4]
    view *= 2
    return m.n


def _add_to_data(m: Scaled, _: Tensor) -> Tensor:
    data = m.n.data
    data += 1
    return m.n


def _in_data(m: Scaled, _: Tensor) -> Tensor:
    m.n.data.mul_(2)
    return m.n


def _new_data(m: Scaled, _: Tensor) -> Tensor:
    m.n.data = m.n + 1
    return m.n


def _replace(m: Scaled, _: Tensor) -> Tensor:
    old = m.n
    m.n = m.n + 1
    return m.n + old


def _replace_by_constant(m: Scaled, _: Tensor) -> Tensor:
    scale = m.n + 1
    m.n = torch.full(m.n.shape, 2.0, dtype=m.n.dtype)
    return scale


def _copy(m: Scaled, h: Tensor) -> Tensor:
    m.n.copy_(h.detach().mean(0))
    return m.n


def _set_item(m: Scaled, h: Tensor) -> Tensor:
    m.n[0] = h.detach().mean()
    return m.n


def _out(m: Scaled, _: Tensor) -> Tensor:
    torch.add(m.n, 1, out=m.n)
    return m.n


def _in_dict(m: Scaled, _: Tensor) -> Tensor:
    m._buffers["n"].add_(1)
    return m._buffers["n"]


def _moving(m: Scaled, h: Tensor) -> Tensor:
    with torch.no_grad():
        m.n.mul_(0.9).add_(0.1 * h.mean(0))
    return m.n


def _lerp(m: Scaled, h: Tensor) -> Tensor:
    m.var.lerp_(h.detach().mean(0), 0.1)
    return m.var


def _own_norm(m: Scaled, h: Tensor) -> Tensor:
    return F.batch_norm(h, m.n, m.var, training=True, momentum=0.1)


def _once(m: Scaled, h: Tensor) -> Tensor:
    if (m.n == 1).all():
        m.n.copy_(h.detach().mean(0) + 2)
    return m.n


def _write_plain(m: Scaled, _: Tensor) -> Tensor:
    m.plain.mul_(2)
    return m.plain


def _write_listed(m: Scaled, _: Tensor) -> Tensor:
    m.listed[0].mul_(2)
    return m.listed[0]


_SCALES = (
    *(_clamped, _root, _exponential, _repeated, _by_size, _without_gradients, _chosen, _plain, _plain_clamped),
    _number_of_plain,
    *(_listed_clamped, _fixed, _all_buffers, _detached, _add, _add_by_operator, _add_to_a_view, _add_to_data, _in_data),
    *(
        _new_data,
        _replace,
        _replace_by_constant,
        _copy,
        _set_item,
        _out,
        _in_dict,
        _moving,
        _lerp,
        _own_norm,
        _once,
        _write_plain,
    ),
    _write_listed,
)
BUFFERS = {scale.__name__.strip("_"): lambda scale=scale: Scaled(scale) for scale in _SCALES}


class OwnNorm(nn.Module):
    """A batch norm written by hand, in both modes by its running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("steps", torch.tensor(0))
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.var.mul_(0.9).add_(0.1 * x.detach().var(0))
        return (x - self.mean) * torch.rsqrt(self.var + 1e-5) * self.gain


class OwnNormWithoutGradients(OwnNorm):
    """The same, its statistics updated without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.steps += 1
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            self.var.lerp_(x.var(0), 0.1)
        return (x - self.mean) * torch.rsqrt(self.var + 1e-5) * self.gain


class Restless(OwnNorm):
    """The same, with a branch on a value, noise, and notes of what it has seen."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.seen, self.noise = [], torch.zeros(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.steps < 1000:
            self.seen.append(float(x.detach().mean()))
        self.noise.copy_(torch.randn(len(self.noise)))
        return super().forward(x) + 0.01 * self.noise


def normed(norm: type[OwnNorm]) -> nn.Module:
    """Return layers with a norm between them."""
    return nn.Sequential(nn.Linear(WIDTH, 8), norm(8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, OUT))
