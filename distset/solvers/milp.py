"""Mixed-integer linear programs, by HiGHS through scipy."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from distset.solvers.base import Solved, Solver, Status, TimeLimit

__all__ = ["MixedInteger", "highs"]


class MixedInteger(Solver):
    r"""A mixed-integer linear program: :math:`\arg\min \{\langle w, y\rangle : l \le A y \le u,\ b_l \le y \le b_u\}`.

    Exact to HiGHS's tolerances (relative gap 0, absolute 1e-6 after costs are scaled to a largest entry of 1, feasibility
    1e-6); integer variables are rounded to integers. The constraints are the same for all instances.

    Args:
        constraints: ``scipy.optimize.LinearConstraint``, one or several.
        integrality: 1 where a variable is an integer, 0 where it is real; ``(n,)`` or one number for all.
        bounds: ``scipy.optimize.Bounds``; 0 and 1 where left out.
        sense: ``"min"`` or ``"max"``.
        hyperplane: a normal ``a`` with ``<a, y>`` equal for all feasible ``y``, if there is one.
        limit: seconds an instance, and what then.

    Raises:
        ValueError: at use, for a program without a solution or without a bound, named as such.

    Example:
        >>> import numpy as np
        >>> from scipy.optimize import LinearConstraint
        >>> from distset.solvers import MixedInteger
        >>> weights = np.array([[3.0, 4.0, 5.0]])
        >>> knapsack = MixedInteger(LinearConstraint(weights, ub=8.0), sense="max")
        >>> knapsack.solve(np.array([[4.0, 3.0, 5.0], [1.0, 3.0, 3.5]]))
        array([[1., 0., 1.],
               [1., 0., 1.]])
    """

    def __init__(
        self,
        constraints: Any,
        *,
        integrality: np.ndarray | int = 1,
        bounds: Any | None = None,
        sense: Literal["min", "max"] = "min",
        hyperplane: np.ndarray | float | None = None,
        limit: TimeLimit | None = None,
    ) -> None:
        from scipy.optimize import Bounds

        if sense not in ("min", "max"):
            raise ValueError(f"sense: got {sense!r}, wanted 'min' or 'max'")
        self.constraints = list(constraints) if isinstance(constraints, (list, tuple)) else [constraints]
        self.integrality, self.bounds = integrality, Bounds(0, 1) if bounds is None else bounds
        self.sense, self.hyperplane, self.limit = sense, hyperplane, limit

    def check_shape(self, instance: tuple[int, ...]) -> None:
        for constraint in self.constraints:
            n = np.atleast_2d(constraint.A).shape[-1] if not hasattr(constraint.A, "tocsr") else constraint.A.shape[1]
            if instance != (n,):
                raise ValueError(f"cost: got instances of shape {instance}, wanted ({n},), the columns of the constraints")

    def solve(self, costs: np.ndarray) -> np.ndarray:
        return self.solve_status(costs).solutions

    def solve_status(self, costs: np.ndarray) -> Solved:
        real = costs.dtype if np.issubdtype(costs.dtype, np.floating) else float  # solutions of whole costs may be fractions
        solutions, status = np.zeros(costs.shape, real), np.zeros(len(costs), np.int8)
        sign = 1 if self.sense == "min" else -1
        integer = np.broadcast_to(np.asarray(self.integrality), costs.shape[1:]) > 0
        seconds = None if self.limit is None else self.limit.seconds
        for i, cost in enumerate(costs):
            found, status[i] = highs(sign * cost, self.constraints, integer, self.bounds, seconds)
            solutions[i] = 0 if found is None else found
        return Solved(solutions, status)

    def feasible(self, solutions: np.ndarray) -> np.ndarray:
        """Within bounds and constraints, to 1e-5 of the size of each row."""
        y = solutions.astype(float)
        good = ((y >= self.bounds.lb - 1e-5) & (y <= self.bounds.ub + 1e-5)).all(1)
        for constraint in self.constraints:
            rows = (constraint.A @ y.T).T
            slack = 1e-5 * (1 + (abs(constraint.A) @ abs(y.T)).T)
            good &= ((rows >= constraint.lb - slack) & (rows <= constraint.ub + slack)).all(1)
        return good

    def __repr__(self) -> str:
        return f"MixedInteger({len(self.constraints)} constraint blocks, sense={self.sense!r}, limit={self.limit})"


def highs(
    cost: np.ndarray, constraints: Any, integer: np.ndarray, bounds: Any, seconds: float | None = None
) -> tuple[np.ndarray | None, Status]:
    """One program by HiGHS: the solution (None where the time limit left nothing) and how the search ended.

    Raises:
        ValueError: for a program that is infeasible or unbounded.
    """
    from scipy.optimize import milp

    # HiGHS's tolerances are absolute: scale the costs, so that the solution does not depend on their size.
    scale = np.abs(cost).max()
    options = {"mip_rel_gap": 0.0} | ({} if seconds is None else {"time_limit": seconds})
    result = milp(
        np.asarray(cost, float) / (scale or 1.0),
        constraints=constraints,
        integrality=integer.astype(int),
        bounds=bounds,
        options=options,
    )
    if result.status in (2, 3, 4):
        raise ValueError(f"constraints: wanted a program with a finite best solution, but HiGHS says: {result.message}")
    if result.x is None:
        return None, Status.NOTHING
    x = np.where(integer, np.round(result.x), result.x)
    return x, Status.SOLVED if result.status == 0 else Status.BEST_FOUND
