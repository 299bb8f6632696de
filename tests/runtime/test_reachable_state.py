"""What a model's code keeps outside of the model is left as it was by traces and analyses, and holds no stand-ins."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import TrackedFake

import fxwidth
from fxwidth.runtime import module_state
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import ROUNDING
from tests.oracles.untouched import untouched

TABLES: dict[int, Tensor] = {}
FOUND: list[Tensor] = []
LAST: Tensor | None = None
SPACE = types.SimpleNamespace(last=None, many=[])
LOCAL = threading.local()
BY_MODULE: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
OUT = 3


def table(size: int) -> Tensor:
    return torch.tril(torch.ones(size, size, dtype=torch.float64))


@functools.lru_cache(None)
def cached(size: int) -> Tensor:
    return table(size)


@functools.lru_cache(4)
def cached_few(size: int) -> tuple[Tensor, ...]:
    return (table(size),)


@functools.lru_cache(4)
def listed(size: int) -> tuple[Tensor, ...]:
    return tuple(table(size).unbind())


def from_dict(size: int) -> Tensor:
    if size not in TABLES:
        TABLES[size] = table(size)
    return TABLES[size]


def from_default(size: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006 - shared on purpose
    return known.setdefault(size, table(size))


def from_global(size: int) -> Tensor:
    global LAST  # noqa: PLW0603 - as models do
    if LAST is None:
        LAST = table(size)
    return LAST


def from_attribute(size: int) -> Tensor:
    if not hasattr(from_attribute, "table"):
        from_attribute.table = table(size)  # type: ignore[attr-defined]
    return from_attribute.table  # type: ignore[attr-defined, no-any-return]


def from_space(size: int) -> Tensor:
    SPACE.last = table(size) if SPACE.last is None else SPACE.last
    return SPACE.last  # type: ignore[no-any-return]


def from_local(size: int) -> Tensor:
    if not hasattr(LOCAL, "table"):
        LOCAL.table = table(size)
    return LOCAL.table  # type: ignore[no-any-return]


class Registry:
    known: dict[int, Tensor] = {}  # noqa: RUF012 - shared on purpose

    @classmethod
    def get(cls, size: int) -> Tensor:
        return cls.known.setdefault(size, table(size))


def closure() -> Callable[[int], Tensor]:
    made: Tensor | None = None

    def get(size: int) -> Tensor:
        nonlocal made
        made = table(size) if made is None else made
        return made

    return get


TABLE_MAKERS: dict[str, Callable[[int], Any]] = {
    "lru_cache": cached,
    "lru_cache with a bound": lambda size: cached_few(size)[0],
    "lru_cache of several": lambda size: torch.stack(listed(size)),
    "dict": from_dict,
    "default": from_default,
    "global": from_global,
    "attribute of a function": from_attribute,
    "namespace": from_space,
    "thread": from_local,
    "class": Registry.get,
    "closure": closure(),
    "partial": functools.partial(from_default, known={}),
}


class Masked(nn.Module):
    """Uses a table that is made once, in a form that `torch.export` or nobody follows."""

    def __init__(self, make: Callable[[int], Tensor], looks: bool) -> None:
        super().__init__()
        self.up, self.down, self.make, self.looks = nn.Linear(10, 8), nn.Linear(8, OUT), make, looks

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.zeros(OUT, dtype=x.dtype)
        scale[1:] = 1.0
        if self.looks:
            assert x.sum() < 1e9
        return self.down(torch.relu(self.up(x))) @ self.make(OUT) * scale


def forget() -> None:
    """Empty all that is kept here."""
    global LAST
    LAST, SPACE.last = None, None
    for one in (TABLES, FOUND, SPACE.many, Registry.known, vars(LOCAL), vars(from_attribute), BY_MODULE):
        one.clear()
    for one in (cached, cached_few, listed):
        one.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    forget()
    yield
    forget()


def stand_ins() -> list[Any]:
    """Return all fake tensors and proxies alive, but those by which torch's exporter knows sizes of inputs."""
    for _ in range(3):  # what torch holds too is let go one after the other
        gc.collect()
    # By types: some objects of torch answer with a warning when they are asked.
    alive = [one for one in gc.get_objects() if issubclass(type(one), (FakeTensor, fx.Proxy, TrackedFake))]
    tracked = {id(one.fake) for one in alive if type(one) is TrackedFake}
    return [one for one in alive if type(one) is not TrackedFake and id(one) not in tracked]


@pytest.mark.parametrize(
    ("name", "looks", "before"),
    [*((name, False, False) for name in TABLE_MAKERS), ("lru_cache", True, False), ("dict", True, True)]
    + [("closure", False, True)],
)
def test_tables_that_are_made_once_hold_no_stand_ins(name: str, looks: bool, before: bool) -> None:
    model = Masked(TABLE_MAKERS[name], looks).double().eval()
    x = torch.randn(4, 10, dtype=torch.float64)
    wanted = copy.deepcopy(model.state_dict())
    if before:
        model(x)
    gm = fxwidth.trace(model, x)
    fxwidth.analyze(gm)
    made = TABLE_MAKERS[name](OUT)
    assert type(made) is Tensor
    assert torch.equal(made, table(OUT))
    assert type(model(x)) is type(gm(x)) is Tensor
    assert largest_difference([gm(x)], [model(x)]) < ROUNDING
    assert all(torch.equal(tensor, wanted[path]) for path, tensor in model.state_dict().items())


