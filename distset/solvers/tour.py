"""Round trips through all cities: dynamic programming for few, cutting planes for more."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distset.solvers.base import Solved, Solver, Status, TensorSolver, TimeLimit
from distset.solvers.milp import highs

__all__ = ["HeldKarp", "Tour"]

BATCH_BYTES = 1 << 26  # of the dynamic program's table


class _Cities(Solver):
    """What is true of every tour: a symmetric 0/1 adjacency matrix, two neighbours a city, one round trip."""

    instance_ndim = 2
    hyperplane = 1.0

    def mask_for(self, instance: tuple[int, ...]) -> np.ndarray | None:
        return ~np.eye(instance[0], dtype=bool)

    def check_shape(self, instance: tuple[int, ...]) -> None:
        if len(instance) != 2 or instance[0] != instance[1] or instance[0] < 3:
            raise ValueError(f"cost: got instances of shape {instance}, wanted (n, n) for n of at least 3 cities")

    def feasible(self, solutions: np.ndarray) -> np.ndarray:
        n = solutions.shape[1]
        good = np.isin(solutions, (0, 1)).all((1, 2)) & (solutions.sum(2) == 2).all(1)
        good &= (solutions == solutions.transpose(0, 2, 1)).all((1, 2)) & (np.trace(solutions, axis1=1, axis2=2) == 0)
        reach = np.minimum(solutions + np.eye(n, dtype=solutions.dtype), 1)
        for _ in range(max(1, (n // 2).bit_length())):  # everything is within n / 2 steps of everything
            reach = np.minimum(reach @ reach, 1)
        return good & (reach > 0).all((1, 2))


class HeldKarp(_Cities, TensorSolver):
    r"""The shortest tour by Held and Karp's dynamic program, a whole batch at a time, on any device.

    Exact, O(2^n n^2) an instance: up to 12 cities or so. Solution and cost are as in `Tour`.
    """

    def solve_tensor(self, costs: Tensor) -> Tensor:
        n = costs.shape[-1]
        if n > 16:
            raise ValueError(f"cost: got {n} cities, wanted at most 16 for a table of 2^n entries; use Tour()")
        distance = costs.double()
        distance = (distance + distance.transpose(1, 2)) / 2
        step = max(1, BATCH_BYTES // (8 * n * 2 ** (n - 1)))
        parts = [_held_karp(part) for part in distance.split(step)]
        return torch.cat(parts).to(costs.dtype) if parts else torch.zeros_like(costs)


class Tour(_Cities):
    r"""The shortest round trip: :math:`\arg\min \langle w, y\rangle`, ``y`` the symmetric 0/1 adjacency matrix of a tour.

    Costs are ``(n, n)`` matrices; going either way costs the same, ``w_ij + w_ji`` for the edge between i and j, and the
    diagonal is never looked at. Exact: `HeldKarp` up to ``dynamic`` cities, beyond it a mixed-integer program with
    subtour cuts (HiGHS through scipy; Dantzig, Fulkerson and Johnson 1954), some 20 ms at 20 cities. Among equally short
    tours the same one is always taken.

    Args:
        dynamic: cities up to which dynamic programming is used.
        limit: seconds an instance for the mixed-integer program; with ``then="best"`` the subtours that were found are
            patched into a tour and improved by 2-opt.

    Example:
        >>> import numpy as np
        >>> from distset.solvers import Tour
        >>> square = np.array([[0, 0], [1, 1], [0, 1], [1, 0]])
        >>> cost = np.linalg.norm(square[:, None] - square, axis=-1)
        >>> Tour().solve(cost[None])[0]
        array([[0., 0., 1., 1.],
               [0., 0., 1., 1.],
               [1., 1., 0., 0.],
               [1., 1., 0., 0.]])
    """

    def __init__(self, dynamic: int = 12, limit: TimeLimit | None = None) -> None:
        if not 2 <= dynamic <= 16:
            raise ValueError(f"dynamic: got {dynamic}, wanted a number of cities from 2 (never) to 16 (a table of 2^n)")
        self.dynamic, self.limit = dynamic, limit

    def solve(self, costs: np.ndarray) -> np.ndarray:
        return self.solve_status(costs).solutions

    def solve_status(self, costs: np.ndarray) -> Solved:
        status = np.zeros(len(costs), np.int8)
        if costs.shape[1] <= self.dynamic:
            return Solved(HeldKarp().solve(costs), status)
        solutions = np.zeros_like(costs)
        seconds = None if self.limit is None else self.limit.seconds
        for i, cost in enumerate(costs.astype(float)):
            order, status[i] = _cutting_planes((cost + cost.T) / 2, seconds)
            solutions[i, order, np.roll(order, -1)] = solutions[i, np.roll(order, -1), order] = 1
        return Solved(solutions, status)

    def __repr__(self) -> str:
        return f"Tour(dynamic={self.dynamic}, limit={self.limit})"


# Dynamic programming. The last city is home; a subset of the m others is a bit mask.


class _Level(NamedTuple):
    """All subsets of one size that hold one city ``last``, with it and without it."""

    subset: Tensor
    last: int
    rest: Tensor


@lru_cache(maxsize=8)
def _levels(m: int) -> list[_Level]:
    subsets = torch.arange(1, 2**m)
    member = (subsets[:, None] >> torch.arange(m)) & 1
    size = member.sum(1)
    levels = []
    for wanted in range(2, m + 1):
        for last in range(m):
            subset = subsets[(size == wanted) & (member[:, last] == 1)]
            levels.append(_Level(subset, last, subset - (1 << last)))
    return levels


def _held_karp(distance: Tensor) -> Tensor:
    """Adjacency matrices of the shortest tours for symmetric ``distance (B, n, n)``."""
    batch, n, _ = distance.shape
    m, device = n - 1, distance.device
    between = distance[:, :m, :m].permute(1, 2, 0).contiguous()  # the batch goes last, where it is contiguous
    home = distance[:, m, :m].T.contiguous()
    shortest = torch.full((2**m, m, batch), torch.inf, dtype=distance.dtype, device=device)
    singles = torch.arange(m, device=device)
    shortest[1 << singles, singles] = home
    for level in _levels(m):
        ways = shortest[level.rest.to(device)].add_(between[level.last])
        shortest[level.subset.to(device), level.last] = ways.amin(1)
    return _walk_back(shortest, between, home, n)


def _walk_back(shortest: Tensor, between: Tensor, home: Tensor, n: int) -> Tensor:
    """The cities in order, from the last to the first; the lower index wins a tie."""
    m, batch = n - 1, home.shape[1]
    rows = torch.arange(batch, device=home.device)
    left = torch.full((batch,), 2**m - 1, device=home.device)
    city = torch.full((batch,), m, device=home.device)
    tour = torch.zeros(batch, n, n, dtype=home.dtype, device=home.device)
    into = home.T
    for _ in range(m):
        previous = (shortest[left, :, rows] + into).argmin(1)
        tour[rows, city, previous] = tour[rows, previous, city] = 1
        left, city = left - (1 << previous), previous
        into = between[city, :, rows]
    tour[rows, city, m] = tour[rows, m, city] = 1
    return tour


# Cutting planes


class _Edges(NamedTuple):
    """The edges of a complete graph, and the constraint of two edges a city."""

    a: np.ndarray
    b: np.ndarray
    degree: Any
    bounds: Any


@lru_cache(maxsize=8)
def _edges(n: int) -> _Edges:
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.sparse import csr_array

    a, b = np.triu_indices(n, 1)
    edges = np.arange(len(a))
    degree = csr_array((np.ones(2 * len(a)), (np.concatenate([a, b]), np.concatenate([edges, edges]))), shape=(n, len(a)))
    return _Edges(a, b, LinearConstraint(degree, 2, 2), Bounds(0, 1))


def _cutting_planes(distance: np.ndarray, seconds: float | None) -> tuple[np.ndarray, Status]:
    """The cities of the shortest tour in order: solve without subtour constraints, cut off what is no tour, again.

    First with edges that may be taken in part, whose programs are quick and whose cuts hold for whole edges too; with
    whole edges from when no such cut is violated any more.
    """
    n = len(distance)
    edges = _edges(n)
    cost = _bounded(distance[edges.a, edges.b], distance)
    cuts: list[np.ndarray] = []
    integer = np.zeros(len(cost), bool)
    deadline = None if seconds is None else time.monotonic() + seconds
    cycles = [np.arange(n)]
    while deadline is None or time.monotonic() < deadline:
        remaining = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
        x, status = highs(cost, [edges.degree, *_stack(cuts)], integer, edges.bounds, remaining)
        if x is None:
            break
        if np.abs(x - np.round(x)).max() < 1e-6:
            cycles = _cycles(np.round(x), edges, n)
            if len(cycles) == 1 or status == Status.BEST_FOUND:  # one round trip is the best already: 2-opt leaves it
                return _two_opt(_patch(cycles, distance), distance), status
            subsets = cycles if len(cycles) > 2 else cycles[:1]
        else:
            subsets = _violated(x, edges, n)
        if not subsets:
            integer[:] = True
        cuts += [_crossing(subset, edges, n) for subset in subsets]
    return _two_opt(_patch(cycles, distance), distance), Status.BEST_FOUND


def _bounded(cost: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Costs of at least 0, an edge that is longer than some whole tour no longer than that takes to be left out.

    Every tour has n edges: what all edges have in common does not matter. One road of 10^8 among others of 1 would hide
    these from the absolute tolerances of a mixed-integer program.
    """
    least = cost.min()
    tour = _two_opt(_nearest(distance), distance)
    length = float((distance[tour, np.roll(tour, -1)] - least).sum())
    return np.minimum(cost - least, 2 * length) if length > 0 else np.sign(cost - least)


