"""Python's pickle of a graph: with any other bit it is refused, and what is no graph is told at once."""

from __future__ import annotations

import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth import FxwidthError
from tests.oracles import files


def without_checksums(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        fxwidth.save(files.graph(), path)
    finally:
        torch.serialization.set_crc32_options(True)


def test_each_other_bit_is_seen(tmp_path: Path) -> None:
    saved, path, choices = files.graph(), tmp_path / "a.pt", random.Random(0)
    fxwidth.save(saved, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        read = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    weight = saved.get_parameter("0.weight").detach().numpy().tobytes()
    for part in (read, weight):
        start = content.index(part)
        for place in choices.sample(range(start, start + len(part)), 30):
            path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
            with pytest.raises(FxwidthError, match=r"a\.pt is damaged: the bytes of .* are not those"):
                fxwidth.load(path, trusted=True)


def test_whatever_unpickling_raises_says_that_the_file_cannot_be_read(tmp_path: Path) -> None:
    """Where there are no checksums, each byte is believed; then pickle fails by errors of any class."""
    path, choices = tmp_path / "a.pt", random.Random(0)
    without_checksums(path)
    assert files.is_equal(fxwidth.load(path, trusted=True), files.graph())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        place = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    start = content.index(b"\x80\x02", place.header_offset)
    kinds = set()
    for at in choices.sample(range(start, start + place.file_size), 60):
        path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
        try:
            fxwidth.load(path, trusted=True)
        except FxwidthError as error:
            kinds.add(type(error.__cause__))
    assert len(kinds) > 3


def test_an_interrupt_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    fxwidth.save(files.graph(), path)

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "load", stopped)
    with pytest.raises(KeyboardInterrupt):
        fxwidth.load(path, trusted=True)


@pytest.mark.parametrize("options", [{}, {"trusted": True}, {"model": nn.Linear(2, 2), "optimizer": None}])
def test_a_state_dict_is_told_by_the_first_call(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "sd.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(FxwidthError, match=r"holds a state dict, not a graph written by .*load_state_dict"):
        fxwidth.load(path, **options)
    torch.save({"epoch": 3, "model": nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(FxwidthError, match=r"holds a dict, not a graph written by .*; read it by torch\.load"):
        fxwidth.load(path, **options)


def test_a_whole_model_and_an_incomplete_graph_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(FxwidthError, match="holds a Linear, not a graph"):
        fxwidth.load(path, trusted=True)
    torch.save({"module": files.graph()}, path)
    with pytest.raises(FxwidthError, match="is damaged: it does not tell how the graph came to be"):
        fxwidth.load(path, trusted=True)
    path.write_bytes(pickle.dumps(7)[:-1])
    with pytest.raises(FxwidthError, match="cannot be read"):
        fxwidth.load(path, trusted=True)
