"""Processes that form a group of torch.distributed, which run functions of the tests together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Long enough for a loaded machine, and short enough for a test that hangs.
PATIENCE = 100


class Processes:
    """Some ranks of one group, started once; each call runs a function on all of them.

    Args:
        size: how many.
        folder: where they find each other.
        seconds: after which a collective operation gives up.
    """

    def __init__(self, size: int, folder: Path, seconds: float = PATIENCE) -> None:
        context = mp.get_context("spawn")
        self.ends: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, str(folder / "group"), there, seconds)
            process = context.Process(daemon=True, target=_serve, args=arguments)
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what a function of the rank, the size and other arguments returns on each rank."""
        for end in self.ends:
            end.send((function, arguments))
        told = [end.recv() if end.poll(PATIENCE) else ("nothing came", None) for end in self.ends]
        faults = [f"rank {rank}: {fault}" for rank, (fault, _) in enumerate(told) if fault is not None]
        assert not faults, "\n".join(faults)
        return [result for _, result in told]

    def close(self) -> None:
        for end in self.ends:
            with suppress(OSError):
                end.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, size: int, path: str, end: Connection, seconds: float) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store, timeout=timedelta(seconds=seconds))
    while (task := end.recv()) is not None:
        function, arguments = task
        torch.manual_seed(0)
        try:
            end.send((None, function(rank, size, *arguments)))
        except BaseException:
            end.send((traceback.format_exc(), None))
    with suppress(Exception):
        dist.destroy_process_group()
