"""Files that are written as a whole or not at all: beside the old one, onto the disk, and then into its place."""

from __future__ import annotations

import os
import pickle
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from fxwidth.errors import FxwidthError

# Names of files have a length that is bounded, in bytes.
_LONGEST = 40
# What a process that was killed has left beside a file is taken away by the next one, once nobody can still write it.
_STALE = 24 * 3600.0
# What is raised where pickle cannot write an object, whatever the disk.
_OF_CONTENT = (pickle.PicklingError, TypeError, AttributeError, RecursionError)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of a new file that takes the place of another once it is complete and on the disk.

    Whoever reads `path` finds the old file or the new one, also after a process has been killed or the power has gone.
    Links are followed, and permissions stay; those of a new file are what the umask says. A pipe or a device cannot be
    replaced, and is written to itself.

    Raises:
        FxwidthError: the file cannot be written; the old one is as it was.
    """
    with _told(path):
        place = _place_of(path)
        if place.exists() and not place.is_file():
            yield place
            return
        target = place.with_name(f".{place.name[:_LONGEST]}.{uuid4().hex}.tmp")
        try:
            _remove_stale(place)
            # Here, so that a folder that cannot be written to is told as such by whatever writes the file.
            target.open("xb").close()
            # What writes the file may put one of its own in its place, which only its owner may read.
            mode = _mode(target)
            yield target
            with target.open("rb+") as file:
                os.fsync(file.fileno())
            mode = _mode(place) if place.exists() else mode
            # Some disks know no permissions, and refuse to be told.
            if _mode(target) != mode:
                target.chmod(mode)
            target.replace(place)
            _sync_folder(place.parent)
        finally:
            target.unlink(missing_ok=True)


def path_of(path: object) -> Path:
    """Return a path as such.

    Raises:
        FxwidthError: it is none.
    """
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        what = repr(path) if isinstance(path, str) else type(path).__name__
        raise FxwidthError(f"the path of a file is a text or a pathlib.Path, but received {what}.")
    return Path(path)


def _place_of(path: str | Path) -> Path:
    try:
        place = Path(path).resolve()
    except RuntimeError as error:
        # Links in a circle, as some versions of Python tell of them.
        raise OSError(str(error)) from error
    if place.is_symlink():
        raise OSError(f"{place} is a link that leads to itself")
    if not place.parent.is_dir():
        folder = place.parent if Path(path).is_symlink() else Path(path).parent
        raise FxwidthError(f"there is no folder {folder} to write {place.name} to; make it first.")
    if place.is_dir():
        raise FxwidthError(f"{path} is a folder; give the path of a file in it.")
    return place


def unwritable(path: str | Path, error: Exception) -> FxwidthError:
    """Return the error that tells that a file cannot be written; an old one at that path is as it was."""
    # Libraries tell of a full disk by errors of their own, so that what is no matter of the disk is named instead.
    is_of_content = isinstance(error, _OF_CONTENT)
    remedy = "" if is_of_content else "; make room on the disk or choose a folder that can be written to"
    return FxwidthError(f"{path} cannot be written ({error}){remedy}. What was there before is as it was.")


def unreadable(path: str | Path, error: Exception) -> FxwidthError:
    """Return the error that tells that a file cannot be read."""
    return FxwidthError(f"{path} cannot be read ({error}); see to the permissions of the file and of its folder.")


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _remove_stale(path: Path) -> None:
    for left in path.parent.glob(f".{_escaped(path.name[:_LONGEST])}.{'[0-9a-f]' * 32}.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _sync_folder(folder: Path) -> None:
    """Bring the entry of a file to the disk; some systems do not open folders, and need no such step."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
