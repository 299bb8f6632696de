"""A resized network in eight bits, by torchao: pip install 'fxwidth[deploy]'."""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import fxwidth


def error(quantized: nn.Module, gm: nn.Module, rows: Tensor) -> float:
    """Return the error of a network in eight bits, as a share of what it returns."""
    with torch.no_grad():
        wanted = gm(rows)
        return float((quantized(rows) - wanted).norm() / wanted.norm())


def prepared(model: nn.Module, rows: Tensor) -> torch.fx.GraphModule:
    """Return a model with observers for static quantization."""
    program = torch.export.export(model, (rows,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=1024)},))
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    made: torch.fx.GraphModule = prepare_pt2e(program.module(), quantizer)
    return made


def main(batch: int) -> float:
    """Return the largest error that eight bits make of a resized network, as a share of what it returns."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    rows = torch.randn(64, 32)
    observed = prepared(copy.deepcopy(net), rows)
    observed(rows)
    before = sum(parameter.numel() for parameter in net.parameters())
    gm = fxwidth.evolve(net, rows, params=0.5)
    print(f"{before} -> {sum(parameter.numel() for parameter in gm.parameters())} parameters")

    given, errors = torch.randn(batch, 32), {}
    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        quantized = copy.deepcopy(gm)
        quantize_(quantized, config)
        errors[type(config).__name__] = error(quantized, gm, given)

    static = prepared(gm, rows)
    static(rows)
    errors["pt2e, resized and then prepared"] = error(convert_pt2e(static), gm, given)

    # Observers that have seen something go along with a resize, and look at the network of the new widths then.
    resized = fxwidth.resize(fxwidth.trace(observed, rows), {"0": 32, "2": 32})
    resized(rows)
    as_observed = copy.deepcopy(resized)
    errors["pt2e, prepared and then resized"] = error(convert_pt2e(resized), as_observed, given)
    for name, share in errors.items():
        print(f"{name}: {100 * share:.2f} %")
    return max(errors.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=7)
    main(parser.parse_args().batch)
