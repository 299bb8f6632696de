"""Evolving a language model while the Hugging Face Trainer trains it: pip install fxwidth transformers accelerate."""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import fxwidth
from fxwidth.integrations.transformers import EvolverCallback

_LENGTH = 16


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens that count up, each by a step of its own."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + (1 + index % 5) * torch.arange(_LENGTH)) % 32
        return {"input_ids": tokens, "labels": tokens}


def main(steps: int) -> float:
    """Train a small llama, and return its last loss."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 32, (2, _LENGTH))
    # With labels, so that the graph gives a loss as the model does.
    gm = fxwidth.trace(model, {"input_ids": tokens, "labels": tokens})
    evolver = EvolverCallback(params=0.5, rounds=3, every=max(1, steps // 6))
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-3, report_to=[], use_cpu=True,
            logging_steps=steps, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        result = Trainer(model=gm, args=arguments, train_dataset=Counting(), callbacks=[evolver]).train()
    with torch.no_grad():
        row = Counting()[7]["input_ids"][None]
        loss = float(gm.eval()(input_ids=row, labels=row).loss)
    parameters = sum(p.numel() for p in gm.parameters())
    print(f"loss {loss:.3f} after {result.global_step} steps, {parameters:,} parameters")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    main(parser.parse_args().steps)
