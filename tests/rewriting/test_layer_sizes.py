"""After a resize, a layer made anew from the sizes that a layer tells is that layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 12), (3, 8)),
    "bias-free linear": (lambda: nn.Linear(8, 12, bias=False), (3, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3), (3, 8, 6)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1), (3, 8, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3), (3, 8, 4, 4, 4)),
    "grouped conv2d": (lambda: nn.Conv2d(8, 12, 3, groups=2), (3, 8, 6, 6)),
    "depthwise conv2d": (lambda: nn.Conv2d(8, 8, 3, groups=8), (3, 8, 6, 6)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(8, 12, 3), (3, 8, 6)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(8, 12, 2, stride=2), (3, 8, 6, 6)),
    "grouped transposed conv2d": (lambda: nn.ConvTranspose2d(8, 12, 2, groups=2), (3, 8, 6, 6)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(8, 12, 2), (3, 8, 4, 4, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(8), (3, 8, 4, 4)),
    "plain batch norm": (lambda: nn.BatchNorm1d(8, affine=False), (3, 8)),
    "instance norm": (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), (3, 8, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(8), (3, 8)),
    "rms norm": (lambda: nn.RMSNorm(8), (3, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 8), (3, 8, 4, 4)),
    "prelu": (lambda: nn.PReLU(8), (3, 8)),
    "rnn": (lambda: nn.RNN(8, 12, batch_first=True), (3, 5, 8)),
    "gru": (lambda: nn.GRU(8, 12, batch_first=True), (3, 5, 8)),
    "lstm": (lambda: nn.LSTM(8, 12, num_layers=2, batch_first=True), (3, 5, 8)),
}


class Between(nn.Module):
    """A layer between one that writes its channels and one that reads what it makes of them."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.before, self.layer = self._linear(shape), layer
        with torch.no_grad():
            result = layer(torch.zeros(shape))
        self.after = self._linear((result[0] if isinstance(result, tuple) else result).shape)

    def _linear(self, shape: tuple[int, ...]) -> nn.Module:
        kinds = {4: nn.Conv2d, 5: nn.Conv3d}
        if isinstance(getattr(self, "layer", None), nn.RNNBase) or len(shape) == 2 or shape == (3, 5, 8):
            return nn.Linear(shape[-1], shape[-1])
        return kinds.get(len(shape), nn.Conv1d)(shape[1], shape[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the three of them."""
        y = self.layer(self.before(x))
        return self.after(y[0] if isinstance(self.layer, nn.RNNBase) else y)


def made_anew(layer: nn.Module) -> nn.Module:
    """Return a layer of the same class, made from what a layer's attributes say."""
    names = _RECURRENT if isinstance(layer, nn.RNNBase) else list(inspect.signature(type(layer).__init__).parameters)
    options = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    if "bias" in options:
        options["bias"] = layer.bias if isinstance(layer.bias, bool) else layer.bias is not None
    return type(layer)(**options)


_RECURRENT = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional"]


@pytest.mark.parametrize("grows", [False, True], ids=["shrunk", "grown"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_made_from_its_sizes_takes_its_state(name: str, grows: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = Between(make(), shape).double().eval(), torch.randn(shape).double()
    gm = fxwidth.trace(model, x)
    free = fxwidth.analyze(gm).free
    # Widths that differ, so that a size in the place of another shows.
    widths = [group.width + 1 + i if grows else max(1, group.width - 1 - i) for i, group in enumerate(free)]
    plan = {group.name: width for group, width in zip(free, widths, strict=True)}
    assert len(plan) >= (1 if name in _ONE_GROUP else 2)
    fxwidth.resize(gm, plan, fold=False, exact=False)
    assert type(gm.layer) is type(make())
    assert any(node.op == "call_module" and node.target == "layer" for node in gm.graph.nodes)
    anew = made_anew(gm.layer).double().eval()
    anew.load_state_dict(gm.layer.state_dict())
    given = gm.before(x)
    results = [layer(given) for layer in (anew, gm.layer)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


# Layers that make of each channel one channel.
_ONE_GROUP = (
    *("depthwise conv2d", "batch norm", "plain batch norm", "instance norm"),
    *("layer norm", "rms norm", "group norm", "prelu"),
)
