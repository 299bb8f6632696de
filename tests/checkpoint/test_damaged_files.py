"""Damaged files and files of ill will: refused, or equal to the bit; no code runs, nothing large is made."""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import fxwidth
from fxwidth import FxwidthError
from fxwidth.serialization import exported_archives, tensor_files
from tests.oracles import files
from tests.serialization.earlier_form import earlier_texts, tensors_in, write_earlier


def outcomes(folder: Path, form: str, count: int) -> tuple[Counter[str], list[str]]:
    saved, path = files.graph(), folder / f"a{form}"
    fxwidth.save(saved, path)
    content, choices = path.read_bytes(), random.Random(0)
    assert files.outcome(path, saved) == "equal"
    found = Counter[str]()
    with files.watching_code() as seen:
        for _ in range(count):
            path.write_bytes(files.damaged(content, choices))
            found[files.outcome(path, saved)] += 1
    return found, seen


@pytest.mark.parametrize("form", files.FORMS)
def test_damaged_files_are_refused_or_equal(form: str, tmp_path: Path) -> None:
    found, seen = outcomes(tmp_path, form, 60)
    assert found.keys() <= {"refused", "equal"}
    assert found["refused"] > 50
    assert not seen


def test_without_the_digest_other_values_would_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault."""
    monkeypatch.setattr(tensor_files, "_digest", lambda file, place: file.seek(place) and file.read(64).decode())
    found, _ = outcomes(tmp_path, ".safetensors", 60)
    assert found["other than what was saved"] > 3


@pytest.mark.parametrize("name", files.BOMBS)
def test_files_of_ill_will_are_refused(name: str, tmp_path: Path) -> None:
    form, change = files.BOMBS[name]
    saved, path = files.graph(), tmp_path / f"a{form}"
    fxwidth.save(saved, path)
    change(path)
    with files.watching_code() as seen:
        assert files.outcome(path, saved) == "refused"
        # For what it is, and not because torch happens to fail at it.
        with pytest.raises(FxwidthError, match=r"may run code: |is damaged: |which is more than 16 times"):
            files.load(path)
    assert not seen


@pytest.mark.parametrize("name", ["a pickled weight", "code in a size"])
def test_what_is_not_looked_for_would_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: the audit hook sees code that runs, and only this module keeps it from that."""
    form, change = files.BOMBS[name]
    path = tmp_path / f"a{form}"
    fxwidth.save(files.graph(), path)
    change(path)
    monkeypatch.setattr("fxwidth.checkpoint.exported.refuse_code", lambda entries: None)
    with files.watching_code() as seen, pytest.raises(FxwidthError):
        fxwidth.load(path)
    assert any("os.system" in event for event in seen)


def test_a_pickle_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(files.pickle_bomb())
    with files.watching_code() as seen:
        with pytest.raises(FxwidthError, match=r"can run any code\. Pass trusted=True if it is from someone whom you"):
            fxwidth.load(path)
        with pytest.raises(FxwidthError, match=r"ends in '\.safetensors'"):
            fxwidth.load(path, files.network())
    assert not seen
    fxwidth.save(files.graph(), path)
    with pytest.raises(FxwidthError, match="trusted=True"):
        fxwidth.load(path)
    assert files.is_equal(fxwidth.load(path, trusted=True), files.graph())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(FxwidthError, match="cannot be read"):
        fxwidth.load(path, trusted=True)


def test_a_history_of_wide_layers_needs_trust(tmp_path: Path) -> None:
    """What a file goes through may be larger than what is in it, up to a point."""
    path = tmp_path / "a.safetensors"
    for width, is_wide in ((40, False), (4000, True)):
        saved = files.graph(24, {"0": width}, {"0": 8})
        fxwidth.save(saved, path)
        if is_wide:
            with pytest.raises(FxwidthError, match=r"goes through \d+,\d+ parameters .* 16 times .* trusted=True"):
                files.load(path)
        assert files.is_equal(fxwidth.load(path, files.network(), files.inputs(), trusted=is_wide), saved)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """What was saved comes back; of what was not, a file of an earlier version is not believed."""
    saved, path = files.graph(), tmp_path / "a.safetensors"
    with torch.no_grad():
        saved.get_parameter("0.weight")[0, 0] = torch.nan
        saved.get_buffer("4.running_var")[0] = torch.inf
    fxwidth.save(saved, path)
    found = files.load(path).state_dict()
    assert all(torch.equal(found[name].nan_to_num(), one.nan_to_num()) for name, one in saved.state_dict().items())
    write_earlier(tmp_path / "old.safetensors", tensors_in(path), earlier_texts(path))
    with pytest.raises(FxwidthError, match=r"holds NaN or infinite values in 0\.weight, of which its record does not"):
        files.load(tmp_path / "old.safetensors")


def test_each_bit_of_the_table_of_an_archive(tmp_path: Path) -> None:
    """Bits of it say "encrypted", "compressed by a method of another age", "on the second disk"."""
    path = tmp_path / "a.pt2"
    fxwidth.save(files.graph(), path)
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    places = [*range(30), *range(start, start + 46), *range(len(content) - 22, len(content))]
    intact = exported_archives.read_archive(path)
    refusals = []
    for place in places:
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                assert exported_archives.read_archive(path) == intact
            except FxwidthError as error:
                refusals.append(str(error))
    assert len(refusals) > len(places)
    assert all("is damaged: " in text for text in refusals)


@pytest.mark.parametrize("record", [7, [], {"versions": 7}, {}])
def test_a_record_of_another_kind_is_told(record: object, tmp_path: Path) -> None:
    exported = io.BytesIO()
    torch.export.save(torch.export.export(files.network(), (files.inputs(),)), exported)
    exported_archives.write_archive(tmp_path / "a.pt2", exported.getvalue(), record)  # type: ignore[arg-type]
    with pytest.raises(FxwidthError, match="is damaged: its record does not tell"):
        fxwidth.load(tmp_path / "a.pt2")


def test_archives_tell_nothing_of_where_they_were_made(tmp_path: Path) -> None:
    fxwidth.save(files.graph(), tmp_path / "a.pt2")
    _, _, entries = exported_archives.read_archive(tmp_path / "a.pt2")
    assert not any(b"site-packages" in content or b"File " in content for content in entries.values())
