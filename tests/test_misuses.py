"""Each misuse of the public functions is refused by a message with the place, what was received, and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxwidth
from benchmarks.misuse_cases import MISUSES, Misuse


@pytest.mark.usefixtures("tables_as_before")
@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.what)
def test_it_is_refused_with_what_was_received_and_a_remedy(
    misuse: Misuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fxwidth.FxwidthError) as caught:
        misuse.call()
    told = str(caught.value)
    assert misuse.received in told
    assert misuse.remedy in told
    assert not list(tmp_path.iterdir()), "something was written"
