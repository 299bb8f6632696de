"""What else is asked of a traced graph in the coverage sweeps: both modes, another batch size, and a model left alone.

Each check says one word in the row of its model: "right", "told: ..." where `trace` warned of it, "model itself: ..."
where the model cannot be held to it, or what is wrong.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, fx, nn

import fxwidth
from benchmarks.coverage_cases import Call
from benchmarks.coverage_runs import Run, equal, gradients, other_batch, rearranged, run
from benchmarks.coverage_values import TOLERANCE, difference
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.untouched import differences, snapshot

RIGHT, ITSELF, TOLD = "right", "model itself: ", "told: "
# The columns of the table, and the checks that each sums up.
COLUMNS = {
    "state": ("state", "state, analysed", "state, traced in train", "names"),
    "modes": ("eval", "train", "traced in train", "resized, train"),
    "other batch": ("other batch", "resized, other batch"),
}
_WORDS = 300  # characters of one


def holds(word: str) -> bool:
    """Tell whether a check's word is none of a fault."""
    return word == RIGHT or word.startswith((ITSELF, TOLD))


def summed_up(words: dict[str, str], column: str) -> str:
    """Return what a column says of a model: "right" if all its checks hold, the kind of exception, or the faults."""
    found = {name: words[name] for name in COLUMNS[column] if name in words}
    faults = [name for name, word in found.items() if not holds(word)]
    if faults:
        return f"wrong ({'; '.join(faults)})"
    kinds = {word.partition(":")[0] for word in found.values()} - {RIGHT}
    return ", ".join(sorted(kinds)) if kinds else (RIGHT if found else "")


class ModelItselfError(Exception):
    """The model cannot be held to a check."""


