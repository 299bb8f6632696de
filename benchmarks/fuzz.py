"""How many random networks are halved wrongly, and which groups of theirs are pinned, and why?

    python benchmarks/fuzz.py --networks 5000

Every network of the fuzzer is analysed and compared in float64 with the replay oracle after removing random channels of
all groups, and with the model where nothing is removed. Then it is judged by its values alone, whatever the rules are:
all that grows exactly is grown, at two batch sizes and in both modes; and by turns, it is halved and must train, or
copies of channels, which readers can do without, are dropped from a network of the same seed in which parameters read
every channel. Writes a markdown table to benchmarks/results/. No oracle sees what is pinned without need: the reasons
are there to be read.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, line
from fxwidth.groups.width_graph import WidthGraph
from tests.fuzz.networks import RandomNetwork, Tally, example_input, seeded_program
from tests.oracles.judges import analysed, assert_replays, assert_replays_unchanged
from tests.oracles.values import READ_BY_PARAMETERS, check_copies, check_growth, check_training

# The seeds of the slow suite.
FIRST_SEED = 10_000
_AT_A_TIME = 50


def main() -> None:
    """Run all networks and write what was found."""
    options = _parse_options()
    tally, failed = Tally(), list[tuple[int, str]]()
    started = time.perf_counter()
    last = FIRST_SEED + options.networks
    parts = [range(first, min(first + _AT_A_TIME, last)) for first in range(FIRST_SEED, last, _AT_A_TIME)]
    with ProcessPoolExecutor(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for own, wrong in pool.map(check_all, parts):
            tally.merge(own)
            failed += wrong
    table = render(tally, failed, options.networks, options.processes, time.perf_counter() - started)
    write("fuzz", table, folder=options.results)
    if failed:
        raise SystemExit(f"{len(failed)} networks failed")


def check_all(seeds: range) -> tuple[Tally, list[tuple[int, str]]]:
    """Check some networks; return their groups, and the seeds and errors of those that fail."""
    tally, failed = Tally(), []
    for seed in seeds:
        try:
            check(seed, tally)
        except Exception as error:
            failed.append((seed, f"{type(error).__name__}: {error}".splitlines()[0]))
    return tally, failed


def check(seed: int, tally: Tally) -> None:
    """Hold one network to the replay oracle and to its own values, and count its groups."""
    torch.manual_seed(0)
    inputs = [example_input()]
    program = seeded_program(seed)
    model = RandomNetwork(program).double()
    analysis = analysed(model, inputs)
    tally.add(WidthGraph(analysis))
    assert_replays(analysis, inputs)
    assert_replays_unchanged(analysis, model, inputs)
    check_growth(program)
    if seed % 2:
        check_copies(seeded_program(seed, ops=READ_BY_PARAMETERS))
    else:
        check_training(program)


def render(tally: Tally, failed: list[tuple[int, str]], networks: int, processes: int, seconds: float) -> str:
    """Return the results as markdown."""
    pinned = tally.reasons.total()
    share = pinned / max(1, pinned + tally.free)
    lines = [
        "# Random networks against the replay oracle and their own values",
        "",
        f"torch {version('torch')}, {processes} process{'es' if processes > 1 else ''} of 1 thread, {seconds:.0f} s.",
        "",
    ]
    lines += [f"- {networks:,} networks, {len(failed)} failures"]
    lines += [f"- {tally.free:,} groups of channels are free, {pinned:,} are pinned: {share:.1%}"]
    rest = tally.needless() / max(1, tally.needless() + tally.free)
    lines += [f"- {tally.by_strides:,} of these behind views by strides; without them, {rest:.1%} are pinned", ""]
    lines += header("pinned groups", "reason")
    lines += [line(count, reason) for reason, count in tally.reasons.most_common()]
    lines += [f"\nSeed {seed} failed: {error}" for seed, error in failed]
    return "\n".join(lines) + "\n"


def _parse_options() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--networks", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
