"""Every block of Python in the documentation runs, and prints what the page shows below it."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# A block of Python, and what it prints: the block of text that directly follows.
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n?^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_CHECKER = doctest.OutputChecker()


def with_blocks() -> list[Path]:
    """Return README and the pages that have blocks of Python."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in pages if "```python" in path.read_text(encoding="utf-8")]


def run_page(text: str, name: str) -> list[tuple[str, str]]:
    """Run the blocks of a page one after the other, and return what each is told to print and what it prints."""
    namespace: dict[str, object] = {"__name__": name}
    found = []
    for block in _BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        printed = io.StringIO()
        # Lines in a traceback are those of the page.
        code = compile("\n" * line + block[1], name, "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        found.append((block[2] or "", printed.getvalue()))
    return found


def as_told(told: str, printed: str) -> bool:
    """Tell whether a block prints what the page shows; `...` stands for any text."""
    return _CHECKER.check_output(told, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def _pages() -> list[Any]:
    slow = [ROOT / "docs" / "guides" / "detector.md"]
    return [pytest.param(page, marks=pytest.mark.slow if page in slow else ()) for page in with_blocks()]


@pytest.mark.usefixtures("tables_as_before")
@pytest.mark.parametrize("page", _pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run_and_print_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert len(_BLOCK.findall(text)) == text.count("```python"), "a block of Python does not begin or end its line"
    for told, printed in run_page(text, str(page)):
        assert as_told(told, printed), f"the page shows\n{told}\nand its block prints\n{printed}"


def test_a_block_that_prints_something_else_is_seen() -> None:
    page = "Text\n\n```python\nx = 1\nprint(x + 1)\n```\n\n```text\n3\n```\n\n```python\nprint('a b')\n```\n"
    found = run_page(page, "page")
    assert found == [("3\n", "2\n"), ("", "a b\n")]
    assert not any(as_told(*one) for one in found)
    assert as_told("... 2\n", "1 and 2\n")


def test_a_line_of_a_failing_block_is_that_of_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_page("One\n\n```python\nx = 1\nx / 0\n```\n", "page")
    assert caught.traceback[-1].lineno + 1 == 5
