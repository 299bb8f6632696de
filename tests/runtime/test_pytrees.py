"""Nested values are taken apart into tensors and put together as what they were."""

from __future__ import annotations

import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxwidth.runtime.pytree_differences import difference
from fxwidth.runtime.pytrees import deep_tensors, flatten, map_leaves, rebuild, states_in

Pair = namedtuple("Pair", "left right")


@dataclass
class Answer:
    logits: Tensor
    name: str = "answer"


class Layer:
    """What no library has registered anywhere."""

    __slots__ = ("keys",)

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Cache:
    def __init__(self, *layers: Tensor) -> None:
        if not layers:
            raise ValueError("its constructor is not called again")
        self.layers = [Layer(layer) for layer in layers]
        self.first = self.layers[0]
        self.seen: dict[int, bool] = {}


class Named(dict[str, Any]):
    pass


def t(value: float) -> Tensor:
    return torch.tensor([value])


VALUES: dict[str, Any] = {
    "tensor": t(1),
    "tuple": (t(1), [t(2), None], {"a": t(3), "b": 4}),
    "namedtuple": Pair(t(1), "right"),
    "ordered": OrderedDict(z=t(1), a=t(2)),
    "dataclass": Answer(t(1)),
    "dict subclass": Named(a=t(1)),
    "cache": {"logits": t(0), "cache": Cache(t(1), t(2))},
    "no tensor": {"a": 1},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back(name: str) -> None:
    value = VALUES[name]
    leaves, structure = flatten(value)
    again = rebuild(pickle.loads(pickle.dumps(structure)), leaves)
    assert type(again) is type(value)
    assert all(one is other for one, other in zip(deep_tensors(again), deep_tensors(value), strict=True))
    assert difference(structure, flatten(again)[1]) is None


def test_objects_keep_who_they_share() -> None:
    again = map_leaves(lambda tensor: tensor + 1, Cache(t(1), t(2)))
    assert again.first is again.layers[0]
    assert [layer.keys.item() for layer in again.layers] == [2, 3]


def test_what_can_be_written_to_is_not_shared() -> None:
    leaves, structure = flatten(Cache(t(1)))
    one, other = rebuild(structure, leaves), rebuild(structure, leaves)
    one.seen[0] = True
    assert not other.seen


def test_circles_end() -> None:
    cache = Cache(t(1))
    cache.me = cache  # type: ignore[attr-defined]
    again = map_leaves(torch.neg, cache)
    assert again.me is again


def test_tensors_are_not_looked_into() -> None:
    """The attributes of a fake one lead to its mode, and to all that was ever computed of sizes."""
    with FakeTensorMode():
        fake = torch.empty(2)
    seen: list[Any] = []

    class Watching:
        def __init__(self) -> None:
            self.tensor = fake

        def __getattribute__(self, name: str) -> Any:
            seen.append(name)
            return super().__getattribute__(name)

    fake.watching = Watching()  # type: ignore[attr-defined]
    assert flatten([fake, {"a": fake}], (torch.SymInt,))[0] == []
    assert not seen
    assert flatten(fake.watching, (torch.Tensor,))[0] == [fake]
    assert "__dict__" in seen


def test_only_containers_and_dataclasses_are_there_to_be_read() -> None:
    value = {"answer": Answer(t(0)), "cache": Cache(t(1), t(2)), "pair": Pair(t(3), None)}
    assert [tensor.item() for tensor in states_in(value)] == [1, 2]


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ((t(1), None), (t(1), t(2)), "[1] is a tensor, not None"),
        ({"a": 1, "b": t(1)}, {"a": 2, "b": t(1)}, "['a'] is 2, not 1"),
        ({"a": t(1)}, {"b": t(1)}, " has other keys or another length"),
        ([t(1)], [t(1), t(2)], " has other keys or another length"),
        (Answer(t(1)), Answer(t(1), "other"), ".name is 'other', not 'answer'"),
        (Answer(t(1)), Cache(t(1)), " is a Cache, not a Answer"),
    ],
)
def test_differences_are_told(one: Any, other: Any, told: str) -> None:
    assert difference(flatten(one)[1], flatten(other)[1]) == told


def test_equal_objects_do_not_differ() -> None:
    assert difference(flatten((Answer(t(1)), Named(b=2)))[1], flatten((Answer(t(2)), Named(b=2)))[1]) is None
