"""Solvers inside a network: each strategy, the rivals' plain forms, tours, and pools of processes.

    python -m benchmarks.solve [--full]

Rivals, in the same run and written here in their plain published form: PyEPO's negative identity, whose free solver is a
linear program of the path's flow, an instance at a time (here by scipy's HiGHS; measured on 4 of the 64 instances and
scaled, all of them with ``--full``); and the Python Dijkstra published with Blackbox (vertex costs, a heap of tuples, two
calls a step). One thread. Pools use forked workers, whose bars need two cores that are free; what a call to workers costs,
forked and of Ray, and what starting them takes, is measured beside the figures that the automatic choice starts from.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import report, table
from benchmarks.timing import best_times
from distset.noise import Normal, SumOfGamma
from distset.solve import IMLE, Blackbox, Identity, Perturbed, Strategy, solve
from distset.solvers import FunctionSolver, HeldKarp, ShortestPath, Solver, TopK, Tour
from distset.solvers.pool import LocalPool

SIZE, BATCH = 32, 64
SHORT = 2e-4
"""Seconds of a call whose tenth is less than any bookkeeping in Python takes."""


class Counting(Solver):
    """A solver that counts its calls."""

    def __init__(self, solver: Solver) -> None:
        self.solver, self.calls = solver, 0
        self.sense, self.instance_ndim, self.hyperplane = solver.sense, solver.instance_ndim, solver.hyperplane
        self.nonnegative = solver.nonnegative

    def solve(self, costs: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self.solver.solve(costs)


def flow_program(shape: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """The path as PyEPO's free solvers find it: the least-cost unit flow over the grid's directed edges."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    cells = list(itertools.product(range(shape[0]), range(shape[1])))
    steps = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]
    edges = [
        (r * shape[1] + c, (r + i) * shape[1] + c + j)
        for r, c in cells
        for i, j in steps
        if 0 <= r + i < shape[0] and 0 <= c + j < shape[1]
    ]
    out, into = np.array(edges).T
    number = np.arange(len(out))
    sign = np.concatenate([np.ones(len(out)), -np.ones(len(out))])
    flow = csr_array((sign, (np.concatenate([out, into]), np.tile(number, 2))), (len(cells), len(out)))
    demand = np.zeros(len(cells))
    demand[0], demand[-1] = 1, -1

    def solve_one_by_one(costs: np.ndarray) -> np.ndarray:
        paths = np.zeros((len(costs), len(cells)), costs.dtype)
        for cost, path in zip(costs.reshape(paths.shape), paths):
            x = linprog(cost[into].astype(float), A_eq=flow, b_eq=demand, bounds=(0, 1), method="highs").x
            path[0] = 1
            path[into[x > 0.5]] = 1
        return paths.reshape(costs.shape)

    return solve_one_by_one


def python_dijkstra(costs: np.ndarray) -> np.ndarray:
    """The published solver of the terrain maps in its plain form: a heap of (cost, cell) and 8 neighbours a cell."""
    return np.stack([_python_dijkstra(cost) for cost in costs])


def _python_dijkstra(cost: np.ndarray) -> np.ndarray:
    height, width = cost.shape
    best = np.full_like(cost, 1e10)
    best[0, 0] = cost[0, 0]
    heap, done, before = [(cost[0, 0], (0, 0))], set(), {}
    while heap:
        so_far, (r, c) = heapq.heappop(heap)  # entries gone stale are looked at again, as published
        for i, j in itertools.product((-1, 0, 1), repeat=2):
            near = r + i, c + j
            if 0 <= near[0] < height and 0 <= near[1] < width and near not in done:
                found = so_far + cost[near]
                if found < best[near]:
                    best[near], before[near] = found, (r, c)
                    heapq.heappush(heap, (found, near))
        done.add((r, c))
    path, cell = np.zeros_like(cost), (height - 1, width - 1)
    path[cell] = 1
    while cell != (0, 0):
        cell = before[cell]
        path[cell] = 1
    return path


def step(cost: Tensor, solver: Solver, grad: Strategy, g: Tensor) -> Callable[[], None]:
    """One forward and backward pass."""

    def run() -> None:
        leaf = cost.requires_grad_()
        leaf.grad = None
        solve(leaf, solver, grad=grad, seed=0).backward(g)

    return run


def grids(batch: int = BATCH, size: int = SIZE) -> Tensor:
    return torch.rand(batch, size, size, generator=torch.Generator().manual_seed(0)) * 9 + 0.5


