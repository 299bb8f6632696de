"""A file is the old one or the new one: after a kill, without room, without permission, with two writers."""

from __future__ import annotations

import os
import pickle
import random
import resource
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import fxwidth
from fxwidth import FxwidthError
from fxwidth.runtime.atomic_files import replacing, unwritable
from tests.oracles import files

OLD, NEW = b"o" * 2**20, b"n" * 2**22


def written(path: Path, content: bytes) -> None:
    with replacing(path) as target, target.open("wb") as file:
        for start in range(0, len(content), 2**12):
            file.write(content[start : start + 2**12])
            file.flush()


def written_over(path: Path, content: bytes) -> None:
    """Write as is done without care."""
    path.write_bytes(b"")
    with path.open("wb") as file:
        for start in range(0, len(content), 2**12):
            file.write(content[start : start + 2**12])
            file.flush()


def killed(path: Path, write: object) -> set[str]:
    found, choices = set(), random.Random(0)
    for _ in range(25):
        path.write_bytes(OLD)
        child = files.forked(lambda: [write(path, NEW) for _ in range(1000)])  # type: ignore[operator]
        time.sleep(choices.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        files.ended(child)
        found.add({OLD: "old", NEW: "new"}.get(path.read_bytes(), "torn"))
    return found


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    assert killed(tmp_path / "a", written) <= {"old", "new"}
    assert "torn" in killed(tmp_path / "a", written_over)  # planted fault


def test_what_a_kill_has_left_is_taken_away_a_day_later(tmp_path: Path) -> None:
    left, fresh = (tmp_path / f".a.{letter * 32}.tmp" for letter in "ab")
    other = tmp_path / f".ab.{'a' * 32}.tmp"
    for file in (left, fresh, other):
        file.write_bytes(OLD)
    for file in (left, other):
        os.utime(file, (time.time() - 3 * 24 * 3600,) * 2)
    written(tmp_path / "a", NEW)
    assert {file.name for file in tmp_path.iterdir()} == {"a", fresh.name, other.name}


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("form", [*files.FORMS, ".pt"])
def test_without_room_the_old_file_stays(form: str, tmp_path: Path) -> None:
    path, saved = tmp_path / f"a{form}", files.graph(200)
    fxwidth.save(saved, path)
    before = path.read_bytes()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        with pytest.raises(FxwidthError, match=r"cannot be written \(.*make room"):
            fxwidth.save(saved, path)

    assert files.ended(files.forked(work)) == 0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("form", [*files.FORMS, ".pt"])
def test_a_folder_that_may_not_be_written_to(form: str) -> None:
    with TemporaryDirectory() as name:  # the folders of pytest may be its owner's alone
        folder, saved = Path(name), files.graph()
        path = folder / f"a{form}"
        fxwidth.save(saved, path)
        before = path.read_bytes()
        folder.chmod(0o555)

        def work() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            with pytest.raises(FxwidthError, match=r"cannot be written \(.*[Pp]ermission denied.*folder that can be"):
                fxwidth.save(saved, path)

        assert files.ended(files.forked(work)) == 0
        folder.chmod(0o755)
        assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*fork")
def test_of_two_writers_one_is_the_last(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(OLD)
    children = [
        files.forked(lambda content=content: [written(path, content) for _ in range(40)]) for content in (OLD, NEW)
    ]
    for _ in range(100):
        assert path.read_bytes() in (OLD, NEW)
    assert [files.ended(child) for child in children] == [0, 0]
    assert path.read_bytes() in (OLD, NEW)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FxwidthError, match="is a folder"):
        written(tmp_path / "a", OLD)
    with pytest.raises(FxwidthError, match="there is no folder"):
        written(tmp_path / "b" / "a", OLD)


@pytest.mark.parametrize("kind", [OSError, RuntimeError, pickle.PicklingError, TypeError, AttributeError])
def test_room_is_asked_for_where_room_can_help(kind: type[Exception]) -> None:
    asks = "make room" in str(unwritable("a", kind("why")))
    assert asks is (kind in (OSError, RuntimeError))  # torch tells of a full disk by a RuntimeError


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("form", [*files.FORMS, ".pt"])
def test_permissions_are_those_of_the_umask_or_of_the_file_before(form: str, tmp_path: Path) -> None:
    path, saved = tmp_path / f"a{form}", files.graph()
    for umask, mode in ((0o022, 0o644), (0o007, 0o660), (0o077, 0o600)):
        path.unlink(missing_ok=True)
        before = os.umask(umask)
        try:
            fxwidth.save(saved, path)
            assert path.stat().st_mode & 0o777 == mode
            for kept in (0o604, 0o640):
                path.chmod(kept)
                fxwidth.save(saved, path)
                assert path.stat().st_mode & 0o777 == kept
        finally:
            os.umask(before)
