"""What is known of the shapes of a graph's inputs: from examples, from the graph's notes, or from its first layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.shape_prop import TensorMetadata

from fxwidth.analysis.axis_propagation import analyze_axes
from fxwidth.analysis.result import Analysis, TensorSpec
from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import Call
from fxwidth.frontends.placeholder_calls import bound_to_placeholders
from fxwidth.recording.graph_meta import INPUTS, notes_of
from fxwidth.runtime.pytrees import deep_tensors, flatten, map_leaves, rebuild

# How many samples of integers are remembered, and of how many numbers, of which one sample may have more.
_SAMPLES, _NUMBERS = 64, 2**20


def input_specs(module: fx.GraphModule, call: Call | None = None) -> list[Any]:
    """Return the value of each placeholder of a graph, with a `TensorSpec` for each tensor in it.

    Raises:
        FxwidthError: the inputs do not fit the placeholders, or none are given and none can be found.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    if call is not None:
        device = device_of(module)
        given = bound_to_placeholders(module, call)
        return [
            map_leaves(lambda leaf: TensorSpec(tuple(leaf.shape), leaf.dtype, device, leaf.layout), value)
            for value in given
        ]
    noted = notes_of(module).get(INPUTS, ())
    if len(noted) == len(placeholders):
        return list(noted)
    carried = [_carried_spec(node) for node in placeholders]
    if all(spec is not None for spec in carried):
        return [spec[0] for spec in carried if spec is not None]
    return _inferred_specs(module, placeholders)


def where_module_is(specs: Sequence[Any], module: nn.Module) -> list[Any] | None:
    """Return the specs on the device and in the floating dtype that a module has now, or None where they are so.

    A module that has been converted or moved since takes other inputs than those that were noted of it.
    """
    device = device_of(module)
    tensors = chain(module.parameters(), module.buffers())
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

    def moved(spec: TensorSpec) -> TensorSpec:
        own = spec.dtype if dtype is None or not spec.dtype.is_floating_point else dtype
        return replace(spec, dtype=own, device=device)

    found = [map_leaves(moved, value, TensorSpec) for value in specs]
    return None if found == list(specs) else found


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's parameters or buffers are; the CPU when it has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def known_shape(value: Tensor | TensorMetadata) -> tuple[int, ...]:
    """Return the shape of a value in a graph; a symbolic batch size takes the value it was exported with."""
    return tuple(size if isinstance(size, int) else _hint(size) for size in value.shape)


def _carried_spec(node: fx.Node) -> tuple[Any] | None:
    """Return what a placeholder's metadata says, as torch.export (`val`) or ShapeProp (`tensor_meta`) write it."""
    for key in ("val", "tensor_meta", "example_value"):
        known = node.meta.get(key)
        if isinstance(known, (Tensor, TensorMetadata)):
            owner = node.graph.owning_module
            return (TensorSpec(known_shape(known), known.dtype, device_of(owner) if owner else torch.device("cpu")),)
    if isinstance(node.meta.get("val"), (bool, int, float, str)):
        return (node.meta["val"],)
    return (node.args[0],) if node.args else None


def with_batch_of_two(specs: Sequence[Any]) -> list[Any] | None:
    """Return the specs with a batch of two where all have a batch of one, which cannot be told from a broadcast dim."""
    tensors = [spec for spec in flatten(tuple(specs), (TensorSpec,))[0] if spec.shape]
    if not all(spec.shape[0] == 1 for spec in tensors):
        return None
    return [map_leaves(lambda spec: spec.with_batch(2) if spec.shape else spec, value, TensorSpec) for value in specs]


def real_inputs(module: fx.GraphModule, specs: Sequence[Any], call: Call | None) -> list[Any]:
    """Return a real value for each placeholder of a graph: those of a call where there are some, else random ones."""
    given: list[Any] = [None] * len(specs) if call is None else bound_to_placeholders(module, call)
    generator = torch.Generator().manual_seed(0)
    result = []
    for value, spec in zip(given, specs, strict=True):
        wanted, structure = flatten(spec, (TensorSpec,))
        known = deep_tensors(value) if call is not None else [None] * len(wanted)
        tensors = [_real(*pair, generator) for pair in zip(wanted, known, strict=True)]
        result.append(rebuild(structure, tensors))
    return result