class ModeChecks:
    """The checks of one model: made before it is traced, asked for after each step, `words` in the end."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.words: dict[str, str] = {}
        self._call, self._others = call, other_batch(call)
        self._model = copy.deepcopy(model).eval()
        self._tolerance = TOLERANCE[next(model.parameters()).dtype]
        self._known: dict[tuple[bool, bool, int, bool], Run | str] = {}
        self._with_gradient: frozenset[str] = frozenset()

    @contextmanager
    def looking(self, name: str, model: nn.Module) -> Iterator[None]:
        """Check that what is done here leaves a model and the global state as they were."""
        before = snapshot(model)
        yield
        changed = differences(before, snapshot(model))
        self.words[name] = f"{len(changed)} changes: {'; '.join(changed)}"[:_WORDS] if changed else RIGHT

    def traced(self, gm: fx.GraphModule, told: list[str]) -> None:
        """Compare a graph, traced in eval mode, with the model in both modes and at another batch size."""
        self._check("names", lambda: self._names(gm))
        self._check("eval", lambda: self._in_eval(gm))
        self._check("train", lambda: self._in_training(gm), told)
        self._check("other batch", lambda: self._other_batch(gm))
        try:
            self._with_gradient = gradients(gm, self._call)
        except Exception:
            self._with_gradient = frozenset()

    def traced_in_training(self) -> None:
        """Trace the model in training mode, and compare in both modes."""
        told: list[str] = []

        def compared() -> str:
            self._of_the_model(training=True)
            model = copy.deepcopy(self._model).train()
            with self.looking("state, traced in train", model), warnings_of(told):
                gm = fxwidth.trace(model, self._call.args, self._call.kwargs)
            word = self._in_eval(gm)
            return self._in_training(gm) if word == RIGHT else word

        self._check("traced in train", compared, told)
        gc.collect()

    def resized(self, gm: fx.GraphModule) -> None:
        """Check a resized graph at another batch size and in training mode."""
        self._check("resized, other batch", lambda: self._rows_alone(gm))
        self._check("resized, train", lambda: self._trains(gm))

    def _check(self, name: str, check: Callable[[], str], told: list[str] | None = None) -> None:
        try:
            word = check()
        except ModelItselfError as error:
            word = f"{ITSELF}{error}"
        except Exception as error:
            word = _said(error)
        if not holds(word) and told:
            word = f"{TOLD}{told[0]}"
        self.words[name] = word[:_WORDS]

    def _of_the_model(self, other: bool = False, training: bool = False, seed: int = 0, steady: bool = False) -> Run:
        """Return a run of the model itself, each of which is made once.

        Raises:
            ModelItselfError: the model does not run so.
        """
        key = other, training, seed, steady
        if key not in self._known:
            try:
                self._known[key] = run(self._model, self._others if other else self._call, training, seed, steady)
            except Exception as error:
                self._known[key] = _said(error)
        known = self._known[key]
        if isinstance(known, str):
            raise ModelItselfError(known)
        return known

    def _excuse_random(self) -> None:
        if not equal(self._of_the_model().outputs, self._of_the_model(seed=1).outputs):
            raise ModelItselfError("random in eval mode")

    def _names(self, gm: fx.GraphModule) -> str:
        own = {name for name, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers())}
        missing = [n for n, _ in (*self._model.named_parameters(), *self._model.named_buffers()) if n not in own]
        return f"{len(missing)} missing: {', '.join(missing)}" if missing else RIGHT

    def _in_eval(self, gm: fx.GraphModule) -> str:
        expected = self._of_the_model()
        self._excuse_random()
        own = run(gm, self._call)
        if not equal(own.outputs, run(gm, self._call, seed=1).outputs):
            return "twice in eval mode: not equal"
        return self._compared(own, expected, "in eval mode")

    def _in_training(self, gm: fx.GraphModule) -> str:
        expected = self._of_the_model(training=True)
        own = run(gm, self._call, training=True)
        word = self._compared(own, expected, "in training mode")
        if word == RIGHT:
            return word
        # The same noise may be drawn in another order.
        is_random = not equal(own.outputs, run(gm, self._call, training=True, seed=1).outputs)
        if is_random == equal(expected.outputs, self._of_the_model(training=True, seed=1).outputs):
            return f"in training mode: {'random where the model is not' if is_random else 'the noise is lost'}"
        own = run(gm, self._call, training=True, steady=True)
        return self._compared(own, self._of_the_model(training=True, steady=True), "in training mode")

    def _compared(self, own: Run, expected: Run, place: str) -> str:
        apart = difference(own.outputs, expected.outputs)
        if not apart < self._tolerance:
            return f"{place}: outputs differ by {apart:.1e}"
        for name, values in expected.written.items():
            if name not in own.written:
                return f"{place}: {name} is not written"
            if not difference([own.written[name]], [values]) < self._tolerance:
                return f"{place}: {name} is written otherwise"
        extra = own.written.keys() - expected.written.keys()
        return f"{place}: {min(extra)} is written, too" if extra else RIGHT

    def _other_batch(self, gm: fx.GraphModule) -> str:
        expected = self._of_the_model(other=True)
        self._excuse_random()
        return self._compared(run(gm, self._others), expected, "at another batch size")

    def _rows_alone(self, gm: fx.GraphModule) -> str:
        """Compare every row's outputs with those of the same row in another batch, wherever the model's are equal."""
        own = _apart(rearranged(self._of_the_model()), self._of_the_model(other=True).outputs)
        alone = [i for i, distance in enumerate(own) if distance < 1e-3]
        if not alone:
            raise ModelItselfError("the rows of a batch depend on each other")
        # Sums of other shapes are rounded otherwise, in float32 where the model computes in it.
        bound = max(self._tolerance, *(100 * own[i] for i in alone))
        apart = _apart(rearranged(run(gm, self._call)), run(gm, self._others).outputs)
        worst = max(apart[i] if i < len(apart) else float("inf") for i in alone)
        return RIGHT if worst < bound else f"rows differ by {worst:.1e} in another batch"

    def _trains(self, gm: fx.GraphModule) -> str:
        if not self._with_gradient:
            raise ModelItselfError("no gradients in training mode")
        found, kept = gradients(gm, self._call), {name for name, _ in gm.named_parameters()}
        lost = sorted((self._with_gradient & kept) - found)
        if lost or not found:
            return f"no finite gradient for {', '.join(lost) or 'any parameter'}"
        self._excuse_random()
        again = equal(run(gm, self._call).outputs, run(gm, self._call, seed=1).outputs)
        return RIGHT if again else "twice in eval mode: not equal"


@contextmanager
def warnings_of(told: list[str]) -> Iterator[None]:
    """Collect the warnings that tell of what differs between training and evaluation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told += [str(w.message) for w in caught if "train()" in str(w.message) or "eval()" in str(w.message)]


def _apart(expected: list[Tensor | None], outputs: list[Tensor]) -> list[float]:
    pairs = zip(expected, outputs, strict=False)
    return [float("inf") if one is None else largest_difference([other], [one]) for one, other in pairs]


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_WORDS]
