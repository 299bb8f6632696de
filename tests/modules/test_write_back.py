"""A graph's widths in a module of the class that was traced: what is set, what is refused, what is put back."""

import copy
import importlib

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth.modules import class_fit
from fxwidth.modules import write_back as write_back_module
from fxwidth.runtime.tensor_slots import tensor_slots


class Attention(nn.Module):
    """Attention that knows its sizes by attributes; `num_heads` is not one of them."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads  # a decoy: nothing reads it
        self._a, self._b = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self._a, self._b).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.transpose(-2, -1) * 0.5).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).reshape(batch, length, self._a * self._b))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = Attention()
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.dropout(x + self.attention(self.norm(x))))


def _block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block().double().eval()


def _inputs(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


def _state(model: nn.Module) -> dict:
    tensors = {name: (id(t), t.detach().clone()) for name, (t, _) in tensor_slots(model).items() if not t.is_meta}
    attributes = {
        path: {k: v for k, v in vars(m).items() if not k.startswith("_p")} for path, m in model.named_modules()
    }
    return {"tensors": tensors, "attributes": {p: {k: repr(v) for k, v in a.items()} for p, a in attributes.items()}}


def _same(one: dict, other: dict) -> bool:
    same = one["tensors"].keys() == other["tensors"].keys() and one["attributes"] == other["attributes"]
    pairs = ((one["tensors"][name], other["tensors"][name]) for name in one["tensors"])
    return same and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def _narrowed(model: nn.Module) -> torch.fx.GraphModule:
    gm = fxwidth.trace(model, _inputs())
    return fxwidth.resize(gm, fxwidth.plan(fxwidth.analyze(gm), params=0.5, for_module=model))


@pytest.mark.parametrize("target", ["itself", "fresh", "meta"])
def test_the_class_holds_a_planned_graph_in_both_modes_and_at_another_batch(target):
    model = _block()
    gm = _narrowed(model)
    if target == "fresh":
        model = _block(1)
    elif target == "meta":
        with torch.device("meta"):
            model = Block().double().eval()
    assert fxwidth.write_back(gm, model) is model
    assert sum(p.numel() for p in model.parameters()) <= 0.5 * sum(p.numel() for p in _block().parameters())
    for batch in (2, 3):
        assert torch.equal(model(_inputs(batch)), gm(_inputs(batch)))
    model.train()
    gm.train()
    torch.manual_seed(3)
    own = model(_inputs())
    torch.manual_seed(3)
    assert torch.equal(own, gm(_inputs()))


def test_sizes_are_set_by_what_the_code_reads_and_never_by_name():
    model = _block()
    gm = fxwidth.trace(model, _inputs())
    heads = next(group for group in fxwidth.analyze(gm).free if group.width == 4 and "attention" in group.name)
    fxwidth.write_back(fxwidth.resize(gm, {heads.name: 2}), model)
    assert (model.attention._a, model.attention._b, model.attention.num_heads) == (2, 4, 4)
    assert torch.equal(model(_inputs(3)), gm(_inputs(3)))


def test_a_head_count_that_is_wrong_but_gives_the_same_shapes_is_refused(monkeypatch):
    model = _block()
    gm = fxwidth.trace(model, _inputs())
    heads = next(group for group in fxwidth.analyze(gm).free if group.width == 4 and "attention" in group.name)
    fxwidth.resize(gm, {heads.name: 2})

    def by_shape_alone(runs, run, known, edits):
        edits.apply(runs.model.attention, {"_a": 4, "_b": 2})  # every shape fits

    monkeypatch.setattr(class_fit, "fit_sizes", by_shape_alone)
    before = _state(model)
    with pytest.raises(fxwidth.FxwidthError, match=r"attention \(.*test_write_back.py:\d+\): it does .* is needed"):
        fxwidth.write_back(gm, model)
    assert _same(before, _state(model))


def test_a_place_is_named_in_code_that_lies_in_a_folder_called_like_a_library(tmp_path, monkeypatch):
    """As in any clone of fxwidth or torch: what tells a library's code is where it is, not what a folder is called."""
    folder = tmp_path / "torch" / "fxwidth"
    folder.mkdir(parents=True)
    (folder / "written_in.py").write_text(
        "import torch\n\n\nclass WrittenIn(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.first, self.last = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3)\n\n"
        "    def forward(self, x):\n        return self.last(self.first(x).reshape(-1, 4, 4).softmax(-1).flatten(1))\n"
    )
    monkeypatch.syspath_prepend(folder)
    model = importlib.import_module("written_in").WrittenIn()
    gm = fxwidth.trace(model, torch.randn(2, 6))
    fxwidth.resize(gm, {fxwidth.analyze(gm).free[0].name: 2})
    with pytest.raises(fxwidth.FxwidthError, match=r"the model itself \(torch/fxwidth/written_in.py:10\)"):
        fxwidth.write_back(gm, model)


