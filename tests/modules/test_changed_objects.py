"""Copies of objects that a model keeps: all references within it lead to the one copy, and no others do."""

import copy
import functools
import pickle
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fxwidth.modules.model_edits import ModelEdits
from fxwidth.rewriting.attributes import UnsettableError

Pair = namedtuple("Pair", ["first", "second"])


class Config:
    def __init__(self, **values: object) -> None:
        self.size = 8
        vars(self).update(values)

    def doubled(self) -> int:
        return 2 * self.size

    def __call__(self) -> int:
        return self.size


def _twice(config: Config) -> int:
    return 2 * config.size


def _model(config: Config) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.config = config
    model[0].config = config
    model[1].all = {"one": [config, 3], "pair": Pair(config, 1), "ordered": OrderedDict(inner=config)}
    model[1].outer = Config(text_config=config, own=Config())
    model[1].doubled, model[1].twice = config.doubled, functools.partial(_twice, config)
    return model


def _references(model: nn.Module) -> list:
    part = model[1]
    found = [model.config, model[0].config, part.all["one"][0], part.all["pair"].first, part.all["ordered"]["inner"]]
    return [*found, part.outer.text_config, part.doubled.__self__, part.twice.args[0]]


def test_all_references_within_lead_to_the_one_copy_and_are_put_back():
    config = Config()
    model = _model(config)
    outer, everything, own = model[1].outer, model[1].all, model[1].outer.own
    edits = ModelEdits(model)
    edits.apply_together([(config, "size", 4)])
    assert config.size == outer.text_config.size == everything["one"][0].size == everything["pair"].first.size == 8
    assert {one.size for one in _references(model)} == {4}
    assert len(set(map(id, _references(model)))) == 1
    assert model[1].doubled() == model[1].twice() == 8
    assert model[1].outer.own is own
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(set(map(id, _references(again)))) == 1
    edits.undo()
    assert all(one is config for one in _references(model))
    assert (model[1].outer, model[1].all) == (outer, everything)


def test_what_leads_to_itself_is_copied_once():
    config = Config(items=[])
    config.itself = (config, config.items)
    config.items.append(config)
    model = _model(config)
    ModelEdits(model).apply_together([(config, "size", 4)])
    assert model.config.itself[0] is model.config.itself[1][0] is model.config.items[0] is model.config
    assert model.config.itself[1] is model.config.items is not config.items


def test_sizes_of_objects_in_one_another_are_changed_at_once():
    inner = Config()
    outer = Config(text_config=inner)
    model = nn.Linear(2, 2)
    model.config, model.text_config = outer, inner
    ModelEdits(model).apply_together([(inner, "size", 3), (outer, "size", 5), (model, "in_features", 4)])
    assert (model.config.size, model.text_config.size, model.in_features) == (5, 3, 4)
    assert model.config.text_config is model.text_config
    assert (outer.size, inner.size) == (8, 8)


def test_what_works_on_modules_is_no_part_of_the_model():
    config = Config()
    model = nn.Linear(2, 2)
    trainer = SimpleNamespace(strategy=SimpleNamespace(model=model), data=SimpleNamespace(config=config))
    model.config, model.trainer, model.beside = config, trainer, [model, config]
    ModelEdits(model).apply_together([(config, "size", 4)])
    assert model.trainer is trainer
    assert trainer.data.config is config
    assert model.beside[1] is model.config is not config


class Single(Config):
    def __copy__(self) -> "Single":
        return self


class Watched(Config):
    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            raise ValueError("sizes are final")
        super().__setattr__(name, value)


class Final(nn.Linear):
    def __setattr__(self, name: str, value: object) -> None:
        if name == "steps" and "steps" in vars(self):
            raise ValueError("sizes are final")
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Single, r"'0\.c' cannot be copied: its copy is"), (Watched, r"'0\.c\.size' cannot be set to 4: ValueError")],
)
def test_an_object_without_a_copy_of_its_own_is_refused_with_its_place(kind, told):
    config = kind()
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].c = config
    edits = ModelEdits(model)
    with pytest.raises(UnsettableError, match=told):
        edits.apply_together([(config, "size", 4)])
    edits.undo()
    assert model[0].c is config
    assert config.size == 8


def test_an_attribute_of_a_module_that_is_not_to_be_set_is_told_and_undone_without_setting_it():
    model = Final(2, 2)
    model.steps = 8
    edits = ModelEdits(model)
    with pytest.raises(UnsettableError, match="steps of Final cannot be set to 4: ValueError: sizes are final"):
        edits.apply_together([(model, "in_features", 3), (model, "steps", 4)])
    edits.undo()
    assert (model.in_features, model.steps) == (2, 8)
    assert torch.is_tensor(model.weight)
