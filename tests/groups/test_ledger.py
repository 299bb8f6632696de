"""No network of the tests has lost a free group, or gained one, unseen."""

from __future__ import annotations

import pytest

from fxwidth.rules.registry import RULES, RuleDeclinedError
from tests.fuzz.test_planted_faults import uncoupled_add
from tests.oracles.ledger import committed, entry, networks
from tests.zoo import models

REWRITE = "if this is meant, rewrite the ledger with python -m tests.oracles.ledger"
# What is as large as in the field takes seconds; one of each kind is not left out.
SLOW = {f"zoo: {name}" for name in models.FULL_SIZE} - {"zoo: vit_b_16", "zoo: efficientnet_b0"}
SLOW |= {"detectors: faster_rcnn", "detectors: retina_net"}
NETWORKS = networks()
LEDGER = committed()


def check(name: str) -> None:
    now = entry(NETWORKS[name])
    assert now == LEDGER[name], f"{name} has other groups than tests/oracles/ledger.json says; {REWRITE}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETWORKS])
def test_groups_are_those_of_the_ledger(name: str) -> None:
    check(name)


def test_the_ledger_holds_every_network() -> None:
    assert list(LEDGER) == list(NETWORKS), REWRITE
    assert all(line["free"] or line["pinned"] for line in LEDGER.values())


def declined(c: object) -> object:
    raise RuleDeclinedError("declined")


@pytest.mark.parametrize(
    ("name", "op", "fault"),
    [
        ("zoo: resnet18", "max_pool2d_with_indices", declined),
        ("zoo: resnet18", "add", uncoupled_add),
        ("zoo: vit_b_16", "native_layer_norm", declined),
        ("nets: packed attention", "split_with_sizes", declined),
        ("hard cases: ShuffledGroups", "transpose", declined),
    ],
)
def test_a_pin_too_many_or_too_few_is_seen(name: str, op: str, fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert op in RULES or fault is uncoupled_add
    monkeypatch.setitem(RULES, op, fault)
    with pytest.raises(AssertionError, match=r"rewrite the ledger with python -m tests\.oracles\.ledger"):
        check(name)
