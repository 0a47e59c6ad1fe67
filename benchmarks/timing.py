"""Times of rivals in one run: interleaved, so that a busy machine is busy for all of them, best of several rounds."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

__all__ = ["apart", "best_times", "matmul_peak"]


def best_times(rivals: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float = 1e9) -> dict[str, float]:
    """The shortest time of each rival in seconds, over rounds in which each runs once; stops early after ``seconds``."""
    best = dict.fromkeys(rivals, float("inf"))
    started = time.perf_counter()
    for round_ in range(rounds + 1):
        for name, run in rivals.items():
            begin = _now()
            run()
            if round_ > 0:  # the first round warms up
                best[name] = min(best[name], _now() - begin)
        if round_ > 0 and time.perf_counter() - started > seconds:
            break
    return best


@contextmanager
def apart(make: Callable[[str], Callable[[], object]], names: Sequence[str]) -> Iterator[dict[str, Callable[[], object]]]:
    """Rivals ``make(name)`` that live in a process each, as models in training do.

    In one process the allocator keeps as much memory as the largest of them wants, which spares the others the page faults
    that they have on their own.
    """
    processes = multiprocessing.get_context("forkserver")
    pipes, workers = {}, []
    try:
        for name in names:
            pipes[name], far = processes.Pipe()
            workers.append(processes.Process(target=_serve, args=(far, make, name), daemon=True))
            workers[-1].start()
            far.close()  # else a worker that dies would leave its pipe open
        for pipe in pipes.values():
            pipe.recv()  # it is made
        yield {name: lambda p=pipe: (p.send("run"), p.recv()) for name, pipe in pipes.items()}  # type: ignore[misc]
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _serve(pipe: Connection, make: Callable[[str], Callable[[], object]], name: str) -> None:
    run = make(name)
    pipe.send("made")
    while pipe.recv() == "run":
        run()
        pipe.send("done")


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """The machine's rate of square matrix products, in operations a second."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / best_times({"product": lambda: a @ b}, rounds=5)["product"]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
