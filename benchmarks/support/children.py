"""Cases measured in processes of their own, so that none pays for what another has loaded or holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ChildError(Exception):
    """A child ended without a result.

    Attributes:
        status: its exit status, negative where a signal ended it.
        last: the last line of what it said on stderr.
    """

    def __init__(self, status: int, last: str) -> None:
        super().__init__(f"exit status {status}: {last}")
        self.status = status
        self.last = last


def in_child(
    file: str, *arguments: object, threads: int = 1, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what a file prints as JSON, on its last line, in a process of its own.

    Args:
        file: a Python file.
        arguments: those of its command line.
        threads: how many it may have.
        environment: what is added to its environment.

    Raises:
        ChildError: it failed.
    """
    command = [sys.executable, str(Path(file).resolve()), *map(str, arguments)]
    added = {"OMP_NUM_THREADS": str(threads), **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **added}, check=False)
    if done.returncode != 0:
        raise ChildError(done.returncode, (done.stderr.strip().splitlines() or [""])[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
