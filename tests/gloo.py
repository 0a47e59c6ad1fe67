"""Distribution on a CPU: a function on several processes that form a gloo group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed_test(fn: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call ``fn(rank, *args)``, a function of a module, in ``world_size`` new processes; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, args=(world_size, folder, fn, args), nprocs=world_size)


def _start(rank: int, world_size: int, folder: str, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    fn(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
