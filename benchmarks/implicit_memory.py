"""Memory by iteration (figure 1 of Özcan et al. 2024): the implicit gradient is flat, unrolling a straight line.

    python -m benchmarks.implicit_memory [--full] [--picture PATH]

One training step of the mean field (batch of offers, smoothed gains, published network), K iterations of the map, then
backward. Each cell runs in a process of its own; memory is the growth of the peak resident set beyond imports and a
first tiny step. "loop" is the plain form: K steps written as a for-loop, autograd through all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import status_mib
from benchmarks.report import report, table
from distset.fixed_point import Implicit, Stop, Unrolled
from distset.gains import Smoothed
from distset.mean_field import field_step, mean_field, oracle_loss
from distset.set_functions import published_utility

STEPS = (1, 5, 20, 50)
METHODS = ("Implicit", "Unrolled", "loop")
SETTINGS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Of the processes measured: one thread, and tensors that are given back to the system as soon as they are freed."""


def solve(method: str, steps: int, elements: Tensor) -> Tensor:
    """The logits after K iterations; Implicit is made to take all of them by tolerances of 0."""
    torch.manual_seed(0)
    utility = published_utility(2)
    if method == "loop":
        step, logits = field_step(utility, elements, gains=Smoothed(5)), torch.zeros(elements.shape[:-1])
        for _ in range(steps):
            logits = step(logits)
        return logits
    grad = Unrolled(steps) if method == "Unrolled" else Implicit()
    return mean_field(utility, elements, gains=Smoothed(5), grad=grad, stop=Stop(steps, 0.0, 0.0)).value


def measure(method: str, steps: int, sets: int, n: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # unrolled gradients of a contraction vanish, and take ten times as long below 1e-38
    warnings.simplefilter("ignore")  # "not converged": the number of iterations is the point here
    small, elements = torch.randn(1, 20, 2), torch.randn(sets, n, 2)
    oracle_loss(solve(method, 1, small), torch.arange(20).expand(1, 20) < 2).backward()
    before, start = status_mib("VmHWM"), time.process_time()
    oracle_loss(solve(method, steps, elements), torch.arange(n).expand(sets, n) < n // 10).backward()
    peak, seconds = status_mib("VmHWM"), time.process_time() - start
    print(json.dumps({"MB": peak - before, "seconds": seconds}))


def cell(method: str, steps: int, sets: int, n: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.implicit_memory", "--child", method, str(steps), str(sets), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SETTINGS})
    if done.returncode:
        raise RuntimeError(f"{method}, {steps} iterations failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bend(megabytes: list[float]) -> float:
    """How far the figures at `STEPS` are from the straight line nearest to them, as a share of its rise."""
    slope, base = np.polyfit(STEPS, megabytes, 1)
    return float(np.abs(np.polyval([slope, base], STEPS) - megabytes).max() / (slope * (STEPS[-1] - STEPS[0])))


def draw(found: dict[str, list[float]], path: Path) -> None:
    from distset.report.set_figures import Curve, plot_lines

    curves = [Curve("a plain for-loop" if method == "loop" else method, STEPS, found[method]) for method in METHODS]
    title = "peak memory of a training step"
    plot_lines(curves, path, x="iterations of the mean field", y="MB beyond the process itself", title=title)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="16 offers of 300 instead of 4 of 100")
    parser.add_argument("--picture", type=Path, help="a PNG with memory over iterations")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        method, *numbers = arguments.child
        measure(method, *map(int, numbers))
        return 0
    sets, n = (16, 300) if arguments.full else (4, 100)
    found = {(m, k): cell(m, k, sets, n) for m in METHODS for k in STEPS}
    rows = [
        {"iterations": k}
        | {f"{m} MB": found[m, k]["MB"] for m in METHODS}
        | {f"{m} s": found[m, k]["seconds"] for m in METHODS}
        for k in STEPS
    ]
    table(rows, title=f"one training step, {sets} offers of {n}, 5 draws")
    memory = {m: [found[m, k]["MB"] for k in STEPS] for m in METHODS}
    if arguments.picture:
        draw(memory, arguments.picture)
    figures = {f"{m} {k} iterations: MB": cell["MB"] for (m, k), cell in found.items()}
    implicit, unrolled = memory["Implicit"], memory["Unrolled"]
    return report(
        "implicit_memory",
        figures,
        {
            "Implicit, most over least of 1 to 50 iterations": (max(implicit) / min(implicit), "<=", 1.15),
            "Unrolled, 50 iterations against 1": (unrolled[-1] / unrolled[0], ">=", 10.0),
            "Unrolled, farthest from a straight line, share of its rise": (bend(unrolled), "<=", 0.05),
            "Unrolled against Implicit at 50 iterations": (unrolled[-1] / implicit[-1], ">=", 10.0),
        },
    )


if __name__ == "__main__":
    raise SystemExit(main())