class Fixed(nn.Module):
    """Its code has the number of heads written in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.first(x).reshape(x.shape[0], x.shape[1], 4, 4)
        return self.last(heads.softmax(-1).flatten(2))


def test_what_the_code_cannot_hold_is_refused_with_place_and_plan_and_kept_by_a_plan_for_the_module():
    model = Fixed().double().eval()
    gm = fxwidth.trace(model, _inputs())
    graph = fxwidth.analyze(gm)
    plan = fxwidth.plan(graph, max_width=2, shrink_energy=0, for_module=model)
    assert not plan.widths
    assert set(plan.notes["for_module"]["staying"]) == {group.name for group in graph.free}
    fxwidth.resize(gm, {graph.free[0].name: 2})
    before = _state(model)
    with pytest.raises(fxwidth.FxwidthError, match=r"Fixed cannot hold .*test_write_back.py:\d+.*for_module=model"):
        fxwidth.write_back(gm, model)
    assert _same(before, _state(model))


class Counting(nn.Module):
    """Exported, with a norm that counts batches in training alone: its graph adds zero in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise TypeError
        return self.last(self.norm(self.first(x)).relu())


def test_batches_are_counted_in_training_alone():
    torch.manual_seed(0)
    model, x = Counting().double().eval(), torch.randn(4, 6, dtype=torch.float64)
    gm = fxwidth.trace(model, x)
    fxwidth.resize(gm, fxwidth.plan(fxwidth.analyze(gm), params=0.5, for_module=model))
    for target in (model, Counting().double().eval()):
        fxwidth.write_back(gm, target)
        assert torch.equal(target(x), gm(x))
        counts = target.norm.num_batches_tracked, gm.get_buffer("norm.num_batches_tracked")
        assert torch.equal(target.train()(x), gm.train()(x))
        assert torch.equal(*counts)
        assert torch.equal(target.eval()(x), gm.eval()(x))


class OneNumber(nn.Module):
    """Its code has one number for the widths of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self._width = 8
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu().reshape(-1, self._width)
        return self.last(self.second(x).relu().reshape(-1, self._width))


def test_a_plan_for_a_module_ties_what_its_code_has_one_number_for():
    torch.manual_seed(0)
    model = OneNumber().double().eval()
    x = _inputs()[:, 0]
    gm = fxwidth.trace(model, x)
    before = _state(model)
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.5, for_module=model)
    assert _same(before, _state(model))
    assert [tie["units"] for tie in plan.notes["for_module"]["ties"]] == [{"first": 1, "second": 1}]
    assert plan.widths["first"] == plan.widths["second"]
    fxwidth.write_back(fxwidth.resize(gm, plan), model)
    assert model._width == plan.widths["first"]
    assert torch.equal(model(x), gm(x))


class Auxiliary(nn.Module):
    """In training its code reads a hidden layer by one that nothing else uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.auxiliary = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        aside = self.auxiliary(x) if self.training else None
        x = self.last(self.second(x).relu())
        return x if aside is None else x + 0.0 * aside


def test_a_plan_for_a_module_keeps_what_its_code_reads_in_training_alone():
    torch.manual_seed(0)
    model = Auxiliary().double().eval()
    x = _inputs()[:, 0]
    with pytest.warns(fxwidth.FxwidthWarning, match="in training it runs auxiliary"):
        gm = fxwidth.trace(model, x)
    graph = fxwidth.analyze(gm)
    plan = fxwidth.plan(graph, params=0.8, for_module=model)
    assert "in training" in plan.notes["for_module"]["staying"]["first"]
    assert "first" not in plan.widths
    fxwidth.write_back(fxwidth.resize(gm, plan), model)
    assert (model.first.out_features, model.second.out_features) == (16, plan.widths["second"])
    assert torch.equal(model(x), gm(x))