def _nearest(distance: np.ndarray) -> np.ndarray:
    """A tour that always goes on to the nearest city that is left."""
    tour, left = [0], set(range(1, len(distance)))
    while left:
        tour.append(min(left, key=lambda city: float(distance[tour[-1], city])))
        left.remove(tour[-1])
    return np.array(tour)


def _violated(x: np.ndarray, edges: _Edges, n: int) -> list[np.ndarray]:
    """Subsets of cities left by less than two edges in all: the cuts met by Stoer and Wagner's search for the least."""
    weight = np.zeros((n, n))
    weight[edges.a, edges.b] = weight[edges.b, edges.a] = x
    merged = [[city] for city in range(n)]
    alive, found = list(range(n)), []
    while len(alive) > 1:
        pull, before, last = np.zeros(n), alive[0], alive[0]
        waiting = np.zeros(n, bool)
        waiting[alive] = True
        for _ in alive:
            before, last = last, int(np.argmax(np.where(waiting, pull, -1.0)))
            waiting[last] = False
            cut = pull[last]
            pull = pull + weight[last]
        if cut < 2 - 1e-6:
            found.append(np.array(merged[last]))
        merged[before] += merged[last]
        weight[before] += weight[last]
        weight[:, before] = weight[before]
        weight[before, before] = 0
        alive.remove(last)
    return found


