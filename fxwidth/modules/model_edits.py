"""Changes of what a model keeps in its modules and in objects, which can be taken back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxwidth.modules.changed_objects import changed_references
from fxwidth.rewriting.attributes import AttributeEdits

# An attribute of a module or of an object, and a value for it.
Change = tuple[Any, str, Any]


class ModelEdits(AttributeEdits):
    """Changes of a model's attributes: those of its modules are set, and objects are replaced by changed copies.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def apply_together(self, changes: Iterable[Change]) -> None:
        """Set attributes of modules and of objects that they hold; what is told is by the objects that there are now.

        Raises:
            UnsettableError: an object cannot be copied, or its attribute not be set.
        """
        in_objects: dict[int, tuple[Any, dict[str, Any]]] = {}
        for owner, name, value in changes:
            if isinstance(owner, nn.Module):
                self.apply(owner, {name: value})
            elif getattr(owner, name) != value:
                in_objects.setdefault(id(owner), (owner, {}))[1][name] = value
        found: Iterable[tuple[nn.Module, str, Any]] = ()
        if in_objects:
            held: list[tuple[Any, Mapping[str, Any]]] = list(in_objects.values())
            found = changed_references(self._model, held)
        for part, name, value in found:
            self.put(part, name, value)
