"""A callback of the Hugging Face Trainer: what an Evolver does in a plain loop, checkpoints included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxwidth
from fxwidth import FxwidthError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fxwidth.integrations.transformers import EvolverCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [
    {"x": torch.randn(6, generator=torch.Generator().manual_seed(i)), "labels": torch.tensor(i % 3)} for i in range(48)
]
OPTIONS: dict[str, Any] = {"params": 0.5, "rounds": 3, "every": 3}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return fxwidth.trace(Classifier(), {"x": torch.randn(8, 6), "labels": torch.arange(8) % 3})


def trained(gm: nn.Module, callback: EvolverCallback, folder: Path, resume: Path | None = None, **options: Any) -> Any:
    options = {"num_train_epochs": 3, "save_strategy": "no", "learning_rate": 0.01, **options}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, logging_strategy="no", seed=3, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=gm, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_a_checkpoint_goes_on_to_the_same_result(tmp_path: Path) -> None:
    gm, callback = graph(), EvolverCallback(**OPTIONS)
    trained(gm, callback, tmp_path / "run", save_strategy="epoch")
    assert callback.evolver is not None
    assert [record["step"] for record in callback.evolver.history] == [3, 6, 9]
    assert callback.evolver.finished
    assert sum(p.numel() for p in gm.parameters()) <= 0.5 * sum(p.numel() for p in graph().parameters())
    checkpoint = tmp_path / "run" / "checkpoint-6"
    again = EvolverCallback(**OPTIONS)
    resumed = again.resume(checkpoint, trusted=True)
    trained(resumed, again, tmp_path / "again", checkpoint)
    assert again.evolver is not None
    assert again.evolver.history == callback.evolver.history
    for (name, tensor), wanted in zip(resumed.state_dict().items(), gm.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, msg=name)


def test_epochs_and_a_metric(tmp_path: Path) -> None:
    callback = EvolverCallback(params=0.5, rounds=2, every="epoch")
    trained(graph(), callback, tmp_path)
    assert callback.evolver is not None
    assert [record["step"] for record in callback.evolver.history] == [6, 12]
    callback = EvolverCallback(monitor="eval_loss", params=0.5, rounds=1, every="epoch", patience=1)
    trained(graph(), callback, tmp_path, eval_strategy="epoch", learning_rate=0.0)
    assert callback.evolver is not None
    assert [record["step"] for record in callback.evolver.history] == [12]
    callback = EvolverCallback(monitor="accuracy", params=0.5, every="epoch")
    with pytest.raises(FxwidthError, match="monitor='accuracy' is no metric of the evaluation, which has: eval_loss"):
        trained(graph(), callback, tmp_path, eval_strategy="epoch")


def test_what_cannot_be_evolved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxwidthError, match=r"evolves a torch.fx.GraphModule, but received Classifier"):
        trained(Classifier(), EvolverCallback(**OPTIONS), tmp_path)
    with pytest.raises(FxwidthError, match="is of a training without an EvolverCallback"):
        EvolverCallback(**OPTIONS).resume(tmp_path, trusted=True)
