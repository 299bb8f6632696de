"""A configuration that several models share: what is written to one of them changes nothing for the others."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import fxwidth
from fxwidth.modules import write_back as write_back_module


class Plain:
    def __init__(self) -> None:
        self.hidden = 6


@dataclasses.dataclass
class Fields:
    hidden: int = 6


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: int = 6


class Watched(Plain):
    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            raise TypeError("sizes are final")
        super().__setattr__(name, value)


class Net(nn.Module):
    def __init__(self, settings: object) -> None:
        super().__init__()
        self.settings = settings
        self.kept = {"all": [settings]}
        self.a = nn.Linear(4, 12)
        self.c = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.a(x)).view(x.shape[0], -1, self.settings.hidden).mean(1))


def _net(settings: object) -> Net:
    torch.manual_seed(0)
    return Net(settings).double().eval()


_X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Plain, Fields, Frozen])
def test_a_teacher_with_the_same_configuration_stays(kind):
    settings = kind()
    teacher, student = _net(settings), _net(settings)
    expected = teacher(_X)
    kept = student.kept
    fxwidth.evolve(student, _X, params=0.6, output="module")
    assert student.settings.hidden < 6
    assert student.kept["all"][0] is student.settings
    assert (settings.hidden, kept["all"][0]) == (6, settings)
    assert teacher.settings is settings
    assert torch.equal(teacher(_X), expected)
    for again in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(again(_X), student(_X))


@pytest.mark.parametrize("kind", [Plain, Frozen])
def test_what_ends_it_leaves_the_same_objects(kind, monkeypatch):
    settings = kind()
    net = _net(settings)
    kept, gm = net.kept, fxwidth.trace(_net(kind()), _X)
    fxwidth.resize(gm, {"a#1": 4})

    def ended(*_: object) -> None:
        assert net.settings.hidden == 4
        raise KeyboardInterrupt

    monkeypatch.setattr(write_back_module, "refuse_other_values", ended)
    with pytest.raises(KeyboardInterrupt):
        fxwidth.write_back(gm, net)
    assert net.settings is settings
    assert net.kept is kept
    assert (settings.hidden, kept["all"]) == (6, [settings])


def test_a_plan_keeps_a_size_that_cannot_be_set_and_tells_why():
    net = _net(Watched())
    graph = fxwidth.analyze(fxwidth.trace(net, _X))
    plan = fxwidth.plan(graph, params=0.9, for_module=net)
    assert "'settings.hidden' cannot be set to" in str(plan.notes["for_module"]["staying"])
    gm = fxwidth.resize(fxwidth.trace(_net(Watched()), _X), {"a#1": 4})
    with pytest.raises(fxwidth.FxwidthError, match=r"'settings\.hidden' cannot be set to 4: TypeError: sizes"):
        fxwidth.write_back(gm, net)
    assert net.settings.hidden == 6


def test_a_teacher_of_transformers_is_loaded_again_and_so_is_the_student(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    teacher, student = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    before, tokens = config.to_dict(), torch.arange(20).view(2, 10)
    fxwidth.evolve(student, {"input_ids": tokens}, params=0.6, output="module")
    own = {id(vars(part)["config"]) for part in student.modules() if "config" in vars(part)}
    assert own == {id(student.config)}
    assert student.config is not config
    assert (teacher.config, teacher.config.to_dict()) == (config, before)
    for name, model in (("teacher", teacher), ("student", student), ("copy", copy.deepcopy(student))):
        model.save_pretrained(tmp_path / name)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name).eval()
        assert torch.equal(again(tokens).logits, model(tokens).logits)
