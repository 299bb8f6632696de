"""Why sizes stay: the reasons, where each arose, and what would free the dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Pin:
    """One reason why a size must stay.

    Attributes:
        reason: the reason as a phrase.
        context: the op and node at which it arose; empty for a fact about the dimension itself.
        cause: why the size is fixed that this one must equal, where it is for that.
    """

    reason: str
    context: str = ""
    cause: Pin | None = None

    @property
    def root(self) -> Pin:
        """The pin that this one follows from in the end."""
        root = self
        while root.cause is not None:
            root = root.cause
        return root

    def __str__(self) -> str:
        """Return the reason in one line, with the one that it follows from."""
        own = f"{self.reason} ({self.context})" if self.context else self.reason
        return own if self.cause is None else f"{own}: {self.root}"


class Fixed(int):
    """A constant of an axis that knows why it is one; otherwise an integer like any other."""

    why: Pin

    def __new__(cls, size: int, why: Pin) -> Fixed:
        """Make a constant."""
        fixed = super().__new__(cls, size)
        fixed.why = why
        return fixed

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled with the reason."""
        return Fixed, (int(self), self.why)

    def __hash__(self) -> int:
        """Differ from equal constants of another reason: what is remembered of one must not tell of the other."""
        return hash((int(self), id(self.why)))


# Reasons that say a dim holds no channels at all; such dims are not listed as groups.
KERNEL = "a kernel size"
POSITION = "a position, not a channel"
STRUCTURAL = (KERNEL, POSITION)

CONSTANT = "it must equal a dimension of fixed size"
UNALIGNED = "two factorings of one dimension cannot be aligned"
HELD = "it is a dimension of a tensor that the model holds as a constant"
OUTPUT = "the size of the model's output"
UNUSED = "the graph never uses this parameter"
BY_SIZE = "it is cut where a size of the inputs says"
BATCH = "it is the batch dimension"
BATCH_DIVIDED = "the batch dimension is divided"
SELF_CONTAINED = "a dimension would contain itself"
MADE = "the op makes a dimension of this size, whatever its operands"
ORDER = "the order along the dimension matters"
INDEXED = "the dimension is looked up by index"
GATHERED = "gather takes only the first positions of the dimension"
POSITIONS_RETURNED = "positions along the dimension are returned"
LARGEST = "the largest along the dimension are chosen"
TAKEN_APART = "the dimension is taken apart into a fixed number of tensors"
BY_STRIDES = "a view that is given by its strides"
STRIDED = "a strided slice that does not divide the dimension"
WINDOWS = "windows are cut along the dimension"
TRANSFORMED = "a Fourier transform is taken along the dimension"
MATRIX = "it is a dimension of a matrix that is taken as a whole"
SPARSE = "it is a dimension of a sparse tensor"
COMPLEX = "it holds the real and the imaginary part"
SHUFFLED_GROUPS = "the number of shuffled groups is a literal"
MASKED = "the dimension is under a mask"
FOUND = "how many results there are depends on values"
BOXES = "boxes are chosen by their values"
BOX_SAMPLES = "boxes tell the sample they are in"
BRANCHED = "it is used after the code has branched on a value, or may have"
ON_EMPTY = "it is used on an empty tensor"
KEPT = "it is kept, and read in the next call"
OTHER_WAY = "a part was followed along one way"
WRITTEN_IN = "a size is written into code that cannot be taken apart"
IN_TRAINING = "what a part does with it in training cannot be followed"
SORTED_ROWS = "rows are sorted by the matrix they are multiplied by"
LOST = "it was given width 1, and the graph or the shapes of its inputs are others since"
SCALE = "the attention scale is computed from it"
NO_RULE = "no rule for this op"
KERNEL_OF_A_DEVICE = "no rule for this kernel of one device or build"
FUSED = "no rule for several ops in one"
PACKED = "no rule for packed, sparse or quantized weights"
ACROSS_PROCESSES = "no rule for a part of a batch norm across processes"
NOT_COVERED = "its rule does not cover this call"
OTHER_SHAPES = "its rule expected results of shapes"


def input_dimension(dim: int, name: str) -> str:
    """Return the reason of a dim of one of the model's inputs."""
    return f"{_INPUT} {dim} of the model's input {name!r}"


def is_of_input(reason: str) -> bool:
    """Whether a reason is that of a dim of one of the model's inputs."""
    return reason.startswith(_INPUT)


_INPUT = "it is dimension"
_CALLERS = "Nothing inside the model: its callers know this size."
_REWRITE = "Write this step of the model with ops whose rules cover it, and report this text to fxwidth."
_BY_PLACE = (
    "Nothing, as long as the op works along this dimension: there an entry is known by its place, "
    "and its place changes when others go."
)
_HEADS = "Give the two ops numbers of groups or heads of which one divides the other."

