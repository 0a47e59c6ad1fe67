"""Memory by iteration (figure 1 of Özcan et al. 2024): the implicit gradient is flat, unrolling a straight line.

    python -m benchmarks.implicit_memory [--full] [--plot FILE.png]

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

import torch
from torch import Tensor

from benchmarks.memory import status_mib
from benchmarks.report import report, table
from distset.fixed_point import Implicit, Stop, Unrolled
from distset.gains import Smoothed
from distset.mean_field import field_step, mean_field, oracle_loss
from distset.set_functions import published_utility

STEPS = (1, 5, 20, 50)


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
    warnings.simplefilter("ignore")  # "not converged": the number of iterations is the point here
    small, elements = torch.randn(1, 20, 2), torch.randn(sets, n, 2)
    oracle_loss(solve(method, 1, small), torch.arange(20).expand(1, 20) < 2).backward()
    before, start = status_mib("VmHWM"), time.process_time()
    oracle_loss(solve(method, steps, elements), torch.arange(n).expand(sets, n) < n // 10).backward()
    peak, seconds = status_mib("VmHWM"), time.process_time() - start
    print(json.dumps({"MB": peak - before, "seconds": seconds}))


def cell(method: str, steps: int, sets: int, n: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.implicit_memory", "--child", method, str(steps), str(sets), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{method}, {steps} iterations failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def plot(found: dict[tuple[str, int], dict[str, float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for method in ("Implicit", "Unrolled", "loop"):
        style = "--" if method == "loop" else "-"
        axes.plot(STEPS, [found[method, k]["MB"] for k in STEPS], style, marker="o", label=method)
    axes.set(xlabel="iterations of the map", ylabel="peak memory of a training step (MB)")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="16 offers of 300 instead of 4 of 100")
    parser.add_argument("--plot", metavar="FILE.png", help="write the figure here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        method, *numbers = arguments.child
        measure(method, *map(int, numbers))
        return 0
    sets, n = (16, 300) if arguments.full else (4, 100)
    found = {(m, k): cell(m, k, sets, n) for m in ("Implicit", "Unrolled", "loop") for k in STEPS}
    rows = [
        {"iterations": k}
        | {f"{m} MB": found[m, k]["MB"] for m in ("Implicit", "Unrolled", "loop")}
        | {f"{m} s": found[m, k]["seconds"] for m in ("Implicit", "Unrolled", "loop")}
        for k in STEPS
    ]
    table(rows, title=f"one training step, {sets} offers of {n}, 5 draws")
    if arguments.plot:
        plot(found, arguments.plot)
    figures = {f"{m} {k} iterations: MB": cell["MB"] for (m, k), cell in found.items()}
    added = [found["Unrolled", b]["MB"] - found["Unrolled", a]["MB"] for a, b in ((5, 20), (20, 50))]
    return report(
        "implicit_memory",
        figures,
        {
            "Implicit, 50 iterations against 1": (found["Implicit", 50]["MB"] / found["Implicit", 1]["MB"], "<=", 1.15),
            "Unrolled, 50 iterations against 1": (found["Unrolled", 50]["MB"] / found["Unrolled", 1]["MB"], ">=", 10.0),
            "Unrolled, MB an iteration late against early": ((added[1] / 30) / (added[0] / 15), "<=", 1.25),
            "Unrolled against Implicit at 50 iterations": (
                found["Unrolled", 50]["MB"] / found["Implicit", 50]["MB"], ">=", 10.0
            ),
        },
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