def whole_numbers(values: Sequence[Any]) -> list[Tensor | None]:
    """Return the tensors of integers among the values of placeholders, with None for each other tensor.

    Lengths and counts must fit each other, which noise in their place would not.
    """
    tensors = deep_tensors(tuple(values))
    return [None if tensor.is_floating_point() or tensor.is_complex() else tensor for tensor in tensors]


def integer_examples(analysis: Analysis, given: Sequence[Any]) -> list[Tensor | None]:
    """Return some samples of the integers among the inputs of an example, with None for each other tensor.

    What they may be is not told by their type; noise in the place of inputs goes by them.

    Args:
        analysis: the graph, analysed on inputs like these.
        given: one value per placeholder.
    """
    tensors = deep_tensors(tuple(given))
    fakes = deep_tensors(tuple(analysis.inputs))
    if len(tensors) != len(fakes):
        return []
    return [
        None
        if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta or isinstance(tensor, FakeTensor)
        else _some_samples(analysis, *pair)
        for tensor, *pair in zip(tensors, tensors, fakes, strict=True)
    ]


def _some_samples(analysis: Analysis, tensor: Tensor, fake: Tensor) -> Tensor:
    if fake.dim() and any(factor.is_batch for factor in analysis.space.factors(analysis.axes_of(fake)[0])):
        tensor = tensor[: max(1, min(_SAMPLES, _NUMBERS // max(1, tensor[:1].numel())))]
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _real(spec: TensorSpec, known: Tensor | None, generator: torch.Generator) -> Tensor:
    if known is None and spec.dtype.is_floating_point:
        known = torch.rand(spec.shape, generator=generator, dtype=torch.float32, device="cpu")
    elif known is None:
        known = torch.zeros(spec.shape, device="cpu")
    if tuple(known.shape) != spec.shape:
        known = known.repeat(2, *[1] * (known.dim() - 1))
    return known.detach().to(spec.device, spec.dtype)


def _hint(size: Any) -> int:
    hint = getattr(size.node, "hint", None)
    return int(hint) if hint is not None else 2


_SPATIAL_SIZES = (64, 32, 224, 28, 96, 8, 16, 48, 56, 112, 128, 160, 192, 256, 299, 384)


def _inferred_specs(module: fx.GraphModule, placeholders: Sequence[fx.Node]) -> list[Any]:
    """Find shapes from the layers that take the inputs, where only one answer fits."""
    device = device_of(module)
    templates = [(node.args[0],) if node.args else _template(module, node) for node in placeholders]
    unknown = [str(node.target) for node, template in zip(placeholders, templates, strict=True) if template is None]
    if not unknown:
        fitting = []
        for size in _SPATIAL_SIZES:
            specs = [_at_size(template[0], size, device) for template in templates if template is not None]
            if _runs(module, specs):
                fitting.append(specs)
            # Two sizes that both fit mean that positions do not matter, as with global pooling.
            if len(fitting) == 2:
                break
        if fitting:
            return fitting[0]
        unknown = [str(node.target) for node in placeholders]
    raise FxwidthError(
        f"no shape is known for input {', '.join(map(repr, unknown))} of the graph and its first layers do not tell; "
        "pass example_inputs with a tensor for it, batch first."
    )


def _template(module: fx.GraphModule, node: fx.Node) -> tuple[Any] | None:
    """Return (dtype, sizes behind the batch with None for positions) from the one kind of layer that takes an input."""
    found = set()
    for user in node.users:
        layer = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(layer, nn.modules.conv._ConvNd):
            found.add((layer.weight.dtype, (layer.in_channels, *([None] * (layer.weight.dim() - 2)))))
        elif isinstance(layer, nn.Linear):
            found.add((layer.weight.dtype, (layer.in_features,)))
        elif isinstance(layer, nn.Embedding):
            found.add((torch.int64, (None,)))
    return (found.pop(),) if len(found) == 1 else None


def _at_size(template: Any, size: int, device: torch.device) -> Any:
    if not isinstance(template, tuple):
        return template
    dtype, sizes = template
    return TensorSpec((2, *(size if known is None else known for known in sizes)), dtype, device)


def _runs(module: fx.GraphModule, specs: list[Any]) -> bool:
    try:
        analyze_axes(module, specs)
    except FxwidthError:
        return False
    return True
