"""What becomes of files that are damaged, written while killed, or read in another process?

    python benchmarks/files.py                  # all of it, half an hour on one core
    python benchmarks/files.py --part damage    # or: kills, "models of torchvision", "models of transformers"

Damage: a file of each safe form with single bytes changed, or regions cut out, zeroed or lost at the end: what is
loaded is equal to the bit, or refused; no code runs, and memory stays near what the file warrants. Files that claim
sizes, or that would run code, are refused. Kills: a process that saves over an old file is killed (SIGKILL) at random,
fills the disk, may not write, or saves beside another one: what is there loads, and is the old or the new one. Models:
evolved five times by shrinks, growths and changes of basis, saved, and loaded in a new process: equal to the bit.
Writes a markdown table to benchmarks/results/, and fails where anything else came out.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import fx

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.files_models import TORCHVISION, TRANSFORMERS
from benchmarks.support.children import ChildError, in_child
from benchmarks.support.machine import machine
from benchmarks.support.measures import MIB, forget_peak, peak
from benchmarks.support.results import options_of, read_record, write
from benchmarks.support.tables import header, heading, line
from fxwidth import FxwidthError
from tests.oracles import files

_DAMAGES, _KILLS, _SAVES = 1000, 100, 30
_MODELS = Path(__file__).with_name("files_models.py")
_WIDE = 1500  # a network whose file takes a while to write
_NOBODY = 65534
_LIBRARIES = {"torchvision": TORCHVISION, "transformers": TRANSFORMERS}


class Record:
    """The lines of the tables of one part, and what came out as it must not."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.wrong: list[str] = []

    def add(self, *cells: object, fine: bool) -> None:
        """Take a line of a table."""
        self.lines.append(line(*cells))
        print(self.lines[-1], flush=True)
        if not fine:
            self.wrong.append(self.lines[-1])


def main() -> None:
    """Try all, print it, and write it down."""
    parts: dict[str, Callable[[Record], None]] = {"damage": damage, "kills": kills}
    parts |= {f"models of {library}": partial(models, names) for library, names in _LIBRARIES.items()}
    parser = options_of(__doc__)
    parser.add_argument("--part", choices=parts, help="one of the parts; the others are those of the record")
    options: argparse.Namespace = parser.parse_args()
    found: dict[str, list[str]] = read_record("files", options.results) or {}
    wrong: list[str] = []
    for name, part in parts.items():
        if options.part in (None, name):
            record = Record([f"## {name.capitalize()}", ""])
            part(record)
            wrong += record.wrong
            found[name] = record.lines
    told = heading("Files: damaged, written while killed, read in another process", machine("torch", "safetensors"))
    tables = "\n\n".join("\n".join(found[name]).rstrip() for name in parts if name in found)
    write("files", "\n".join([*told, tables]) + "\n", found, folder=options.results)
    if wrong:
        raise SystemExit("\n".join(["not as it must be:", *wrong]))


def damage(record: Record) -> None:
    """Load files with changed bytes, and files of ill will."""
    record.lines += header(
        "damaged at random", "files", "refused", "equal to the bit", "else", "code run", "memory, MiB"
    )
    saved = files.graph()
    with tempfile.TemporaryDirectory() as folder:
        for form in files.FORMS:
            path = Path(folder) / f"a{form}"
            fxwidth.save(saved, path)
            content = path.read_bytes()
            files.outcome(path, saved)  # what the first load brings in counts for no file
            choices, found = random.Random(0), Counter[str]()
            before = forget_peak()
            with files.watching_code() as seen:
                for _ in range(_DAMAGES):
                    path.write_bytes(files.damaged(content, choices))
                    found[files.outcome(path, saved)] += 1
            used = (peak() - before) / MIB
            others = _DAMAGES - found["refused"] - found["equal"]
            what = f"{form}, {len(content):,} bytes"
            fine = not others and not seen and used < 64
            record.add(what, _DAMAGES, found["refused"], found["equal"], others, len(seen), f"{used:.1f}", fine=fine)
        record.lines += ["", *header("made to do harm", "form", "what comes of it", "code run", "memory, MiB")]
        for name, (form, change) in files.BOMBS.items():
            path = Path(folder) / f"a{form}"
            fxwidth.save(saved, path)
            change(path)
            before = forget_peak()
            with files.watching_code() as seen:
                found_out = files.outcome(path, saved)
            used = (peak() - before) / MIB
            record.add(
                name, form, found_out, len(seen), f"{used:.1f}", fine=found_out == "refused" and not seen and used < 64
            )
    record.lines.append("")


