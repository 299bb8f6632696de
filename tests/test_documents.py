"""What the documents name is there: files by their paths, and every package in the table of packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fxwidth
from fxwidth import passes

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/architecture.md", *ROOT.glob("fxwidth/*/README.md")]
)


def missing(text: str, beside: Path) -> list[str]:
    """Return the paths in code spans of a text that are nowhere: from the root, in the package, or beside the text.

    Of a file without folders, which is told where its package has been named, there may be any in the package.
    """
    spans = re.findall(r"`([^`\n]+)`", text)
    paths = [path for span in spans for path in re.findall(r"[\w/.*]+\.(?:py|md|toml|json)\b", span)]
    return [path for path in paths if not _is_there(path, beside)]


def _is_there(path: str, beside: Path) -> bool:
    package = ROOT / "fxwidth"
    found = any(any(base.glob(path)) for base in (ROOT, package, beside))
    return found or ("/" not in path and any(package.rglob(path)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_documents_are_there(document: Path) -> None:
    assert not missing(document.read_text(encoding="utf-8"), document.parent)


def test_a_path_that_is_not_there_is_seen() -> None:
    assert missing("see `rules/registry.py` and `rules/no_such_file.py`", ROOT) == ["rules/no_such_file.py"]


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    told = set(re.findall(r"^::: fxwidth\.(?:passes\.)?(\w+)$", pages, re.MULTILINE))
    assert not {*fxwidth.__all__, *passes.__all__} - told


def test_every_package_has_its_row() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    parts = {
        path.stem for path in (ROOT / "fxwidth").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} <= told, f"no row for {parts - {'__init__'} - told}"
