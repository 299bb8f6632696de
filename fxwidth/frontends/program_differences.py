"""What an `ExportedProgram` that was made anew has lost of the one before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

from fxwidth.errors import FxwidthError
from fxwidth.frontends.program_sizes import symbolic_sizes, trial_inputs


def refuse_lost(before: ExportedProgram, after: ExportedProgram) -> None:
    """Check that a program takes and returns what the one before did, and holds what it held; it may hold more.

    Raises:
        FxwidthError: something is lost.
    """
    lost = next(_lost(before, after), None)
    if lost is not None:
        raise FxwidthError(
            f"torch.export would lose something of the ExportedProgram: {lost}. Go on with the graph itself: "
            "fxwidth.trace(program), then fxwidth.resize."
        )


def _lost(before: ExportedProgram, after: ExportedProgram) -> Iterator[str]:
    """Yield what is not as it was."""
    if before.dialect != after.dialect:
        yield f"it was of the dialect {before.dialect} and would be of {after.dialect}"
    for name in ("in_spec", "out_spec"):
        old, new = getattr(before.call_spec, name), getattr(after.call_spec, name)
        if old != new:
            yield f"its {name} was {old} and would be {new}"
    held = [set(_held(program)) for program in (before, after)]
    if missing := sorted(map(str, held[0] - held[1])):
        yield f"{missing[0]} is no longer held as such"
    given = [_user_inputs(program) for program in (before, after)]
    if given[0] != given[1]:
        yield f"its inputs were {given[0]} and would be {given[1]}"
    returned = [Counter(_returned(program)) for program in (before, after)]
    if returned[0] != returned[1]:
        yield f"its outputs were {sorted(returned[0])} and would be {sorted(returned[1])}"
    sizes = [symbolic_sizes(_values(program), program.range_constraints) for program in (before, after)]
    if sizes[0] != sizes[1]:
        yield f"the sizes of its inputs were {sizes[0]} and would be {sizes[1]}"
    if missing := sorted(before.state_dict.keys() - after.state_dict.keys()):
        yield f"{missing[0]} is not in its state dict"
    yield from _refused(before, after)


def _refused(before: ExportedProgram, after: ExportedProgram) -> Iterator[str]:
    """Yield sizes of inputs that a program took, and takes no longer: those that are tried."""
    names = _argument_names(before)
    for leaves in trial_inputs(_values(before), before.range_constraints):
        args, kwargs = pytree.tree_unflatten(leaves, before.call_spec.in_spec)
        scope = {**SYMPY_INTERP, "L": dict(zip(names, (*args, *kwargs.values()), strict=False))}

        def holds(condition: str) -> bool:
            # The program's own code, which its module runs in the same way.
            return bool(eval(condition, scope))  # noqa: B023

        if all(map(holds, before._guards_code)):
            unmet = [one for one in after._guards_code if not holds(one)]
            if unmet:
                shapes = [list(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
                yield f"inputs of shapes {shapes}, which it took, would be refused: {unmet[0]}"


def _argument_names(program: ExportedProgram) -> list[str]:
    codegen: Any = program.module(check_guards=False).graph._codegen
    return [name for name in codegen.pytree_info.orig_args if name != "self"]


def _held(program: ExportedProgram) -> Iterator[tuple[Any, ...]]:
    """Yield what a program holds: the kind, the name, and whether it is saved in a state dict."""
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            yield spec.kind.name, spec.target, spec.persistent


def _user_inputs(program: ExportedProgram) -> list[Any]:
    """Return names of inputs, and those that are numbers or texts as they are."""
    return [
        (spec.arg.name, getattr(spec.arg, "value", None))
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    ]


def _returned(program: ExportedProgram) -> Iterator[tuple[str, str]]:
    """Yield the kind of each output, with what it is written to; names of nodes are nobody's affair."""
    for spec in program.graph_signature.output_specs:
        yield spec.kind.name, str(spec.target) if spec.kind != OutputKind.USER_OUTPUT else ""


def _values(program: ExportedProgram) -> list[Any]:
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT}
    return [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder") if node.name in names]