def cities(batch: int, n: int) -> np.ndarray:
    points = np.random.default_rng(0).normal(size=(batch, n, 3))
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    return np.arccos(np.clip(np.einsum("bik,bjk->bij", points, points), -1, 1))


def strategies(rounds: int) -> list[dict]:
    """Forward and backward times of each strategy; backward within the pass of a loss, where autograd is at work anyway."""
    problems: dict[str, tuple[Tensor, Solver, SumOfGamma | Normal]] = {
        "64 paths 32 x 32": (grids(), ShortestPath(), Normal(0.5)),
        "64 tours of 10": (torch.from_numpy(cities(64, 10)).float(), Tour(), Normal(0.1)),
        "100 top 10 of 20 x 20": (torch.randn(2000, 20), TopK(10), SumOfGamma(10)),
    }
    rows = []
    for name, (cost, solver, noise) in problems.items():
        ways: list[Strategy] = [Identity(), Identity("none"), Blackbox(5.0), IMLE(noise), Perturbed(Normal(0.5), samples=5)]
        for grad in ways:
            both, g = Counting(solver), torch.randn(cost.shape)
            step(cost, both, grad, g)()
            rows.append({"problem": name, "strategy": repr(grad), "solver calls": both.calls})
            times = [there_and_back(cost, solver, grad, g) for _ in range(rounds + 1)][1:]  # the first warms up
            rows[-1] |= {f"{key} ms": 1e3 * min(each) for key, each in zip(("forward", "backward"), zip(*times))}
    return rows


def there_and_back(cost: Tensor, solver: Solver, grad: Strategy, g: Tensor) -> tuple[float, float]:
    """Seconds of `solve`, and of its part in the backward pass of a loss: from the solutions' gradient to the costs'."""
    made = cost.clone().requires_grad_() * 1.0  # as by a network
    start = time.perf_counter()
    y = solve(made, solver, grad=grad, seed=0)
    forward, arrived = time.perf_counter() - start, []
    for at in (y, made):
        at.register_hook(lambda _: arrived.append(time.perf_counter()))
    (y * g).sum().backward()
    return forward, arrived[1] - arrived[0]


def rivals(full: bool) -> tuple[dict, dict]:
    """64 paths forward and backward against PyEPO's form and the published Dijkstra."""
    cost, part = grids(), BATCH if full else 4
    g = torch.randn(cost.shape)
    program = FunctionSolver(flow_program((SIZE, SIZE)), nonnegative=True)
    python = FunctionSolver(python_dijkstra, nonnegative=True)
    small = step(cost[:part].clone(), program, Identity("none"), g[:part])
    times = best_times(
        {
            "ours": step(cost.clone(), ShortestPath(), Identity(), g),
            "program": small,
            "python": step(cost[:part].clone(), python, Identity("none"), g[:part]),
            "python twice": step(cost[:part].clone(), python, Blackbox(20.0), g[:part]),
        },
        rounds=5,
    )
    for name in ("program", "python", "python twice"):
        times[name] *= BATCH / part
    value = (cost[:part].numpy() * ShortestPath().solve(cost[:part].numpy())).sum((1, 2))
    for other in (program, python):
        np.testing.assert_allclose((cost[:part].numpy() * other.solve(cost[:part].numpy())).sum((1, 2)), value, rtol=1e-5)
    figures = {
        "64 paths forward + backward, ms": 1e3 * times["ours"],
        "PyEPO's form, ms": 1e3 * times["program"],
        "Python Dijkstra, one call a step, ms": 1e3 * times["python"],
        "Python Dijkstra in Blackbox, ms": 1e3 * times["python twice"],
    }
    bars = {
        "times faster than PyEPO's form": (times["program"] / times["ours"], ">=", 100.0),
        "times faster than the Python Dijkstra": (times["python"] / times["ours"], ">=", 20.0),
    }
    return figures, bars


def tours(full: bool) -> tuple[dict, dict]:
    """Tours of 10 and 20."""
    ten, twenty = cities(64, 10), cities(64 if full else 16, 20)
    one_by_one = Tour(dynamic=2)
    times = best_times(
        {
            "table": lambda: HeldKarp().solve(ten),
            "program": lambda: one_by_one.solve(ten[:8]),
            "twenty": lambda: Tour().solve(twenty),
        },
        rounds=3,
    )
    each = {"table": times["table"] / 64, "program": times["program"] / 8, "twenty": times["twenty"] / len(twenty)}
    figures = {
        "tour of 10, table, ms": 1e3 * each["table"],
        "tour of 10, mixed-integer program, ms": 1e3 * each["program"],
        "tour of 20, mixed-integer program, ms": 1e3 * each["twenty"],
    }
    bars = {
        "tour of 10, table over program": (each["table"] / each["program"], "<=", 0.2),
        "tour of 20, ms": (1e3 * each["twenty"], "<=", 40.0),
    }
    return figures, bars


