"""Paths that save and load are given: long ones, links, folders, such as may not be read, and what is none."""

from __future__ import annotations

import io
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from torch import fx

import fxwidth
from fxwidth import FxwidthError
from tests.oracles import files

_NOBODY = 65534


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return files.graph()


@pytest.mark.parametrize("form", files.FORMS)
@pytest.mark.parametrize("name", ["n" * 230, "ü" * 110, "dots.in.it", "[a]*?"])
def test_any_name_that_a_folder_takes(name: str, form: str, graph: fx.GraphModule, tmp_path: Path) -> None:
    path = tmp_path / f"{name}{form}"
    fxwidth.save(graph, path)
    assert files.is_equal(files.load(path), graph)
    assert list(tmp_path.iterdir()) == [path]


def test_the_end_of_a_path_is_read_in_capitals_too(graph: fx.GraphModule, tmp_path: Path) -> None:
    fxwidth.save(graph, tmp_path / "A.SAFETENSORS")
    again = fxwidth.load(tmp_path / "A.SAFETENSORS", files.network(), files.inputs())
    assert files.is_equal(again, graph)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (io.BytesIO(), "but received BytesIO"),
        (None, "but received NoneType"),
        (b"a.safetensors", "but received bytes"),
        ("a\0b.safetensors", r"but received 'a\\x00b\.safetensors'"),
    ],
)
def test_what_is_no_path_is_refused(path: Any, told: str, graph: fx.GraphModule) -> None:
    with pytest.raises(FxwidthError, match=rf"the path of a file is a text or a pathlib\.Path, {told}"):
        fxwidth.save(graph, path)
    with pytest.raises(FxwidthError, match=rf"the path of a file is a text or a pathlib\.Path, {told}"):
        fxwidth.load(path, files.network(), files.inputs())


@pytest.mark.parametrize("form", files.FORMS)
def test_links_that_lead_nowhere(form: str, graph: fx.GraphModule, tmp_path: Path) -> None:
    circle, astray, ahead = (tmp_path / f"{name}{form}" for name in ("circle", "astray", "ahead"))
    circle.symlink_to(circle)
    astray.symlink_to(tmp_path / "nowhere" / astray.name)
    ahead.symlink_to(tmp_path / f"there{form}")
    with pytest.raises(FxwidthError, match=r"cannot be written"):
        fxwidth.save(graph, circle)
    with pytest.raises(FxwidthError, match=r"there is no folder .* make it first"):
        fxwidth.save(graph, astray)
    for link in (circle, astray, ahead):
        with pytest.raises(FxwidthError, match=r"there is no file"):
            files.load(link)
    fxwidth.save(graph, ahead)
    assert ahead.is_symlink()
    assert files.is_equal(files.load(tmp_path / f"there{form}"), graph)


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize("form", [*files.FORMS, ".pt"])
def test_what_may_not_be_read_is_told(form: str, place: str, graph: fx.GraphModule) -> None:
    with TemporaryDirectory() as name:  # the folders of pytest may be its owner's alone
        path = Path(name) / f"a{form}"
        fxwidth.save(graph, path)
        path.parent.chmod(0o755)
        (path if place == "file" else path.parent).chmod(0)

        def work() -> None:
            if os.geteuid() == 0:
                os.setuid(_NOBODY)
            with pytest.raises(FxwidthError, match=r"cannot be read \(.*[Pp]ermission denied"):
                fxwidth.load(path, trusted=True) if form == ".pt" else files.load(path)

        assert files.ended(files.forked(work)) == 0
        path.parent.chmod(0o755)