def into_list(_: Any, __: Any, answer: Tensor) -> None:
    FOUND.append(answer)


class Extractor:
    """Keeps what layers answer."""

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}

    def hook(self, _: Any, __: Any, answer: Tensor) -> None:
        self.features["last"] = answer.detach()


class ExtractorModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, _: Any, __: Any, answer: Tensor) -> None:
        self.features.append(answer)


def into_closure() -> tuple[Any, Callable[[], Any]]:
    features: dict[str, Tensor] = {}
    return (lambda _, __, answer: features.__setitem__("last", answer)), lambda: list(features.values())


def by_object() -> tuple[Any, Callable[[], Any]]:
    one = Extractor()
    return one.hook, lambda: list(one.features.values())


def by_module() -> tuple[Any, Callable[[], Any]]:
    one = ExtractorModule()
    return one, lambda: one.features


def by_partial() -> tuple[Any, Callable[[], Any]]:
    features: list[Tensor] = []
    return functools.partial(lambda kept, _, __, answer: kept.append(answer), features), lambda: features


def by_weak_dict() -> tuple[Any, Callable[[], Any]]:
    return (lambda part, _, answer: BY_MODULE.__setitem__(part, answer)), lambda: list(BY_MODULE.values())


HOOKS: dict[str, Callable[[], tuple[Any, Callable[[], Any]]]] = {
    "list": lambda: (into_list, lambda: FOUND),
    "namespace": lambda: (lambda _, __, answer: SPACE.many.append(answer), lambda: SPACE.many),
    "closure": into_closure,
    "object": by_object,
    "module": by_module,
    "partial": by_partial,
    "weak dict": by_weak_dict,
}


@pytest.mark.parametrize(
    ("name", "everywhere"),
    # A module that is a hook of all modules is one of itself too, and is called without an end.
    [(name, everywhere) for name in HOOKS for everywhere in (False, True) if (name, everywhere) != ("module", True)],
    ids=lambda value: value if isinstance(value, str) else ("all modules" if value else "one layer"),
)
def test_what_hooks_keep_is_kept_by_the_graph_and_not_by_looking(name: str, everywhere: bool) -> None:
    hook, kept = HOOKS[name]()
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    register = nn.modules.module.register_module_forward_hook if everywhere else model[0].register_forward_hook
    handle = register(hook)
    try:
        x = torch.randn(4, 10, dtype=torch.float64)
        with untouched(model):
            gm = fxwidth.trace(model, x)
            wg = fxwidth.analyze(gm)
            fxwidth.spectrum(wg, data=[x])
        assert not kept()
        with torch.no_grad():  # torch copies no tensor that has a history, and a graph is copied with its hooks
            gm(x)
        found = [tensor.clone() for tensor in kept()]
        # Of all modules, some keep the last answer alone.
        wanted = F.linear(x, model[0].weight, model[0].bias)
        assert any(torch.equal(tensor, wanted) for tensor in found) or (everywhere and len(found) == 1)
        before = list(kept())
        fxwidth.resize(gm, {"0": 4}, data=[x])
        assert all(one is other for one, other in zip(before, kept(), strict=True))
        copy.deepcopy(gm)
    finally:
        handle.remove()


def test_an_analysis_looks_once_at_what_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].register_forward_hook(into_list)
    gm = fxwidth.trace(model, torch.randn(4, 10))
    found: list[int] = []
    reach = module_state.keep_reachable
    monkeypatch.setattr(module_state, "keep_reachable", lambda parts: found.append(len(list(parts))) or reach(parts))
    fxwidth.analyze(gm)
    assert len(found) == 1
    assert not FOUND


class Guarded:
    """Answers no question but those of its type."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} has been asked for")


GUARDED = Guarded()


class Mentioning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.guarded = nn.Linear(4, 3), [Guarded()]

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if GUARDED is not None else x


def test_objects_are_not_asked_by_their_own_code() -> None:
    x = torch.randn(2, 4)
    model = Mentioning()
    fxwidth.analyze(fxwidth.trace(model, x))
    assert type(model.guarded[0]) is Guarded


def test_nothing_alive_refers_to_a_stand_in() -> None:
    """As found by the collector of garbage, which knows of all that is kept anywhere."""
    hook, _ = into_closure()
    model = Masked(cached_few, looks=False).double().eval()
    model.make = lambda size: cached_few(size)[0] + from_dict(size) + Registry.get(size)
    model.up.register_forward_hook(hook)
    before = stand_ins()
    gm = fxwidth.trace(model, torch.randn(4, 10, dtype=torch.float64))
    fxwidth.analyze(gm)
    # A graph may know them.
    gm.meta.clear()
    for node in gm.graph.nodes:
        node.meta.clear()
    known = set(map(id, before))
    assert not [one for one in stand_ins() if id(one) not in known]