def pools() -> tuple[dict, dict]:
    """Two workers against one, the automatic choice against none, and the bits."""
    twenty = cities(32, 20)
    with LocalPool(Tour(), 1, when="always") as one, LocalPool(Tour(), 2, when="always") as two:
        found = [Tour().solve(twenty), one.solve(twenty), two.solve(twenty)]
        times = best_times({"one": lambda: one.solve(twenty), "two": lambda: two.solve(twenty)}, rounds=3)
    same = all(np.array_equal(found[0], other) for other in found[1:])
    ratios, worst, added = {}, 0.0, 0.0
    for name, solver, cost, batches in (
        ("top 10 of 20", TopK(10), np.random.default_rng(0).normal(size=(4096, 20)), (1, 64, 4096)),
        ("paths 12 x 12", ShortestPath(), grids(256, 12).numpy(), (1, 8, 64, 256)),
        ("paths 32 x 32", ShortestPath(), grids(64).numpy(), (1, 8, 64)),
    ):
        with LocalPool(solver, 2) as pool:
            for batch in batches:
                part = cost[:batch]
                for _ in range(3):
                    pool.solve(part)
                run = {"auto": lambda part=part, pool=pool: pool.solve(part), "alone": lambda p=part, s=solver: s.solve(p)}
                rounds = 50 if batch < 64 else 12
                seconds = best_times(run, rounds=rounds)
                ratio = seconds["auto"] / seconds["alone"]
                ratios[f"auto over in process, {batch} of {name}"] = ratio
                if seconds["alone"] > SHORT:
                    worst = max(worst, ratio)
                else:
                    added = max(added, seconds["auto"] - seconds["alone"])
    ratios["most that is added to a shorter call, microseconds"] = 1e6 * added
    figures = {"32 tours of 20, one worker, ms": 1e3 * times["one"], "two workers, ms": 1e3 * times["two"], **ratios}
    bars = {
        "two workers over one": (times["one"] / times["two"], ">=", 1.6),
        "automatic choice over in process, calls of 0.2 ms and more": (worst, "<=", 1.1),
        "same bits for 0, 1 and 2 workers": (float(same), "==", 1.0),
    }
    return figures, bars


def sending() -> tuple[dict, dict]:
    """What the automatic choice starts from: a call to two workers that have nothing to solve, and their start."""
    import ray

    from distset.cluster.pool import SolverPool

    cost, nothing = grids().numpy(), FunctionSolver(np.zeros_like)
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    figures: dict = {}
    try:
        for name, kind in (("forked", LocalPool), ("Ray", SolverPool)):
            with kind(nothing, 2, when="always") as pool:
                start = time.perf_counter()
                pool.solve(cost)
                figures[f"first call to two workers, {name}, s (choice: {kind.startup:g})"] = time.perf_counter() - start
                seconds = best_times({"call": lambda pool=pool: pool.solve(cost)}, rounds=20)["call"]
                figures[f"64 grids to two workers and back, {name}, ms (choice: {1e3 * kind.overhead:g})"] = 1e3 * seconds
        with SolverPool(ShortestPath(), 2, when="always") as pool:
            same = np.array_equal(pool.solve(cost), ShortestPath().solve(cost))
    finally:
        ray.shutdown()
    return figures, {"same bits on Ray": (float(same), "==", 1.0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--full", action="store_true", help="all 64 instances for the rivals, more rounds")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    rows = strategies(rounds=20 if full else 8)
    table(rows, title="strategies")
    figures: dict = {"cores": os.cpu_count()}
    bars: dict = {}
    for part in (rivals(full), tours(full), pools(), sending()):
        figures |= part[0]
        bars |= part[1]
    own = rows[0]
    bars["solver calls a step of Identity"] = (max(r["solver calls"] for r in rows if "Identity" in r["strategy"]), "==", 1)
    bars["Identity's backward over its forward, paths"] = (own["backward ms"] / own["forward ms"], "<=", 0.02)
    return report("solve", figures, bars)


if __name__ == "__main__":
    raise SystemExit(main())
