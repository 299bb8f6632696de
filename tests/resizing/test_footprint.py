"""Nothing is remembered longer than the graph it is of, and resizes leave nothing behind but their history."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth.rewriting.added_modules import Additions, remove_unused
from fxwidth.rewriting.training_runs import Dropout
from fxwidth.runtime.fake_tensors import _Outcome
from fxwidth.statistics.remembered_noise import _KNOWN
from tests.zoo.nets import images


class Attending(nn.Module):
    """Attention whose dropout becomes a module beside it once it is lowered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return what attention makes of tokens."""
        y = torch.relu(self.first(x))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        result: Tensor = self.last(y)
        return result


def convolutions() -> fx.GraphModule:
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)]
    return fxwidth.trace(nn.Sequential(*layers).double(), images(4))


def attention() -> fx.GraphModule:
    return fxwidth.trace(Attending(), torch.randn(2, 5, 6))


@contextmanager
def no_collections() -> Iterator[None]:
    """Have nothing freed but what nobody holds."""
    # What a first run has left as garbage may hold the network too.
    _collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _collect() -> None:
    # Tensors that C++ holds as well take several rounds.
    while gc.collect():
        pass


USES: dict[str, Callable[[fxwidth.WidthGraph], Any]] = {
    "groups": lambda graph: [group.growth for group in graph.free],
    "plan": fxwidth.plan,
    "plan under a budget": lambda graph: fxwidth.plan(graph, params=0.5, data=[images(4)]),
    "plan of flops and memory": lambda graph: fxwidth.plan(
        graph, budget=fxwidth.Budget(flops=0.5, activation_memory=0.9), data=[images(4)]
    ),
    "spectrum": fxwidth.spectrum,
    "explain": lambda graph: (graph.explain("0", "3"), graph.why_pinned("5")),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_width_graph_goes_with_who_holds_it(use: Callable[[fxwidth.WidthGraph], Any]) -> None:
    gm = convolutions()
    use(fxwidth.analyze(gm))
    with no_collections():
        graph = fxwidth.analyze(gm)
        use(graph)
        refs = [ref(graph), ref(graph.analysis), ref(graph.analysis.space), ref(graph.groups[0])]
        del graph
        assert [one() for one in refs] == [None] * len(refs)


@pytest.mark.parametrize("options", [{"selection": "magnitude", "fold": False}, {"data": [images(4)]}])
def test_the_old_weights_go_with_the_resize(options: dict[str, Any]) -> None:
    gm = convolutions()
    old = [ref(parameter) for name, parameter in gm.named_parameters() if name != "5.bias"]
    with no_collections():
        fxwidth.resize(gm, {"0": 4, "3": 4}, **options)
        assert [one() for one in old] == [None] * len(old)


def test_moments_of_one_network_are_held_and_go_with_it() -> None:
    gc.collect()
    before = len(_KNOWN)
    gm = convolutions()
    graph = fxwidth.analyze(gm)
    for share in (0.9, 0.8):
        fxwidth.plan(graph, params=share)
        assert len(_KNOWN) == before + 1
    fxwidth.plan(fxwidth.analyze(gm, images(6)), params=0.9)
    assert len(_KNOWN) == before + 1
    for share in (0.9, 0.8, 0.7):
        fxwidth.evolve(gm, params=share)
        assert len(_KNOWN) == before
    fxwidth.plan(fxwidth.analyze(gm), params=0.9)
    del gm, graph
    gc.collect()
    assert len(_KNOWN) == before


def there_and_back(gm: fx.GraphModule, times: int) -> Iterator[float]:
    """Shrink all groups by one channel and grow them again, and yield the CPU seconds of each round."""
    for _ in range(times):
        start = time.process_time()
        for step in (-1, 1):
            widths = {group.name: group.width + step for group in fxwidth.analyze(gm).free}
            fxwidth.resize(gm, widths, selection="magnitude", fold=False)
        yield time.process_time() - start


def footprint(gm: fx.GraphModule) -> dict[str, int]:
    _collect()
    kinds = [type(one) for one in gc.get_objects()]
    return {
        "tensors": sum(issubclass(kind, Tensor) for kind in kinds),
        # Those of what ops make of fake tensors are bounded, and hold no tensors.
        "own": sum(str(kind.__module__).startswith("fxwidth") and kind is not _Outcome for kind in kinds),
        "nodes": len(gm.graph.nodes),
        "modules": sum(1 for _ in gm.modules()),
        "state": sum(tensor.numel() for tensor in gm.state_dict().values()),
        "code": len(gm.code),
    }


@pytest.mark.parametrize("make", [convolutions, attention])
def test_resizes_leave_nothing_behind(make: Callable[[], fx.GraphModule]) -> None:
    gm = make()
    assert all(there_and_back(gm, 2))
    before = footprint(gm)
    assert all(there_and_back(gm, 3))
    assert footprint(gm) == before


@pytest.mark.slow
@pytest.mark.parametrize("make", [convolutions, attention])
def test_two_hundred_resizes_take_no_more_memory_or_time(make: Callable[[], fx.GraphModule]) -> None:
    gm = make()
    assert all(there_and_back(gm, 20))
    before, resident = footprint(gm), _resident()
    times: list[float] = []
    for _ in range(4):
        times += there_and_back(gm, 20)
        # How much Python leaves to be collected later depends on how much else there is.
        assert footprint(gm) == before
    assert _resident() < resident + 16 * 2**20
    assert statistics.median(times[-20:]) < 1.5 * statistics.median(times[:20])


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def with_leftovers() -> fx.GraphModule:
    """Return a graph that reads one of two constants and calls one of two dropouts, and a module with its own."""
    gm = convolutions()
    gm.register_buffer("_fxwidth_constant_0", torch.zeros(1, dtype=torch.float64))
    gm.register_buffer("_fxwidth_constant_1", torch.zeros(1, dtype=torch.float64))
    gm.add_submodule("fxwidth_dropout_0", nn.Dropout(0.1))
    gm.add_submodule("fxwidth_dropout_1", nn.Dropout(0.2))
    gm.add_submodule("0.fxwidth_dropout_0", nn.Dropout(0.3))
    last = gm.graph.find_nodes(op="output")[0]
    with gm.graph.inserting_before(last):
        constant = gm.graph.get_attr("_fxwidth_constant_1")
        dropped = gm.graph.call_module("fxwidth_dropout_1", (last.args[0],))
        last.args = (gm.graph.call_function(torch.add, (dropped, constant)),)
    gm.recompile()
    return gm


def test_what_earlier_graphs_needed_is_taken_away_and_comes_back_where_it_was() -> None:
    gm = with_leftovers()
    names = list(gm.state_dict()), [name for name, _ in gm.named_modules()]
    with ExitStack() as undo:
        remove_unused(gm, undo)
        assert "_fxwidth_constant_0" not in gm.state_dict()
        assert "_fxwidth_constant_1" in gm.state_dict()
        assert "fxwidth_dropout_0" not in gm._modules
        assert "fxwidth_dropout_1" in gm._modules
        # What a module that is called as a whole has is its own affair.
        assert gm.get_submodule("0.fxwidth_dropout_0").p == 0.3
    assert (list(gm.state_dict()), [name for name, _ in gm.named_modules()]) == names
    fxwidth.resize(gm, {"0": 4}, selection="magnitude", fold=False)
    assert "_fxwidth_constant_0" not in gm.state_dict()
    assert "fxwidth_dropout_0" not in gm._modules


def test_what_is_added_has_a_path_of_its_own() -> None:
    additions = Additions(with_leftovers())
    paths = [additions.dropout(Dropout(nn.Dropout, p, "")) for p in (0.1, 0.2)]
    assert paths == ["fxwidth_dropout_2", "fxwidth_dropout_3"]
    assert additions.constant(torch.zeros(1)) == "_fxwidth_constant_2"
    gapped = convolutions()
    gapped.add_submodule("fxwidth_dropout_1", nn.Dropout(0.5))
    additions = Additions(gapped)
    paths = [additions.dropout(Dropout(nn.Dropout, p, "")) for p in (0.1, 0.2, 0.3)]
    assert paths == ["fxwidth_dropout_0", "fxwidth_dropout_2", "fxwidth_dropout_3"]
    with additions.in_place():
        assert gapped.get_submodule("fxwidth_dropout_3").p == 0.3
    assert list(gapped._modules)[-1] == "fxwidth_dropout_1"
