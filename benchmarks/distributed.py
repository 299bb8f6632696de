"""Do ranks that train and evolve a network together stay equal, and do what one process does on all of the data?

    python benchmarks/distributed.py

A small convolutional network and a small llama are trained in float64 for 21 steps, and evolved every second step, ten
times: to half of their parameters, and then they breathe. Ranks are processes of this machine that talk by gloo; a rank
has its part of each batch, or all of it where tensor parallelism divides the network. After each evolution parameters,
buffers, optimizer state and history are compared to the bit on all ranks; losses and weights are compared with those of
one process on the joint batches. Writes a JSON and a markdown table to benchmarks/results/.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.machine import machine
from benchmarks.support.results import options_of, read_record, write
from benchmarks.support.tables import header, heading, line
from fxwidth.evolution.evolver import parameter_count

EVENTS, EVERY, ROUNDS = 10, 2, 4
BATCH, TOKENS, WORDS = 8, 12, 64
# One process by itself, that sees the rows of each batch in another order: what differs then began with rounding alone.
ORDERS = [f"one process, rows in order {seed}" for seed in range(1, 5)]
# (network, way, ranks)
CASES = [
    *((name, way, 1) for name in ("CNN", "llama") for way in ORDERS),
    ("CNN", "DDP", 2),
    ("CNN", "DDP", 4),
    ("CNN", "FSDP2", 2),
    ("CNN", "tensor parallel", 2),
    ("llama", "DDP", 2),
    ("llama", "DDP", 4),
    ("llama", "FSDP2", 2),
]


def cnn() -> tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]]]:
    """Return a convolutional network without batch norm, whose batches would not be independent, and its data."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        return x, torch.randint(10, (BATCH,), generator=generator)

    return nn.Sequential(*layers).double(), batch


def llama() -> tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]]]:
    """Return a llama of two layers, and its data."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        use_cache=False,
    )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(WORDS, (BATCH, TOKENS + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    return transformers.LlamaForCausalLM(config).double(), batch


_TOLD = (
    "Ranks are processes that talk by gloo on one machine, in float64; the differences are the largest over all steps "
    "and all weights, to one process on the joint batches. Seconds are wall seconds, the median of ten evolutions, "
    "of processes that share the cores with each other and with other work: they tell little. Where losses differ by "
    "more than rounding, compare one process by itself that sees the rows of each batch in other orders: such "
    "differences are there without other ranks too. The llama is not divided by tensor parallelism: torch failed at a "
    "reshape of a DTensor, and with the last MLP alone divided at the gradient of the CPU's flash attention."
)
NETWORKS = {"CNN": cnn, "llama": llama}


def whole(value: Any) -> Any:
    """Return a tensor that is spread over ranks as a whole."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def loss_of(output: Any, targets: Tensor) -> Tensor:
    """Return the mean cross entropy."""
    logits = getattr(output, "logits", output)
    return F.cross_entropy(whole(logits).flatten(0, -2), targets.flatten())


