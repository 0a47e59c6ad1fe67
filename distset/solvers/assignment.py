"""Linear assignment: each row gets its own column."""

from __future__ import annotations

import numpy as np

from distset.solvers.base import Solver

__all__ = ["Assignment"]


class Assignment(Solver):
    r"""The cheapest assignment :math:`\arg\min \langle w, y\rangle`, ``y`` 0/1 with at most a one in each row and column.

    Costs are ``(n, m)``; as many pairs are made as the smaller side has. Exact (scipy's Jonker-Volgenant), O(n^3) an
    instance. Among equally cheap assignments scipy's is taken, always the same.

    Example:
        >>> import numpy as np
        >>> from distset.solvers import Assignment
        >>> Assignment().solve(np.array([[[1.0, 2.0], [1.0, 4.0]]]))
        array([[[0., 1.],
                [1., 0.]]])
    """

    instance_ndim = 2
    hyperplane = 1.0

    def check_shape(self, instance: tuple[int, ...]) -> None:
        if len(instance) != 2 or 0 in instance:
            raise ValueError(f"cost: got instances of shape {instance}, wanted matrices of shape (n, m)")

    def solve(self, costs: np.ndarray) -> np.ndarray:
        from scipy.optimize import linear_sum_assignment

        solutions = np.zeros_like(costs)
        for cost, solution in zip(costs, solutions):
            solution[linear_sum_assignment(cost)] = 1
        return solutions

    def feasible(self, solutions: np.ndarray) -> np.ndarray:
        binary = np.isin(solutions, (0, 1)).all((1, 2))
        rows, columns = solutions.sum(2), solutions.sum(1)
        pairs = min(solutions.shape[1:])
        return binary & (rows <= 1).all(1) & (columns <= 1).all(1) & (rows.sum(1) == pairs)
