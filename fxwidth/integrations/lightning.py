"""A callback of Lightning that evolves a network while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, fx

from fxwidth.checkpoint.packing import packed, unpacked
from fxwidth.checkpoint.pickled import refuse_untrusted
from fxwidth.errors import FxwidthError
from fxwidth.evolution.evolver import Evolver
from fxwidth.integrations.evolving import Evolving

_GRAPH = "fxwidth_graph"


class EvolverCallback(Callback):
    """Evolves the graph that a LightningModule holds, after each optimizer step.

    Checkpoints hold the graph as it is: `load_graph` gives it, for a LightningModule that goes on from there.

    Args:
        graph: the name of the attribute of the LightningModule that holds what `fxwidth.trace` returned.
        batch: from a batch of the training to what `fxwidth.Evolver.step` takes: inputs, and targets behind them; by
            default the batch, a sequence, as it is.
        monitor: the metric that `Evolver.epoch` is given, with every="epoch".
        options: those of `fxwidth.Evolver`.

    Attributes:
        evolver: the `fxwidth.Evolver`, from the beginning of the training on.

    Raises:
        FxwidthError: when training begins, the attribute holds no graph, several processes train it, or an option
            cannot be used.

    Example:
        >>> import lightning, warnings
        >>> from fxwidth.integrations.lightning import EvolverCallback
        >>> class Classifier(lightning.LightningModule):
        ...     def __init__(self, net):
        ...         super().__init__()
        ...         self.net = net
        ...     def training_step(self, batch, index):
        ...         x, y = batch
        ...         return torch.nn.functional.cross_entropy(self.net(x), y)
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters())
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> module = Classifier(fxwidth.trace(net, torch.randn(2, 8)))
        >>> callback = EvolverCallback("net", every=2, params=0.5, rounds=2)
        >>> quiet = dict.fromkeys(
        ...     ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        >>> trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     batches = [(torch.randn(16, 8), torch.arange(16) % 4) for _ in range(8)]
        ...     trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        >>> callback.evolver.finished, module.net.get_parameter("0.weight").shape
        (True, torch.Size([7, 8]))
    """

    def __init__(
        self,
        graph: str,
        *,
        batch: Callable[[Any], Sequence[Any]] | None = None,
        monitor: str | None = None,
        **options: Any,
    ) -> None:
        self._graph, self._batch, self._monitor = graph, batch, monitor
        self._evolving = Evolving(options)
        self._steps = 0

    @property
    def evolver(self) -> Evolver | None:
        """The Evolver, from the beginning of the training on."""
        return self._evolving.evolver

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the Evolver."""
        self._evolving.begin(self._graph_of(pl_module), list(trainer.optimizers), trainer.world_size)
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step, if gradients have not only been accumulated."""
        if self.evolver is not None and trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.evolver.step(*self._arguments(batch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count an epoch."""
        if self.evolver is None or not self._evolving.by_epoch:
            return
        metric = trainer.callback_metrics.get(self._monitor) if self._monitor is not None else None
        if self._monitor is not None and metric is None:
            known = ", ".join(trainer.callback_metrics) or "none"
            raise FxwidthError(
                f"monitor={self._monitor!r} has not been logged by the end of the epoch; logged: {known}"
            )
        self.evolver.epoch(metric)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the graph, since a fresh one has other widths than the weights."""
        checkpoint[_GRAPH] = packed(self._graph_of(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the Evolver."""
        return self._evolving.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the Evolver was."""
        self._evolving.load_state_dict(state_dict)

    def _graph_of(self, pl_module: LightningModule) -> fx.GraphModule:
        found = getattr(pl_module, self._graph, None)
        if not isinstance(found, fx.GraphModule):
            raise FxwidthError(
                f"EvolverCallback({self._graph!r}): {type(pl_module).__name__}.{self._graph} is "
                f"{type(found).__name__ if found is not None else 'not there'}, and must be what fxwidth.trace returns."
            )
        return found

    def _arguments(self, batch: Any) -> Sequence[Any]:
        if self._batch is not None:
            return self._batch(batch)
        return (batch,) if isinstance(batch, Tensor) or not isinstance(batch, Sequence) else batch


def load_graph(path: str | Path, *, trusted: bool = False) -> fx.GraphModule:
    """Return the graph in a checkpoint of Lightning, at the widths that it had.

    Args:
        path: of the checkpoint.
        trusted: that it is from someone whom you trust: it is Python's pickle, which can run any code.

    Raises:
        FxwidthError: it is not trusted, or no EvolverCallback has written a graph into it.
    """
    refuse_untrusted(path, trusted=trusted)
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    if not isinstance(checkpoint, dict) or _GRAPH not in checkpoint:
        raise FxwidthError(f"{path} holds no graph: it was written by a training without an EvolverCallback.")
    return unpacked(checkpoint[_GRAPH], path, trusted=trusted)
