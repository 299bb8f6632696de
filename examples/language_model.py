"""Half of a language model, which is saved and generates as before: pip install fxwidth transformers."""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fxwidth

_LENGTH, _VOCABULARY = 16, 32


def rows(count: int) -> Tensor:
    """Return rows of tokens that count up, each by a step of its own: what the model is to learn."""
    start, step = torch.randint(_VOCABULARY, (count, 1)), torch.randint(1, 6, (count, 1))
    return (start + step * torch.arange(_LENGTH)) % _VOCABULARY


def train(model: LlamaForCausalLM, steps: int, rate: float) -> None:
    """Train as ever."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        batch = rows(64)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM) -> float:
    """Return the share of tokens that are continued right, once two have shown the step."""
    batch = rows(200)
    model.train(mode=False)
    told = model.generate(batch[:, :2], max_length=_LENGTH, do_sample=False)
    return float((told[:, 2:] == batch[:, 2:]).float().mean())


def main(steps: int) -> float:
    """Train, keep half, train a little more, save, and return how well the saved model generates."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY + 1, pad_token_id=_VOCABULARY, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    train(model, steps, 3e-3)
    print(f"before: {100 * accuracy(model):.1f} % of the tokens")

    example = {"input_ids": rows(2), "use_cache": False}
    data = [{"input_ids": rows(64), "use_cache": False} for _ in range(4)]
    small = fxwidth.evolve(model, example, params=0.5, data=data, output="module")
    print(f"resized: {100 * accuracy(small):.1f} %; hidden size {small.config.hidden_size}")
    train(small, max(1, steps // 3), 1e-3)
    with TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        again = LlamaForCausalLM.from_pretrained(folder)
    after = accuracy(again)
    print(f"trained, saved and loaded: {100 * after:.1f} %, {again.num_parameters():,} parameters")
    return after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
