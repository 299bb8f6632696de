"""The comparison of a model before and after: whatever changes is seen, and nothing is seen where nothing changes."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.oracles.untouched import differences, snapshot, untouched


class Model(nn.Module):
    """Holds something of every kind."""

    shared: list[int] = []  # noqa: RUF012 - shared on purpose

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("n", torch.ones(2))
        self.plain = torch.tensor([0.0, float("nan")])
        self.config = OrderedDict(a=[1, {"b": {2}}], c=0)
        self.settings = SimpleNamespace(calls=0, table=np.zeros(2))
        self.generator = torch.Generator()
        self.count, self.itself = 0, self.layer


def _gradient(m: Model) -> None:
    m.layer.weight.grad = torch.zeros(2, 3)


def _parameter(m: Model) -> None:
    m.layer.weight = nn.Parameter(m.layer.weight.detach().clone())


# Each does one thing to a model, or to the global state.
FAULTS: dict[str, Callable[[Model], object]] = {
    "value of a buffer": lambda m: m.n.data.add_(1),
    "a write that changes no value": lambda m: m.n.add_(0),
    "buffer replaced by an equal one": lambda m: setattr(m, "n", m.n.clone()),
    "sign of zero in a plain tensor": lambda m: m.plain.data.mul_(-1),
    "parameter replaced": _parameter,
    "requires_grad": lambda m: m.layer.weight.requires_grad_(False),
    "gradient": _gradient,
    "attribute of a tensor": lambda m: setattr(m.layer.weight, "note", 1),
    "hook on a tensor": lambda m: m.layer.weight.register_hook(print),
    "counter of a norm": lambda m: m.norm.num_batches_tracked.data.add_(1),
    "mode": lambda m: m.norm.eval(),
    "hook": lambda m: m.layer.register_forward_hook(print),
    "attribute": lambda m: setattr(m, "count", 1),
    "kind of a number": lambda m: setattr(m, "count", False),
    "new attribute": lambda m: setattr(m, "more", None),
    "attribute gone": lambda m: delattr(m, "count"),
    "nested container": lambda m: m.config["a"][1]["b"].add(3),
    "container replaced by an equal one": lambda m: m.config.update(a=list(m.config["a"])),
    "order": lambda m: m.config.move_to_end("a"),
    "field of a configuration": lambda m: setattr(m.settings, "calls", 1),
    "array": lambda m: m.settings.table.fill(1),
    "generator": lambda m: torch.rand(1, generator=m.generator),
    "attribute of a class": lambda m: m.shared.append(1),
    "not persistent": lambda m: m._non_persistent_buffers_set.add("n"),
    "other module": lambda m: setattr(m, "itself", nn.Linear(3, 2)),
    "random state of torch": lambda _: torch.rand(1),
    "random state of numpy": lambda _: np.random.rand(),  # noqa: NPY002 - the global one is meant
    "random state of Python": lambda _: random.random(),
    "global hook": lambda _: nn.modules.module.register_module_forward_hook(print),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_seen(name: str) -> None:
    model = Model()
    with pytest.raises(AssertionError, match="what was only to be looked at has changed"), untouched(model):
        result = FAULTS[name](model)
    if name == "global hook":
        result.remove()
    Model.shared.clear()


def test_nothing_is_seen_where_nothing_changes() -> None:
    model = Model()
    before = snapshot(model, model.config)
    model.eval().train()
    model.layer(torch.zeros(1, 3))
    assert not differences(before, snapshot(model, model.config))
