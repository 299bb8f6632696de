"""A short way through `FakeTensorMode` for the plain ops that make up nearly all of a tape.

An op's results are determined by the shapes, strides, dtypes and devices of its operands and by its literals. What
FakeTensorMode found for them once is remembered here, at a fraction of what its own cache costs. The mode is asked as
before when anything is out of the ordinary: tensors of other kinds, values that are known, symbolic sizes, ops that
write to several operands or whose results depend on values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.utils import _pytree as pytree

# One result: shape, stride, storage offset, dtype, device.
_Made = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device]


class _Kind(Enum):
    FRESH = auto()
    VIEW = auto()
    WRITTEN = auto()  # the result is the first operand


@dataclass(frozen=True)
class _Outcome:
    kind: _Kind
    results: tuple[_Made, ...]
    container: type | None


_LITERALS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_PLAIN_DTYPES = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8}
    | {torch.int8, torch.int16, torch.int32, torch.int64}
)
_UNSURE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
_MOST_ENTRIES = 50_000
_META = torch.device("meta")
# torch's own, since models that ask are told of while they are traced.
_is_grad_enabled = torch.is_grad_enabled
# What is kept on a mode, and how a tensor made here is known.
_ATTRIBUTES, _IS_PLAIN = "_fxwidth_attributes", "_fxwidth_is_plain"

# None for calls whose outcome cannot be remembered.
_known: dict[tuple[Any, ...], _Outcome | None] = {}


def run_op(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an ATen op: on fake tensors, as their mode would, but quicker where the outcome is known already."""
    kind = _kind(func)
    mode = _mode_of(args, kwargs) if kind is not None else None
    if mode is None or _is_grad_enabled():
        return func(*args, **kwargs)
    parts: list[Any] = [func, torch.get_default_dtype()]
    if not (_describe(args, mode, parts) and (not kwargs or _describe((*kwargs, *kwargs.values()), mode, parts))):
        return func(*args, **kwargs)
    key = tuple(parts)
    outcome = _known.get(key)
    if outcome is None:
        result = func(*args, **kwargs)
        if key not in _known:
            if len(_known) >= _MOST_ENTRIES:
                _known.clear()
            assert kind is not None
            _known[key] = _remembered(kind, args, kwargs, result)
        return result
    if outcome.kind is _Kind.WRITTEN:
        return args[0]
    source = args[0] if outcome.kind is _Kind.VIEW else None
    results = [_make(mode, made, source) for made in outcome.results]
    return results[0] if outcome.container is None else outcome.container(results)


def fake_like(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return the fake that stands for a parameter or buffer from now on, as `mode.from_tensor` does."""
    dtype, device, kind = tensor.dtype, tensor.device, type(tensor)
    if kind not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor._is_view():
        return mode.from_tensor(tensor)
    if dtype not in _PLAIN_DTYPES or device.type == "meta":
        return mode.from_tensor(tensor)
    shape = tensor.shape
    is_counter = not shape
    if is_counter and (dtype != torch.int64 or device.type != "cpu"):
        return mode.from_tensor(tensor)
    fake = _make(mode, (shape, tensor.stride(), 0, dtype, device), None)
    if tensor.requires_grad:
        fake.requires_grad_()
    if kind is nn.Parameter:
        fake._is_param = True
    if is_counter:
        fake.item_memo = tensor.item()
    converter = mode.fake_tensor_converter
    if isinstance(converter, _Converter):
        converter.stand_ins[id(tensor)] = ref(tensor), fake
    else:
        converter.set_tensor_memo(tensor, fake)
    return fake


def fake_mode() -> FakeTensorMode:
    """Return a mode in which tensors have shapes but no values; plain tensors met on the way are taken in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter = _Converter()
    return mode


class _Converter(FakeTensorConverter):
    """Hands out the fakes made by `fake_like` where code comes by a real parameter another way."""

    def __init__(self) -> None:
        super().__init__()
        # By identity, and weakly: a mode and its fakes hold each other, and would hold the weights of old networks.
        self.stand_ins: dict[int, tuple[ref[Tensor], FakeTensor]] = {}

    def from_real_tensor(self, fake_mode: FakeTensorMode, t: Tensor, *args: Any, **kwargs: Any) -> FakeTensor:
        """Return the fake of a real tensor."""
        known = self.stand_ins.get(id(t))
        if known is not None and known[0]() is t:
            return known[1]
        return super().from_real_tensor(fake_mode, t, *args, **kwargs)


@cache
def _kind(func: OpOverload) -> _Kind | None:
    schema = func._schema
    if func.namespace != "aten" or any(tag in func.tags for tag in _UNSURE):
        return None
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return None
    if schema.is_mutable:
        written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
        in_place = written == schema.arguments[:1] and func._schema.name.endswith("_") and len(schema.returns) == 1
        return _Kind.WRITTEN if in_place else None
    if func.is_view or func is torch.ops.aten._unsafe_view.default:
        return _Kind.VIEW
    return _Kind.FRESH if all(result.alias_info is None for result in schema.returns) else None


def _mode_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> FakeTensorMode | None:
    """Return the mode of the first fake operand, or for a factory told its device, the mode it would be taken in by."""
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, FakeTensor):
            return first.fake_mode
    if kwargs.get("device") is None:
        return None
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode if isinstance(mode, FakeTensorMode) else None