def _crossing(cycle: np.ndarray, edges: _Edges, n: int) -> np.ndarray:
    """The edges that leave a subset of cities, of which every tour uses at least two."""
    inside = np.zeros(n, bool)
    inside[cycle] = True
    return inside[edges.a] != inside[edges.b]


def _stack(cuts: list[np.ndarray]) -> list[Any]:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    return [LinearConstraint(csr_array(np.array(cuts, float)), 2, np.inf)] if cuts else []


def _cycles(x: np.ndarray, edges: _Edges, n: int) -> list[np.ndarray]:
    """The round trips that the chosen edges form, each as its cities in order."""
    near: list[list[int]] = [[] for _ in range(n)]
    for edge in np.flatnonzero(x):
        near[edges.a[edge]].append(edges.b[edge])
        near[edges.b[edge]].append(edges.a[edge])
    cycles, seen = [], np.zeros(n, bool)
    for first in range(n):
        cycle, city = [], first
        while not seen[city]:
            seen[city] = True
            cycle.append(city)
            city = next((c for c in near[city] if not seen[c]), city)
        if cycle:
            cycles.append(np.array(cycle))
    return cycles


def _patch(cycles: list[np.ndarray], distance: np.ndarray) -> np.ndarray:
    """One tour from several: each is inserted at the edge where that costs least."""
    tour = cycles[0]
    for cycle in cycles[1:]:
        a, b = tour, np.roll(tour, -1)
        ways = []
        for other in (cycle, cycle[::-1]):
            for shift in range(len(other)):
                turned = np.roll(other, shift)
                added = distance[a, turned[0]] + distance[turned[-1], b] - distance[a, b] - distance[turned[-1], turned[0]]
                ways.append((added.min(), int(added.argmin()), turned))
        _, at, turned = min(ways, key=lambda way: way[0])
        tour = np.concatenate([tour[: at + 1], turned, tour[at + 1 :]])
    return tour


def _two_opt(tour: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Turn a stretch of the tour around as long as the best such turn shortens it."""
    i, j = np.triu_indices(len(tour), 2)
    while True:
        after = np.roll(tour, -1)
        gain = distance[tour[i], after[i]] + distance[tour[j], after[j]]
        gain = gain - distance[tour[i], tour[j]] - distance[after[i], after[j]]
        best = int(np.argmax(gain))
        if gain[best] <= 1e-12 * np.abs(distance).max():
            return tour
        first, last = i[best] + 1, j[best] + 1
        tour = np.concatenate([tour[:first], tour[first:last][::-1], tour[last:]])