class Detector(nn.Module):
    """What it gives depends on values: its graph has it as a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = []
        for image in images:
            x = self.second(self.first(image).relu()).relu()
            chosen = torch.nonzero(x.sum(-1) > x.mean()).squeeze(1)
            found.append({"boxes": self.last(x[chosen])[: int(chosen.numel())]})
        return found


@pytest.mark.parametrize("target", ["itself", "fresh"])
def test_a_model_that_looks_at_values_holds_a_planned_graph(target):
    torch.manual_seed(0)
    model = Detector().double().eval()
    images = [_inputs()[0], _inputs(3)[0, :4]]
    gm = fxwidth.trace(model, (images,))
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.5, for_module=model)
    fxwidth.resize(gm, plan)
    if target == "fresh":
        model = Detector().double().eval()
    assert fxwidth.write_back(gm, model).first.out_features == plan.widths["first"] < 16
    for own, other in zip(model(images), gm(images), strict=True):
        assert torch.equal(own["boxes"], other["boxes"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", ["_put_in_place", "_otherwise", "refuse_other_values"])
def test_whatever_ends_it_leaves_the_module_as_it_was(monkeypatch, step, error):
    model, fresh = _block(), _block(1)
    gm = _narrowed(model)
    place = class_fit if step == "_otherwise" else write_back_module
    original = getattr(place, step)

    def ended(*arguments):
        original(*arguments)
        raise error

    monkeypatch.setattr(place, step, ended)
    before = _state(fresh), _state(gm)
    with pytest.raises(error):
        fxwidth.write_back(gm, fresh)
    assert _same(before[0], _state(fresh))
    assert _same(before[1], _state(gm))


def test_other_graphs_of_the_model_stay_as_they_are():
    model = _block()
    other = fxwidth.trace(model, _inputs())
    expected = other(_inputs())
    gm = _narrowed(copy.deepcopy(model))
    fxwidth.write_back(gm, model)
    assert torch.equal(other(_inputs()), expected)
    assert torch.equal(model(_inputs()), gm(_inputs()))


def test_evolve_gives_the_module_and_its_optimizer_goes_on():
    model = _block()
    optimizer = torch.optim.AdamW(model.parameters())
    model(_inputs()).square().mean().backward()
    optimizer.step()
    assert fxwidth.evolve(model, _inputs(), params=0.5, optimizer=optimizer, output="module") is model
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))
    loss = model(_inputs()).square().mean()
    loss.backward()
    optimizer.step()
    assert model(_inputs()).square().mean() < loss


def test_a_graph_that_was_written_back_is_resized_with_the_module():
    model = _block(1)
    gm = _narrowed(_block())
    fxwidth.write_back(gm, model)
    width = gm.get_parameter("first.weight").shape[0]
    fxwidth.resize(gm, {"first": width - 1})
    fxwidth.write_back(gm, model)
    assert model.first.out_features == width - 1
    assert torch.equal(model(_inputs()), gm(_inputs()))


def test_what_is_no_graph_or_no_module_is_told():
    gm = fxwidth.trace(_block(), _inputs())
    with pytest.raises(fxwidth.FxwidthError, match=r"takes a graph from fxwidth\.trace, but received Block"):
        fxwidth.write_back(_block(), _block())
    with pytest.raises(fxwidth.FxwidthError, match=r"write_back takes a module of the class"):
        fxwidth.write_back(gm, gm)
    with pytest.raises(fxwidth.FxwidthError, match=r"first\.weight of the graph is none of Linear"):
        fxwidth.write_back(gm, nn.Linear(2, 2))
    with pytest.raises(fxwidth.FxwidthError, match=r"output='model' must be"):
        fxwidth.evolve(_block(), _inputs(), params=0.5, output="model")
    with pytest.raises(fxwidth.FxwidthError, match="for_module= takes a module of the class"):
        fxwidth.plan(fxwidth.analyze(gm), params=0.5, for_module=gm)
