"""Plots by matplotlib: what is in them, and what is told where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxwidth
from fxwidth import FxwidthError
from tests.zoo.nets import conv, images, trained_like


def traced() -> Any:
    torch.manual_seed(0)
    return fxwidth.trace(trained_like(conv()), images(4))


def spectra() -> fxwidth.Spectra:
    return fxwidth.spectrum(fxwidth.analyze(traced()), errors=False)


def report() -> fxwidth.Report:
    return fxwidth.report(fxwidth.resize(fxwidth.resize(traced(), {"0": 4}), {"2": 5, "0": 3}))


PLOTS: dict[str, Callable[[], Any]] = {
    "spectrum": lambda: spectra()["0"].plot,
    "spectra": lambda: spectra().plot,
    "widths": lambda: report().plot,
    "frontier": lambda: fxwidth.frontier(fxwidth.analyze(traced()), params=[0.8, 0.6]).plot,
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_figure_and_a_file(name: str, tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    plot = PLOTS[name]()
    figure = plot(tmp_path / "a.png")
    assert isinstance(figure, figures.Figure)
    assert figure.axes[0].get_xlabel()
    assert figure.axes[0].get_ylabel()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FxwidthError, match="there is no folder"):
        plot(tmp_path / "none" / "a.png")


@pytest.mark.parametrize("name", PLOTS)
def test_without_matplotlib_the_remedy_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = PLOTS[name]()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FxwidthError, match=r"drawing needs matplotlib\. Run pip install 'fxwidth\[draw\]'\."):
        plot()


def test_lines_are_the_data() -> None:
    pytest.importorskip("matplotlib")
    found = spectra()
    line, cut = found["0"].plot().axes[0].lines
    assert tuple(line.get_ydata()) == found["0"].singular_values
    assert set(cut.get_xdata()) == {found["0"].gavish_donoho_rank}
    assert {line.get_label() for line in found.plot().axes[0].lines} == set(found)
    widths = {line.get_label(): list(line.get_ydata()) for line in report().plot().axes[0].lines}
    assert widths == {"0": [6, 4, 3], "2": [8, 8, 5]}


def test_what_there_is_nothing_of_is_not_drawn() -> None:
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        found = fxwidth.spectrum(fxwidth.analyze(fxwidth.trace(net, torch.randn(2, 4))), errors=False)
    for plot in (found.plot, found["0"].plot):
        with pytest.raises(FxwidthError, match="there are no singular values to draw"):
            plot()
    with pytest.raises(FxwidthError, match="nothing was resized"):
        fxwidth.report(traced()).plot()


def test_matplotlib_is_imported_by_plots_alone() -> None:
    code = (
        "import sys, torch, fxwidth; gm = fxwidth.trace(torch.nn.Linear(2, 3), torch.randn(2, 2)); "
        "print(fxwidth.report(gm), fxwidth.analyze(gm)); sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
