"""What does a user get who misuses fxwidth? For each misuse the whole message.

    python benchmarks/misuses.py

`tests/test_misuses.py` holds each message to what it has to say: the place, what was received, and the remedy. Writes a
markdown table to benchmarks/results/.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.misuse_cases import MISUSES, Misuse
from benchmarks.support.machine import machine
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line


def message_of(misuse: Misuse) -> str:
    """Return the class and the message of what a misuse raises."""
    torch.manual_seed(0)
    try:
        misuse.call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing: it is accepted"


def main() -> None:
    """Misuse it, and write down what is said."""
    options = options_of(__doc__).parse_args()
    rows = [line(misuse.what, _cell(message_of(misuse))) for misuse in MISUSES]
    told = [*heading("What a misuse gets", machine("torch")), *header("misuse", "message"), *rows]
    write("misuses", "\n".join(told) + "\n", folder=options.results)


def _cell(message: str) -> str:
    here = str(Path(__file__).parents[1])
    return " ".join(message.replace(here, "...").replace("|", "\\|").split())


if __name__ == "__main__":
    main()