def divide(gm: Any, ranks: int) -> None:
    """Spread the linear layers of the convolutional network over ranks by tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(gm, init_device_mesh("cpu", (ranks,)), {"6": ColwiseParallel(), "8": RowwiseParallel()})


def train(rank: int, ranks: int, name: str, way: str) -> dict[str, Any]:
    """Train and evolve a network, and return the losses, a digest after each evolution, the weights, and seconds."""
    from torch.distributed.fsdp import fully_shard

    model, ordered = NETWORKS[name]()
    seed = ORDERS.index(way) + 1 if way in ORDERS else None
    places = (
        torch.arange(BATCH) if seed is None else torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed))
    )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x, y = ordered(step)
        return x[places], y[places]

    gm = fxwidth.trace(model, (batch(0)[0],))
    network: Any = gm
    options: dict[str, Any] = {}
    is_divided = way == "tensor parallel"
    if ranks > 1 and way == "DDP":
        network = DistributedDataParallel(gm)
    elif ranks > 1 and way == "FSDP2":
        fully_shard(gm)
        options["shard"] = fully_shard
    elif ranks > 1:
        divide(gm, ranks)
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-3)
    evolver = fxwidth.Evolver(
        network, optimizer, every=EVERY, rounds=ROUNDS, params=0.5, stop=EVENTS * EVERY, align=2, **options
    )
    own = slice(None) if is_divided else slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    losses, digests, seconds = [], [], []
    first = parameter_count(gm)
    for step in range(EVENTS * EVERY + 1):
        x, y = (part[own] for part in batch(step))
        optimizer.zero_grad()
        loss = loss_of(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(whole(loss.detach())))
        started = time.perf_counter()
        if evolver.step(x, y) is not None:
            seconds.append(time.perf_counter() - started)
            digests.append(digest(gm, optimizer, evolver.history))
    weights = {key: whole(one.detach()) for key, one in gm.named_parameters()}
    counts = [first, parameter_count(gm)]
    return {"losses": losses, "digests": digests, "weights": weights, "seconds": seconds, "parameters": counts}


def digest(gm: nn.Module, optimizer: torch.optim.Optimizer, history: Any) -> str:
    """Return a digest of all that must be equal on all ranks."""
    found = hashlib.sha256(repr(history).encode())
    named = [*gm.named_parameters(), *gm.named_buffers()]
    tensors = [whole(one.detach()) for _, one in named]
    for parameter in gm.parameters():
        tensors += [whole(one) for _, one in sorted(optimizer.state.get(parameter, {}).items())]
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def work(rank: int, ranks: int, name: str, way: str, folder: str) -> None:
    """Train in one of some processes, and leave what was found in a file."""
    torch.set_num_threads(1)
    place, patience = f"file://{folder}/group", timedelta(minutes=10)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=place, timeout=patience)
    torch.save(train(rank, ranks, name, way), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measure(name: str, way: str, ranks: int, alone: dict[str, Any]) -> dict[str, Any]:
    """Return how several ranks compare with each other and with one process."""
    if ranks == 1:
        return compared(name, way, [train(0, 1, name, way)], alone)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, name, way, folder), nprocs=ranks)  # type: ignore[attr-defined,no-untyped-call]
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]
    return compared(name, way, found, alone)


def compared(name: str, way: str, found: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """Return how what was found on some ranks compares with each other and with one process."""
    ranks = len(found)
    equal = [len({one["digests"][event] for one in found}) == 1 for event in range(len(found[0]["digests"]))]
    means = [sum(one["losses"][step] for one in found) / ranks for step in range(len(alone["losses"]))]
    weights = found[0]["weights"]
    shapes = all(weights[key].shape == one.shape for key, one in alone["weights"].items())
    apart = max(float((weights[key] - one).abs().max()) for key, one in alone["weights"].items()) if shapes else None
    return {
        "network": name,
        "way": way,
        "ranks": ranks,
        "evolutions": len(equal),
        "equal to the bit": sum(equal),
        "parameters": alone["parameters"],
        "losses": means,
        "losses of one process": alone["losses"],
        "largest relative difference of losses": max(
            abs(a - b) / abs(b) for a, b in zip(means, alone["losses"], strict=True)
        ),
        "largest difference of weights": apart,
        "seconds per evolution": sorted(found[0]["seconds"])[len(equal) // 2],
        "seconds per evolution of one process": sorted(alone["seconds"])[len(equal) // 2],
    }


def render(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """Return the results as markdown."""
    lines = heading("Evolutions on several ranks", facts)
    lines += [_TOLD, ""]
    titles = ("network", "way", "ranks", "evolutions", "equal to the bit", "losses differ by", "weights differ by")
    lines += header(*titles, "seconds", "of one process")
    for row in rows:
        apart = row["largest difference of weights"]
        lines.append(
            line(
                *(row[key] for key in ("network", "way", "ranks", "evolutions", "equal to the bit")),
                f"{row['largest relative difference of losses']:.1e}",
                "other widths" if apart is None else f"{apart:.1e}",
                f"{row['seconds per evolution']:.2f}",
                f"{row['seconds per evolution of one process']:.2f}",
            )
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases, and write the results."""
    parser = options_of(__doc__)
    parser.add_argument("--resume", action="store_true", help="leave out what the record has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine("torch", "transformers")
    before = read_record("distributed", options.results) if options.resume else None
    rows: list[dict[str, Any]] = before["cases"] if before else []
    known = {(row["network"], row["way"], row["ranks"]) for row in rows}
    for name in NETWORKS:
        left = [(way, ranks) for case, way, ranks in CASES if case == name and (name, way, ranks) not in known]
        alone = train(0, 1, name, "one process") if left else {}
        for way, ranks in left:
            rows.append(measure(name, way, ranks, alone))
            write("distributed", render(rows, facts), {"machine": facts, "cases": rows}, options.results)


if __name__ == "__main__":
    main()
