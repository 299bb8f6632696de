"""What all tests share: one thread, fixed seeds, and no GPU tests where there is no GPU."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from fxwidth.costs.registry import COSTS
from fxwidth.growth.directions import DIRECTIONS
from fxwidth.resizing import optimizer_state
from fxwidth.rules.registry import RULES
from fxwidth.selection.registry import METHODS

torch.set_num_threads(1)

# The first example of a test pays for torch's lazy imports: times say nothing about the example.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# A resize beside another graph has Python collect garbage, and what a test looks for among all objects takes the longer
# the more other tests have left behind: these go first.
_FIRST = frozenset(
    f"test_{name}.py"
    for name in ("transaction", "footprint", "looks", "other_graphs", "originals", "reachable_state", "gc_pause")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _FIRST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may use the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _collected(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free a full-size network before the next one: modules and their graphs refer to each other."""
    yield
    if request.node.get_closest_marker("slow"):
        gc.collect()


@pytest.fixture
def tables_as_before() -> Iterator[None]:
    """Leave the tables of what users register as they are."""
    # Ours are in them once the package's modules have been imported.
    import_module("fxwidth.public")
    tables: tuple[dict[Any, Any], ...] = (METHODS, COSTS, DIRECTIONS, RULES, optimizer_state._RULES)
    before = [(table, dict(table)) for table in tables]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)
