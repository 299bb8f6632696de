"""Each planted fault still has its place: code that moves takes the fault along."""

from __future__ import annotations

from collections import Counter

from benchmarks.fault_cases import FAULTS
from benchmarks.faults import ROOT


def test_what_a_fault_replaces_stands_once_in_its_file() -> None:
    counts = {(one.file, one.what): (ROOT / one.file).read_text("utf-8").count(one.old) for one in FAULTS}
    assert {place: count for place, count in counts.items() if count != 1} == {}


def test_faults_differ_and_change_something() -> None:
    assert [one.what for one in FAULTS if one.old == one.new] == []
    assert [
        place for place, count in Counter((one.file, one.old, one.new) for one in FAULTS).items() if count > 1
    ] == []


def test_the_tests_that_are_run_first_are_there() -> None:
    named = {test.partition("::")[0] for one in FAULTS for test in one.tests}
    assert sorted(name for name in named if not (ROOT / "tests" / name).exists()) == []
