"""Shortest paths over grids whose cells cost."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from distset.solvers.base import Solver

__all__ = ["ShortestPath"]


class _Grid(NamedTuple):
    """The graph of a grid: a scipy sparse matrix whose weights are set anew for each instance, and where each leads to."""

    graph: Any  # scipy's csr_array (H W, H W)
    into: np.ndarray  # the cell that each stored weight leads into


class ShortestPath(Solver):
    r"""The cheapest path between two cells of a grid: :math:`\arg\min \langle w, y\rangle`, ``y`` the 0/1 mask of its cells.

    Both end cells count. Exact (Dijkstra, scipy), O(n log n) an instance. Costs may be 0 and must not be negative. Among
    equally cheap paths the one that scipy's heap meets first is taken, always the same: compare costs, never paths.

    Paths have different numbers of cells, so that the mean of the costs matters and cannot be projected out.

    Args:
        neighbours: 4, or 8 with diagonal steps.
        start, end: cells as (row, column); negative numbers count from the end.
        walls: bool ``(H, W)``, cells that cannot be entered.

    Raises:
        ValueError: for other neighbourhoods, an end outside of the grid or on a wall, walls that cut the ends apart.

    Example:
        >>> import numpy as np
        >>> from distset.solvers import ShortestPath
        >>> ShortestPath().solve(np.array([[[1.0, 9.0, 1.0], [1.0, 9.0, 1.0], [9.0, 1.0, 1.0]]]))
        array([[[1., 0., 0.],
                [1., 0., 0.],
                [0., 1., 1.]]])
    """

    instance_ndim = 2
    nonnegative = True

    def __init__(
        self,
        neighbours: int = 8,
        start: tuple[int, int] = (0, 0),
        end: tuple[int, int] = (-1, -1),
        walls: np.ndarray | None = None,
    ) -> None:
        if neighbours not in (4, 8):
            raise ValueError(f"neighbours: got {neighbours}, wanted 4 or 8")
        self.neighbours, self.start, self.end = neighbours, tuple(start), tuple(end)
        self.walls = None if walls is None else np.asarray(walls, bool)
        if self.walls is not None:
            if self.walls.ndim != 2:
                raise ValueError(f"walls: got shape {self.walls.shape}, wanted a bool mask (H, W)")
            self._check_connected(self.walls)

    def check_shape(self, instance: tuple[int, ...]) -> None:
        wanted = "(H, W)" if self.walls is None else self.walls.shape
        if len(instance) != 2 or 0 in instance or (self.walls is not None and instance != self.walls.shape):
            raise ValueError(f"cost: got instances of shape {instance}, wanted grids of shape {wanted}")
        self._ends(instance)

    def mask_for(self, instance: tuple[int, ...]) -> np.ndarray | None:
        return None if self.walls is None else ~self.walls

    def solve(self, costs: np.ndarray) -> np.ndarray:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import dijkstra

        shape = costs.shape[1:]
        # scipy ends the process on a negative weight.
        if costs.size and costs.min() < 0:
            raise ValueError(f"cost: got {costs.min():g}, wanted costs of at least 0")
        grid, (start, end) = self._grid(shape), self._ends(shape)
        before = np.empty((len(costs), shape[0] * shape[1]), np.int32)
        shared = grid.graph
        graph = csr_array((np.empty_like(shared.data), shared.indices, shared.indptr), shape=shared.shape)  # of this call
        for i, cost in enumerate(costs.reshape(before.shape).astype(np.float64)):
            np.take(cost, grid.into, out=graph.data, mode="clip")  # the default mode would copy twice
            _, before[i] = dijkstra(graph, indices=start, return_predecessors=True)
        return _walk_back(before, start, end, costs.dtype).reshape(costs.shape)

    def feasible(self, solutions: np.ndarray) -> np.ndarray:
        """Necessary, not sufficient: 0 or 1, both ends on the path, and no other cell with fewer than two neighbours."""
        shape = solutions.shape[1:]
        on = solutions == 1
        start, end = self._ends(shape)
        flat = on.reshape(len(on), -1)
        good = (solutions == on).reshape(flat.shape).all(1) & flat[:, start] & flat[:, end]
        if self.walls is not None:
            good &= ~(on & self.walls).any((1, 2))
        wanted = np.full(shape[0] * shape[1], 2, np.int8)
        wanted[[start, end]] = 0 if start == end else 1
        return good & (~flat | (_count_near(on, self.neighbours).reshape(flat.shape) >= wanted)).all(1)

    def _grid(self, shape: tuple[int, ...]) -> _Grid:
        walls = None if self.walls is None else self.walls.tobytes()
        return _grid(shape[0], shape[1], self.neighbours, walls)

    def _ends(self, shape: tuple[int, ...]) -> tuple[int, int]:
        cells = []
        for name, (row, column) in (("start", self.start), ("end", self.end)):
            if not (-shape[0] <= row < shape[0] and -shape[1] <= column < shape[1]):
                raise ValueError(f"{name}: got {(row, column)}, wanted a cell of the grid of shape {shape}")
            cells.append(row % shape[0] * shape[1] + column % shape[1])
        return cells[0], cells[1]

    def _check_connected(self, walls: np.ndarray) -> None:
        from scipy.sparse.csgraph import connected_components

        start, end = self._ends(walls.shape)
        if walls.flat[start] or walls.flat[end]:
            raise ValueError(f"walls: got a wall on the start {self.start} or the end {self.end}, wanted both free")
        _, component = connected_components(self._grid(walls.shape).graph, directed=False)
        if component[start] != component[end]:
            raise ValueError(f"walls: they cut the end {self.end} off from the start {self.start}; wanted a connected grid")

    def __repr__(self) -> str:
        walls = "" if self.walls is None else f", {int(self.walls.sum())} walls"
        return f"ShortestPath(neighbours={self.neighbours}, start={self.start}, end={self.end}{walls})"


def _steps(neighbours: int) -> list[tuple[int, int]]:
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return steps if neighbours == 8 else [(i, j) for i, j in steps if i == 0 or j == 0]


def _walk_back(before: np.ndarray, start: int, end: int, dtype: np.dtype) -> np.ndarray:
    """The cells from ``end`` to ``start`` as 0/1 ``(B, H W)``; ``before (B, H W)`` is the cell that each is reached from."""
    solutions = np.zeros(before.shape, dtype)
    rows, cells = np.arange(len(before)), np.full(len(before), end)
    while len(rows):  # all paths together, a cell a round
        solutions[rows, cells] = 1
        open_ = cells != start
        rows, cells = rows[open_], cells[open_]
        cells = before[rows, cells]
    return solutions


def _count_near(on: np.ndarray, neighbours: int) -> np.ndarray:
    """How many neighbours of each cell of ``on (B, H, W)`` are on."""
    padded = np.zeros((len(on), on.shape[1] + 2, on.shape[2] + 2), np.int8)
    padded[:, 1:-1, 1:-1] = on
    # Shifts of the flat array: the frame of zeros keeps rows and grids apart.
    line, flat, near = padded.shape[2], padded.ravel(), np.zeros_like(padded)
    inner = near.reshape(-1)[line + 1 : -line - 1]
    for i, j in _steps(neighbours):
        first = (1 + i) * line + 1 + j
        inner += flat[first : first + len(inner)]
    return near[:, 1:-1, 1:-1]


@lru_cache(maxsize=32)
def _grid(height: int, width: int, neighbours: int, walls: bytes | None) -> _Grid:
    from scipy.sparse import csr_array

    free = np.ones((height, width), bool) if walls is None else ~np.frombuffer(walls, bool).reshape(height, width)
    rows, columns = np.nonzero(free)
    pairs = []
    for i, j in _steps(neighbours):
        inside = (rows + i >= 0) & (rows + i < height) & (columns + j >= 0) & (columns + j < width)
        r, c = rows[inside], columns[inside]
        r, c = r[free[r + i, c + j]], c[free[r + i, c + j]]
        pairs.append(np.stack([r * width + c, (r + i) * width + c + j]))
    out, into = np.concatenate(pairs, 1)
    graph = csr_array((np.ones(len(out)), (out, into)), shape=(height * width, height * width))
    graph.sort_indices()
    into = graph.indices.copy()
    graph.indices, graph.indptr = graph.indices.astype(np.int32), graph.indptr.astype(np.int32)  # what dijkstra wants
    return _Grid(graph, into)