def kills(record: Record) -> None:
    """Save over an old file under kills, without room, without permission, and beside others."""
    record.lines += header("saving over an old file", "form", "times", "interrupted in writing", "old or new", "else")
    old, new = files.graph(_WIDE), files.graph(_WIDE, {"0": _WIDE // 2 + 3})
    for form in files.FORMS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"a{form}"
            fxwidth.save(old, path)
            for name, tried in {"killed": _killed, "disk full": _full, "read-only folder": _forbidden}.items():
                found, inside = Counter[bool](), 0
                for saved, was_inside in tried(path, new):
                    inside += was_inside
                    # After each the file is the old one, or one of those that were saved since.
                    found[_is_one_of(path, [old, new] if saved else [old])] += 1
                fxwidth.save(old, path)
                times = found.total()
                record.add(name, form, times, inside, found[True], found[False], fine=not found[False])
            ended, found = _two_at_once(path, old, new)
            what = found[True], found[False]
            record.add("two at once", form, found.total(), ended, *what, fine=not found[False] and ended == 2)
    record.lines.append("")


def _is_one_of(path: Path, graphs: list[fx.GraphModule]) -> bool:
    try:
        loaded = files.load(path, _WIDE)
    except FxwidthError as error:
        print(error, flush=True)
        return False
    return any(files.is_equal(loaded, graph) for graph in graphs)


def _killed(path: Path, new: fx.GraphModule) -> Iterator[tuple[bool, bool]]:
    choices = random.Random(0)
    for number in range(_KILLS):
        # Half of them at any time, and half while the file is being written.
        waits = number % 2 > 0
        delay = choices.uniform(0.0, 0.003) if waits else choices.uniform(0.05, 1.0)
        yield True, files.killed_in_saving(new, path, delay, waits=waits)


def _full(path: Path, new: fx.GraphModule) -> Iterator[tuple[bool, bool]]:
    """Save where files cannot grow beyond a size: at its end, or at the limit of a process, a write fails alike."""
    size = path.stat().st_size
    for share in (0.0, 0.3, 0.6, 0.9):

        def work(room: int = int(share * size)) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            _refused(path, new)

        yield False, files.ended(files.forked(work)) == 0


def _forbidden(path: Path, new: fx.GraphModule) -> Iterator[tuple[bool, bool]]:
    path.parent.chmod(0o555)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(_NOBODY)
        _refused(path, new)

    yield False, files.ended(files.forked(work)) == 0
    path.parent.chmod(0o755)


def _refused(path: Path, new: fx.GraphModule) -> None:
    """Save, which must be refused in words, and leave nothing beside the file."""
    try:
        fxwidth.save(new, path)
    except FxwidthError:
        if list(path.parent.iterdir()) == [path]:
            return
    raise AssertionError


def _two_at_once(path: Path, old: fx.GraphModule, new: fx.GraphModule) -> tuple[int, Counter[bool]]:
    """Return how many of two processes that save at once end well, and what is found meanwhile and after that."""

    def saving(gm: fx.GraphModule) -> Callable[[], None]:
        def work() -> None:
            for _ in range(_SAVES):
                fxwidth.save(gm, path)

        return work

    children = [files.forked(saving(gm)) for gm in (old, new)]
    found = Counter[bool]()
    for _ in range(_SAVES):
        found[_is_one_of(path, [old, new])] += 1
    ended = sum(files.ended(child) == 0 for child in children)
    found[_is_one_of(path, [old, new])] += 1
    return ended, found


def models(names: Sequence[str], record: Record) -> None:
    """Evolve, save, and load in a new process."""
    titles = ("model", "groups shrunk", "grown", "basis changed", "file, bytes", ".safetensors", ".pt2")
    record.lines += header(*titles)
    rotated = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                done = in_child(str(_MODELS), "write", name, folder)
                read = in_child(str(_MODELS), "read", name, folder)
            except ChildError as error:
                record.add(name, *[""] * 4, str(error), "", fine=False)
                continue
            rotated += done["rotated"]
            exported = read.get("exported", done["exported"])
            counts = (done[key] for key in ("shrunk", "grown", "rotated", "bytes"))
            fine = read["tensors"] == "equal" and (exported == "equal" or done["exported"] != "written")
            record.add(name, *counts, read["tensors"], exported, fine=fine)
            for file in Path(folder).iterdir():
                file.unlink()
    record.add("all", "", "", rotated, "", "", "", fine=rotated > 0)


if __name__ == "__main__":
    main()