# What would free a dimension, by how its reason begins.
REMEDIES = {
    KERNEL: _BY_PLACE,
    POSITION: _BY_PLACE,
    _INPUT: f"{_CALLERS} A layer between the input and the rest has a width of its own.",
    OUTPUT: "Nothing inside the model: its callers know this size. Where they follow, fxwidth.analyze(gm, "
    "free_outputs=True) frees what the model returns in evaluation, or free_outputs=[...] some of it.",
    UNALIGNED: _HEADS,
    SELF_CONTAINED: _REWRITE,
    HELD: "Hold the tensor as a parameter or a buffer of a module: these are resized with the rest.",
    UNUSED: "Use it in forward, or delete it; what runs in training alone is not in a graph traced in eval mode.",
    BY_SIZE: "Nothing, while inputs of other sizes take other parts of it, as of a table of positions.",
    BATCH: "Nothing: the batch belongs to the callers.",
    BATCH_DIVIDED: "Keep the batch a dimension of its own: reshape the others and leave the first as it is.",
    MADE: "Make the tensor with zeros, ones, full or expand where all its entries along the dimension are alike.",
    ORDER: _BY_PLACE,
    INDEXED: "Nothing, while entries are known by their numbers. Where indices are a regular part of the dimension, "
    "take it with slices, split or chunk: these follow a resize; constant indices do "
    "after fxwidth.untie_copies.",
    GATHERED: "Gather from a tensor that has the size of the index in every other dimension.",
    POSITIONS_RETURNED: "Use the values instead of the positions, if the model can.",
    LARGEST: "Nothing: which entries are chosen depends on all that are there.",
    TAKEN_APART: "Use split or chunk: the sizes of their pieces follow a resize, the number of tensors does not.",
    BY_STRIDES: "Take the view with view, transpose and slices: these follow a resize.",
    STRIDED: "Make the size of the dimension a multiple of the step.",
    WINDOWS: _BY_PLACE,
    TRANSFORMED: _BY_PLACE,
    COMPLEX: _BY_PLACE,
    MATRIX: _BY_PLACE,
    SPARSE: "Nothing: which of its entries are stored is told by their numbers.",
    SHUFFLED_GROUPS: "Write the shuffle as a view, a transpose and a view.",
    MASKED: _BY_PLACE,
    FOUND: _BY_PLACE,
    BOXES: _BY_PLACE,
    BOX_SAMPLES: _BY_PLACE,
    BRANCHED: "Read the number where no parameters are used behind it, or in a module of its own.",
    ON_EMPTY: "Pass example_inputs in which more is found.",
    KEPT: "Pass it to the model and return it, in the place of an attribute.",
    OTHER_WAY: "Pass example_inputs with which all parameters of the part are used.",
    WRITTEN_IN: "Take the size from a tensor or a parameter: x.shape[1] in the place of a number.",
    IN_TRAINING: "Let the part return in training a tensor of the shape that it returns in evaluation, and branch on "
    "no values.",
    SORTED_ROWS: "Nothing: rows and matrices belong together by their numbers.",
    LOST: "Change the graph back, or give the group a width of 2 or more before the change: then a rule can tell its "
    "dimensions from those that are broadcast.",
    SCALE: "Pass scale= to the attention, so that it does not depend on a width.",
    NOT_COVERED: _REWRITE,
    KERNEL_OF_A_DEVICE: "Call the function of torch or torch.nn.functional that chooses the kernel: it has a rule.",
    FUSED: "Call the ops one after the other.",
    PACKED: "Resize the network before its weights are packed, made sparse or quantized.",
    ACROSS_PROCESSES: "Call torch.nn.functional.batch_norm, or trace the model in evaluation mode.",
    OTHER_SHAPES: "Mend the op's rule: it must return one axis per dim of each result, of that dim's size.",
}


def remedy(pin: Pin) -> str:
    """Return what would free a dimension, as a sentence or several lines."""
    root = pin.root
    if root.reason == CONSTANT:
        return "Nothing is known of the other dimension but its size; please report this text to fxwidth."
    if root.reason == NO_RULE:
        op = root.context.partition(" at node ")[0]
        page = 'documentation, "A rule for an op of your own"'
        return f"A rule, which says of what axes the op's results are made ({page}):\n{_rule_for(op)}"
    found = next((text for reason, text in REMEDIES.items() if root.reason.startswith(reason)), None)
    return found or "What the op's rule says: change the model at that node."


def _rule_for(op: str) -> str:
    named = repr(op) if "::" in op else f"torch.ops.aten.{op}"
    lines = [f"@fxwidth.rules.registry.rule({named})", "def its_axes(c):"]
    lines += ["    return [c.axes(...)]  # if the result has the axes of this operand"]
    return "\n".join(f"    {line}" for line in lines)
