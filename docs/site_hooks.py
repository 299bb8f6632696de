"""What the site is built with beside its pages: pictures made by the package, the commands' own help, and links."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from site_pictures import PICTURES

# A link to a file of the repository that is no page.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")
_FIRST = ":: first block of README"
_README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"^```python\n.*?^```\n\n```text\n.*?^```\n", re.MULTILINE | re.DOTALL)
_HELP = re.compile(r"^:: help (.*)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures, made now."""
    for name, make in PICTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            make(path)
            content = path.read_bytes()
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Tell files of the repository by their paths, and put in what lines that begin with `::` stand for."""
    if page.file.src_uri == "architecture.md":
        markdown = _OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2]}`)", markdown)
    if _FIRST in markdown:
        block = _BLOCK.search(_README.read_text(encoding="utf-8"))
        assert block is not None, "README has no block of Python with what it prints"
        markdown = markdown.replace(_FIRST, block[0])
    return _HELP.sub(lambda line: f"```text\n{_help(line[1].split())}\n```", markdown)


def _help(command: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fxwidth", *command, "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
    )  # fmt: skip
    return done.stdout.strip().replace("python -m fxwidth", "fxwidth")
