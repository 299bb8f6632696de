"""The entries of a configuration with which a class comes out of given sizes: alone, at once, and told apart by ops."""

from dataclasses import dataclass

import pytest
from torch import nn

from fxwidth.modules.class_runs import Failure
from fxwidth.modules.config_fit import fit_config
from fxwidth.modules.rebuilding import Rebuilding, shapes_of


@dataclass
class Config:
    width: int = 8
    embedding: int = 8
    size: int = 4
    heads: int = 4
    inner: int = 12


class Heads(nn.Module):
    """Projections of heads times their size; a bias has one column for each head, if it is there."""

    has_bias = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(6, config.heads * config.size, bias=False)
        if self.has_bias:
            self.bias = nn.Embedding(5, config.heads)


class Bare(Heads):
    has_bias = False


class Embedded(nn.Module):
    """An embedding of another size than the layers' has a projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(9, config.embedding)
        if config.embedding != config.width:
            self.projection = nn.Linear(config.embedding, config.width)
        self.layer = nn.Linear(config.width, config.inner)


class Rounding(nn.Module):
    """Its projection is as wide as heads of a whole size are together."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.width, config.width // config.heads * config.heads)


def _fitted(kind: type[nn.Module], config: Config, wanted: Config, known: dict, judge=lambda built: None):
    rebuilding = Rebuilding.of(kind(config))
    found = fit_config(rebuilding, shapes_of(kind(wanted)), known, judge)
    return {str(entry): value for entry, value in found.changes.items()}, found.problem


def test_heads_are_told_from_their_size_by_what_has_a_column_for_each():
    halved = Config(heads=2)
    assert _fitted(Heads, Config(), halved, {4: [2, 4]}) == ({"heads": 2}, None)
    assert _fitted(Heads, Config(), Config(size=2), {4: [2, 4]}) == ({"size": 2}, None)
    assert _fitted(Heads, Config(), Config(size=2, heads=3), {4: [3, 2]}) == ({"size": 2, "heads": 3}, None)


def test_where_shapes_do_not_tell_ops_do():
    tried = []

    def judge(built: nn.Module) -> Failure | None:
        tried.append(built.config)
        return None if built.config.heads == 2 else Failure(3, "", "", "it does otherwise")

    assert _fitted(Bare, Config(), Config(heads=2), {4: [2, 4]}, judge) == ({"heads": 2}, None)
    assert len(tried) <= 3
    never = lambda built: Failure(3, "a", "b", "it does otherwise")  # noqa: E731
    assert "it does otherwise" in _fitted(Bare, Config(), Config(heads=2), {4: [2, 4]}, never)[1]


def test_entries_that_must_change_at_once_are_found():
    wanted = Config(width=6, embedding=6, inner=5)
    changes, problem = _fitted(Embedded, Config(), wanted, {8: [6], 12: [5]})
    assert (changes, problem) == ({"width": 6, "embedding": 6, "inner": 5}, None)


@pytest.mark.parametrize("heads", [2, 1])
def test_a_size_that_another_entry_rounds_off_is_found(heads):
    """With three heads a width of four has projections of three."""
    changes, problem = _fitted(Rounding, Config(width=6, heads=3), Config(width=4, heads=heads), {6: [4], 3: [heads]})
    assert (changes, problem) == ({"width": 4, "heads": heads}, None)


def test_that_one_entry_would_need_two_numbers_is_told():
    class Two(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config = config
            self.first, self.second = nn.Linear(3, config.inner), nn.Linear(3, config.inner)

    rebuilding = Rebuilding.of(Two(Config()))
    shapes = shapes_of(Two(Config()))
    shapes |= {"first.weight": (5, 3), "first.bias": (5,), "second.weight": (7, 3), "second.bias": (7,)}
    found = fit_config(rebuilding, shapes, {12: [5, 7]}, lambda built: None)
    assert "one number, inner, where" in found.problem
    assert "5 for first" in found.problem
    assert "7 for second" in found.problem
