"""The ledger of freedom: how many groups of which widths are free, and pinned, in each network that is tested on.

    python -m tests.oracles.ledger          # writes tests/oracles/ledger.json anew

A rule that pins without need, or frees what it must not, changes a line of the ledger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import fxwidth
from fxwidth.groups.channel_group import ChannelGroup
from tests.zoo import models, nets, networks_of_calls, networks_of_norms
from tests.zoo.networks import CASES
from tests.zoo.networks_of_odd_forms import FORMS
from tests.zoo.networks_of_packed_sequences import PACKED
from tests.zoo.networks_of_values import DETECTORS, images

PATH = Path(__file__).with_suffix(".json")
Entry = dict[str, str]
# Returns a model, and what it is traced with: positional arguments, and arguments by name.
Made = Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any] | None]]


def networks() -> dict[str, Made]:
    """Return every network of the tests, by the table that it is in and its name."""
    found: dict[str, Made] = {}
    for name, case in CASES.items():
        found[f"hard cases: {name}"] = lambda case=case: (case.build(), tuple(case.inputs()), None)
    for name, call in networks_of_calls.CASES.items():
        args = call.args if isinstance(call.args, (tuple, dict)) else (call.args,)
        found[f"calls: {name}"] = lambda call=call, args=args: (call.build(False).double(), args, call.kwargs)
    for name, (make, form) in FORMS.items():
        found[f"forms: {name}"] = lambda make=make, form=form: (make().double(), *form(4))
    for name, (make, inputs, _) in PACKED.items():
        found[f"packed: {name}"] = lambda make=make, inputs=inputs: (make().double(), inputs(4), None)
    for name, (make, inputs) in nets.NETS.items():
        found[f"nets: {name}"] = lambda make=make, inputs=inputs: (make().double(), (inputs()[:4],), None)
    for name in networks_of_norms.NETS:
        found[f"norms: {name}"] = lambda name=name: _one_input(*networks_of_norms.made(name))
    for name, make in DETECTORS.items():
        found[f"detectors: {name}"] = lambda make=make: (make().double(), (images(),), None)
    for name in (*models.SMALL, *models.FULL_SIZE):
        found[f"zoo: {name}"] = lambda name=name: _one_input(*models.build(name, torch.float32))
    return found


def _one_input(model: Any, x: Any) -> tuple[Any, tuple[Any, ...], None]:
    return model, (x,), None


def entry(made: Made) -> Entry:
    """Return a network's free and pinned groups, counted by width."""
    torch.manual_seed(0)
    model, args, kwargs = made()
    groups = fxwidth.analyze(fxwidth.trace(model.eval(), args, kwargs)).groups
    return {
        "free": _counted(group for group in groups if group.pinned is None),
        "pinned": _counted(group for group in groups if group.pinned is not None),
    }


def committed() -> dict[str, Entry]:
    """Return the ledger as it is written down."""
    return dict(json.loads(PATH.read_text()))


def _counted(groups: Iterable[ChannelGroup]) -> str:
    """Return widths, widest first, with how many groups have each."""
    counts = Counter(group.width for group in groups)
    return ", ".join(f"{count} of {width}" for width, count in sorted(counts.items(), reverse=True))


if __name__ == "__main__":
    ledger = {name: entry(made) for name, made in networks().items()}
    PATH.write_text(json.dumps(ledger, indent=1) + "\n")
