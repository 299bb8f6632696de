"""A callback of Lightning: what an Evolver does in a plain loop, checkpoints included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

import fxwidth
from fxwidth import FxwidthError

lightning = pytest.importorskip("lightning")
from fxwidth.integrations.lightning import EvolverCallback, load_graph  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = [(torch.randn(8, 6, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in range(6)]
OPTIONS: dict[str, Any] = {"params": 0.5, "rounds": 3, "every": 3}


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.held_out = 1.0

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.log("held_out", self.held_out)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    return fxwidth.trace(net, BATCHES[0][0])


def trained(gm: fx.GraphModule, callback: EvolverCallback, folder: Path, epochs: int, **options: Any) -> Any:
    path = options.pop("ckpt_path", None)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback], logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(Classifier(gm), DataLoader(BATCHES, batch_size=None), ckpt_path=path)
    return trainer


def by_hand(every: int = 3, accumulate: int = 1) -> tuple[fx.GraphModule, fxwidth.Evolver]:
    gm = graph()
    optimizer = torch.optim.AdamW(gm.parameters(), lr=0.01)
    evolver = fxwidth.Evolver(gm.train(), optimizer, **{**OPTIONS, "every": every})
    for _ in range(3):
        for number, (x, y) in enumerate(BATCHES):
            (nn.functional.cross_entropy(gm(x), y) / accumulate).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                evolver.step(x, y)
    return gm, evolver


def assert_same(one: fx.GraphModule, other: fx.GraphModule) -> None:
    for (name, tensor), wanted in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_what_a_plain_loop_does(accumulate: int, tmp_path: Path) -> None:
    gm, callback = graph(), EvolverCallback("net", **OPTIONS)
    trained(gm, callback, tmp_path, 3, accumulate_grad_batches=accumulate)
    wanted, evolver = by_hand(accumulate=accumulate)
    assert callback.evolver is not None
    assert callback.evolver.history == evolver.history
    assert len(evolver.history) == 3
    assert_same(gm, wanted)


def test_a_checkpoint_goes_on_to_the_same_result(tmp_path: Path) -> None:
    first = EvolverCallback("net", **OPTIONS)
    trained(graph(), first, tmp_path, 1).save_checkpoint(tmp_path / "one.ckpt")
    gm, callback = load_graph(tmp_path / "one.ckpt", trusted=True), EvolverCallback("net", **OPTIONS)
    trained(gm, callback, tmp_path, 3, ckpt_path=tmp_path / "one.ckpt")
    wanted, evolver = by_hand()
    assert callback.evolver is not None
    assert callback.evolver.history == evolver.history
    assert_same(gm, wanted)


def test_epochs_and_a_metric(tmp_path: Path) -> None:
    callback = EvolverCallback("net", monitor="held_out", params=0.5, rounds=1, every="epoch", patience=2)
    trained(graph(), callback, tmp_path, 4)
    assert callback.evolver is not None
    # The metric stays as it was in the first epoch; the resize comes two epochs later.
    assert [record["step"] for record in callback.evolver.history] == [18]
    with pytest.raises(
        FxwidthError, match="monitor='loss' has not been logged by the end of the epoch; logged: held_out"
    ):
        trained(graph(), EvolverCallback("net", monitor="loss", params=0.5, every="epoch"), tmp_path, 1)


def test_batches_of_another_form(tmp_path: Path) -> None:
    seen: list[Any] = []

    def inputs(batch: Any) -> Any:
        seen.append(batch)
        return batch[:1]

    trained(graph(), EvolverCallback("net", batch=inputs, **OPTIONS), tmp_path, 1)
    assert len(seen) == len(BATCHES)


def test_what_cannot_be_evolved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxwidthError, match=r"Classifier.net is Linear, and must be what fxwidth.trace returns"):
        trained(nn.Linear(6, 3), EvolverCallback("net", **OPTIONS), tmp_path, 1)  # type: ignore[arg-type]
    with pytest.raises(FxwidthError, match=r"Classifier.body is not there"):
        trained(graph(), EvolverCallback("body", **OPTIONS), tmp_path, 1)
    with pytest.raises(FxwidthError, match="2 processes train this network"):
        EvolverCallback("net", **OPTIONS)._evolving.begin(graph(), None, 2)
    torch.save({}, tmp_path / "other.ckpt")
    with pytest.raises(FxwidthError, match="holds no graph"):
        load_graph(tmp_path / "other.ckpt", trusted=True)
