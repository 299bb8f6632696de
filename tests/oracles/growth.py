"""Growth on the tape alone: prescribed ops on grown parameters, compared with the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxwidth
from fxwidth.axes.factors import axis_size
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.new_entries import new_entries
from fxwidth.growth.recipes import Growth, GrowthSearch, Recipe
from fxwidth.recording.tape import plain_kernels, tensors_in, unbind
from fxwidth.rules.registry import resized_call

EXACT = 1e-10

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten._unsafe_view.default)


def set_apart(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every gain, bias and statistic a random value: with fresh ones a wrong slot does not show."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=1):
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(0.5 + noise if "weight" in name or "var" in name or "scale" in name else noise - 0.4)
    return model


def width_graph(model: nn.Module, *inputs: Tensor) -> WidthGraph:
    """Return the analysis of a model whose numbers tell its channels apart."""
    return fxwidth.analyze(fxwidth.trace(set_apart(model), inputs), inputs)


def grown_maps(wg: WidthGraph, widths: Mapping[ChannelGroup, int]) -> IndexMaps:
    """Return the index maps for groups that grow, with the variance ratios their norms ask for."""
    kept = {g.factor: np.concatenate([np.arange(g.width), np.full(n - g.width, NEW)]) for g, n in widths.items()}
    maps = IndexMaps(wg.analysis.space, kept)
    ratios = {}
    for index in {index for group in widths for index in group.growth.norms}:
        call = wg.analysis.calls[index]
        axes = call.axes[call.arguments["input"]][-len(call.arguments["normalized_shape"]) :]
        ratios[index] = prod(map(axis_size, axes)) / prod(map(maps.size, axes))
    return maps.with_variance_ratios(ratios)


def grown_parameters(wg: WidthGraph, maps: IndexMaps) -> dict[str, Tensor]:
    """Return all parameters at their new sizes."""
    result = {}
    for name, entry in wg.analysis.parameters.items():
        tensor = entry.tensor.detach()
        for dim, axis in enumerate(entry.axes):
            if not maps.changes(axis):
                continue
            indices = torch.from_numpy(maps.indices(axis)).to(tensor.device)
            tensor = tensor.index_select(dim, indices.clamp(min=0))
            tensor = tensor.index_fill(dim, (indices == NEW).nonzero().flatten(), 0)
        result[name] = new_entries(wg.analysis, wg.growths(maps), maps, name, tensor)
    names = {entry.fake: name for name, entry in wg.analysis.parameters.items()}
    gains = {
        names[call.arguments["weight"]]: maps.variance_ratio(call.index)
        for call in wg.analysis.calls
        if call.arguments.get("weight") in names
    }
    return {name: tensor * gains[name] ** 0.5 if name in gains else tensor for name, tensor in result.items()}


def replay(wg: WidthGraph, maps: IndexMaps, parameters: Mapping[str, Tensor], *inputs: Tensor) -> list[Tensor]:
    """Run the prescribed ops of the tape on real tensors."""
    analysis = wg.analysis
    values = {entry.fake: parameters[name].clone() for name, entry in analysis.parameters.items()}
    values |= {fake: value.clone() for fake, value in zip(analysis.inputs, inputs, strict=True)}
    with torch.no_grad(), plain_kernels():
        for call in analysis.calls:
            if not call.outputs:
                continue
            func, arguments = resized_call(call, maps)
            real = pytree.tree_map(lambda leaf: values.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf, arguments)
            args, kwargs = unbind(func, real)
            result = aten.reshape.default(*args) if func in _RESHAPES else func(*args, **kwargs)
            for output, tensor, axes in zip(call.outputs, tensors_in(result), call.output_axes, strict=True):
                assert tuple(tensor.shape) == tuple(map(maps.size, axes)), f"{call.func} at node {call.node}"
                values[output] = tensor
    return [values[output] for output in analysis.outputs]


def change(wg: WidthGraph, widths: Mapping[ChannelGroup, int], *inputs: Tensor) -> float:
    """Return how much the outputs change when groups grow, relative to their size."""
    with torch.no_grad():
        before = tensors_in(wg.analysis.module(*inputs))
    maps = grown_maps(wg, widths)
    after = replay(wg, maps, grown_parameters(wg, maps), *inputs)
    gaps = [float((new - old).abs().max() / old.abs().max()) for new, old in zip(after, before, strict=True)]
    return float("inf") if any(np.isnan(gaps)) else max(gaps)


def change_by_recipe(wg: WidthGraph, group: ChannelGroup, width: int, recipe: Recipe, *inputs: Tensor) -> float:
    """Return how much the outputs change under a recipe that may not be exact, its norms rescaled all the same."""
    analysis = wg.analysis
    fills = GrowthSearch(analysis, wg.roles, group.factor).fills(recipe)
    norms = [
        call.index
        for call in analysis.calls
        for reduction in call.reductions
        if reduction.kind in ("layer norm", "RMS norm")
        and group.factor in analysis.space.factors(call.axes[reduction.tensor][reduction.dim])
    ]
    forced = ChannelGroup(
        **{name: getattr(group, name) for name in ("name", "width", "sites", "pinned", "mixed", "factor", "least")},
        find_growth=lambda: replace(Growth(recipe, None, fills), norms=tuple(norms)),
    )
    groups = wg.groups
    wg.groups = [forced if other is group else other for other in groups]
    try:
        return change(wg, {forced: width}, *inputs)
    finally:
        wg.groups = groups


def sequence(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def check_together(wg: WidthGraph, *inputs: Tensor) -> None:
    """Assert that all exact groups can grow at once."""
    exact = [group for group in wg.free if group.inexact_growth is None]
    assert exact
    assert change(wg, {group: group.width + (1, 5, 2)[i % 3] for i, group in enumerate(exact)}, *inputs) < EXACT


def check_all(wg: WidthGraph, *inputs: Tensor) -> None:
    """Assert that each exact group alone, by one and by five channels, and all of them at once keep the function."""
    for group in wg.free:
        for more in (1, 5) if group.inexact_growth is None else ():
            assert change(wg, {group: group.width + more}, *inputs) < EXACT, f"{group.name}: {group.growth}"
    if any(group.inexact_growth is None for group in wg.free):
        check_together(wg, *inputs)


def check_refusals(wg: WidthGraph, *inputs: Tensor) -> None:
    """Assert that no recipe would have kept the function of the groups that are called inexact."""
    for group in wg.free:
        if group.inexact_growth is None:
            continue
        for recipe in Recipe:
            assert change_by_recipe(wg, group, group.width + 3, recipe, *inputs) > 1e-7, (
                f"{group.name} by {recipe.name}"
            )


def recipes(wg: WidthGraph) -> dict[str, str]:
    """Return what is to be done for each group."""
    return {g.name: "inexact" if g.inexact_growth is not None else g.growth.recipe.name for g in wg.free}
