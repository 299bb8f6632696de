"""A callback of the Hugging Face Trainer that evolves a network while it trains."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fxwidth.checkpoint.packing import packed, unpacked
from fxwidth.errors import FxwidthError
from fxwidth.evolution.evolver import Evolver
from fxwidth.integrations.evolving import Evolving
from fxwidth.runtime.atomic_files import replacing

_FILE = "fxwidth_evolution.pt"


class EvolverCallback(TrainerCallback):
    """Evolves the graph that a Trainer trains, after each optimizer step.

    The graph is one that was traced with labels, so that it gives a loss as the model does. What it is called with is
    remembered for the Evolver, which looks at it where no `data=` are given.

    Args:
        monitor: the metric of an evaluation that `Evolver.epoch` is given, with every="epoch", such as "eval_loss".
        options: those of `fxwidth.Evolver`, but for `loss`.

    Attributes:
        evolver: the `fxwidth.Evolver`, from the beginning of the training on.

    Raises:
        FxwidthError: when training begins, the Trainer trains no graph, several processes train it, or an option cannot
            be used.

    Example:
        >>> from fxwidth.integrations.transformers import EvolverCallback
        >>> callback = EvolverCallback(every=100, params=0.5)  # Trainer(model=gm, ..., callbacks=[callback])
    """

    def __init__(self, *, monitor: str | None = None, **options: Any) -> None:
        self._monitor = monitor
        self._evolving = Evolving(options)
        self._last: tuple[Any, ...] = ()
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def evolver(self) -> Evolver | None:
        """The Evolver, from the beginning of the training on."""
        return self._evolving.evolver

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Make the Evolver."""
        optimizer = given["optimizer"]
        # That of accelerate holds the one that was given.
        self._evolving.begin(given["model"], getattr(optimizer, "optimizer", optimizer), args.world_size)
        self._hook = given["model"].register_forward_pre_hook(self._remember, with_kwargs=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Count a step."""
        if self.evolver is not None:
            self.evolver.step(*self._last)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Count an epoch, if no metric is waited for."""
        if self.evolver is not None and self._evolving.by_epoch and self._monitor is None:
            self.evolver.epoch()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Count an epoch with its metric."""
        if self.evolver is None or not self._evolving.by_epoch or self._monitor is None:
            return
        metrics = given.get("metrics") or {}
        if self._monitor not in metrics:
            known = ", ".join(metrics) or "none"
            raise FxwidthError(f"monitor={self._monitor!r} is no metric of the evaluation, which has: {known}")
        self.evolver.epoch(metrics[self._monitor])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write the graph and the state of the Evolver beside the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        with replacing(folder / _FILE) as path:
            torch.save({"graph": packed(given["model"]), "state": self._evolving.state_dict()}, path)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Let go of the graph."""
        if self._hook is not None:
            self._hook.remove()
        self._last = ()

    def resume(self, checkpoint: str | Path, *, trusted: bool = False) -> fx.GraphModule:
        """Return the graph in a checkpoint, at the widths that it had, and go on where its Evolver was.

        Args:
            checkpoint: the folder that is given to `Trainer.train(resume_from_checkpoint=)` too, of a Trainer that
                trains this graph.
            trusted: that it is from someone whom you trust: the graph in it is Python's pickle, which can run any code.

        Raises:
            FxwidthError: no EvolverCallback has written to the folder, or it is not trusted.
        """
        path = Path(checkpoint) / _FILE
        if not path.is_file():
            raise FxwidthError(f"{path} is not there: the checkpoint is of a training without an EvolverCallback.")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        graph = unpacked(saved["graph"], path, trusted=trusted)
        self._evolving.load_state_dict(saved["state"])
        return graph

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self._last = tuple(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
