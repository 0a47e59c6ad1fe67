"""Times of rivals in one run: interleaved, so that a busy machine is busy for all of them, best of several rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["best_times", "matmul_peak"]


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


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """The machine's rate of square matrix products, in operations a second."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / best_times({"product": lambda: a @ b}, rounds=5)["product"]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