def _describe(values: Sequence[Any], mode: FakeTensorMode, parts: list[Any]) -> bool:
    """Append what an outcome depends on to the parts of a key; return False where that cannot be told."""
    parts.append(len(values))
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not mode or not (_IS_PLAIN in value.__dict__ or _is_plain(value)):
                return False
            parts += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif kind in _LITERALS:
            # 1, 1.0 and True are one dict key, but make results of different dtypes.
            parts += (kind, value)
        elif kind not in (list, tuple) or not _describe(value, mode, parts):
            return False
    return True


def _is_plain(fake: FakeTensor) -> bool:
    return fake.constant is None and fake.layout is torch.strided and not fake.dtype.is_complex


def _remembered(kind: _Kind, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Outcome | None:
    """Return what is to be remembered of an outcome: only what `_make` reproduces to the last detail."""
    if kind is _Kind.WRITTEN:
        return _Outcome(kind, (), None) if result is args[0] else None
    container = type(result) if type(result) in (list, tuple) else None
    results = [result] if container is None else list(result)
    if not all(type(one) is FakeTensor and _is_plain(one) and not one.requires_grad for one in results):
        return None
    operands = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    storages = {_storage(operand) for operand in operands}
    if kind is _Kind.VIEW:
        if len(operands) != 1 or operands[0] is not args[0]:
            return None
        if any(one is args[0] or _storage(one) not in storages for one in results):
            return None
    elif any(one.storage_offset() or _storage(one) in storages for one in results):
        return None
    made = tuple((tuple(r.shape), r.stride(), r.storage_offset(), r.dtype, r.fake_device) for r in results)
    return _Outcome(kind, made, container)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _make(mode: FakeTensorMode, made: _Made, source: FakeTensor | None) -> FakeTensor:
    shape, stride, offset, dtype, device = made
    with torch._C._DisableTorchDispatch():
        if source is None:
            plain = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
        else:
            plain = torch.empty((), dtype=dtype, device=_META)
            plain.set_(source.untyped_storage(), offset, shape, stride)
    return _dressed(mode, plain, device)


def _dressed(mode: FakeTensorMode, plain: Tensor, device: torch.device) -> FakeTensor:
    """Return a fake made of a tensor on the meta device, as FakeTensor's constructor does at ten times the cost."""
    known = vars(mode).get(_ATTRIBUTES)
    if known is None:
        known = mode.__dict__[_ATTRIBUTES] = {}
    attributes = known.get(device)
    if attributes is None:
        # Fakes of one mode and device carry the same attributes when they are made: these are copied from the first.
        fake = FakeTensor(mode, plain, device)
        known[device] = {**{name: value for name, value in vars(fake).items() if name != "fake_mode"}, _IS_PLAIN: True}
        return fake
    fake = Tensor._make_subclass(FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=device)
    torch._C._set_throw_on_mutable_data_ptr(fake)
    fake.__dict__ = attributes.copy()
    fake.fake_mode = mode
    return fake
