"""`check_solver`: proves what a solver declares, before a network is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from distset.solvers.base import Solver, as_solver, solve_checked

__all__ = ["SolverErrors", "check_solver"]


class SolverErrors(NamedTuple):
    """The largest excess cost `check_solver` saw, relative to the cost's size; 0 for a solver that keeps its word.

    Attributes:
        optimality: of a solution over the best of the batch's other solutions.
        scale: of the solution of scaled costs.
        hyperplane: of the solution of costs moved along the declared normal.
        projection: of the solution of the projected cost, ``y(P(w))``, over ``y(w)``.
    """

    optimality: float
    scale: float
    hyperplane: float
    projection: float


def check_solver(
    solver: Solver | Callable[[np.ndarray], np.ndarray],
    costs: np.ndarray,
    *,
    exact: bool = True,
    tolerance: float = 1e-9,
) -> SolverErrors:
    """Prove a solver's declaration on a batch of costs.

    Checked: (1) solutions are feasible structures of the right shape, and costs are not written to; (2) the same costs give
    the same solutions, alone, in any batch and in any order; (3) no instance likes another's solution better than its own,
    in the declared sense; (4) entries outside of the mask are 0 and their costs do not matter; (5) if ``scale_free``,
    scaling changes nothing; (6) ``<a, y>`` is the same for all, and moving the costs along ``a`` changes nothing; (7)
    ``y(P(w)) = y(w)`` for the projection that ``"auto"`` stands for. Costs are compared, not solutions: ties may be broken
    anew by rounding.

    Args:
        solver: a `Solver` or a bare function.
        costs: ``(B, *instance)``, 20 or more different instances within the solver's domain, in float64.
        exact: False for a heuristic: laws 3, 5, 6 and 7 then ask only that `SolverErrors` are finite, and return them.
        tolerance: of excess costs.

    Raises:
        AssertionError: naming the law that is broken and an instance.
        ValueError: for costs that the solver cannot take; a mask or a hyperplane that does not fit them.

    Example:
        >>> import numpy as np
        >>> from distset.solvers import TopK
        >>> from distset.solvers.check import check_solver
        >>> max(check_solver(TopK(2), np.random.default_rng(0).normal(size=(20, 5)))) < 1e-15
        True
    """
    from distset.projections import projection_for

    solver = as_solver(solver)
    costs = np.array(costs, float)
    if len(costs) < 2:
        raise ValueError(f"costs: got {len(costs)} instances, wanted a batch of at least 2, better 20")
    solutions = _solve(solver, costs)
    project = projection_for("auto", solver, costs.shape[1:])
    _check_repeats(solver, costs, solutions)
    _check_mask(solver, costs, solutions)
    limit = tolerance if exact else np.inf
    optimality = _excess(solver, costs, solutions, _best_of_all(solver, costs, solutions))
    _law(optimality <= limit, f"another instance's solution is better by {optimality:.2g}: is sense={solver.sense!r} right?")
    scale = _scale(solver, costs, solutions)
    _law(scale <= limit, f"scale_free is declared, but scaled costs have another solution, worse by {scale:.2g}")
    along = _hyperplane(solver, costs, solutions, tolerance)
    _law(along <= limit, f"costs moved along the hyperplane's normal have another solution, worse by {along:.2g}")
    import torch

    projected = project(torch.from_numpy(costs)).numpy()
    projection = _excess(solver, costs, _solve(solver, projected), solutions)
    _law(projection <= limit, f"y(P(w)) is not y(w): worse by {projection:.2g}; declare another projection")
    return SolverErrors(optimality, scale, along, projection)


def _law(holds: bool | np.bool_, broken: str) -> None:
    if not holds:
        raise AssertionError(broken)


def _solve(solver: Solver, costs: np.ndarray) -> np.ndarray:
    before = costs.copy()
    try:
        solutions, status = solve_checked(solver, costs)
    except ValueError as error:
        if "at fault" in str(error) or "returned" in str(error):
            raise AssertionError(str(error)) from error
        _law("read-only" not in str(error), f"{solver} writes on the costs that it is given")
        raise
    _law(np.array_equal(before, costs), f"{solver} writes on the costs that it is given")
    _law(not status.any(), f"{solver} hit its time limit; check it without one, or on smaller instances")
    return solutions


def _check_repeats(solver: Solver, costs: np.ndarray, solutions: np.ndarray) -> None:
    again = _solve(solver, costs)
    same = (again == solutions).reshape(len(costs), -1).all(1)
    _law(same.all(), f"{solver} is not deterministic: instance {int(np.argmin(same))} has another solution the second time")
    turned = _solve(solver, costs[::-1].copy())[::-1]
    same = (turned == solutions).reshape(len(costs), -1).all(1)
    _law(same.all(), f"instance {int(np.argmin(same))} is solved otherwise when the batch is in another order")
    for i in range(min(3, len(costs))):
        alone = _solve(solver, costs[i : i + 1])
        _law(np.array_equal(alone[0], solutions[i]), f"instance {i} is solved otherwise alone than in a batch")


def _check_mask(solver: Solver, costs: np.ndarray, solutions: np.ndarray) -> None:
    mask = solver.mask_for(costs.shape[1:])
    if mask is None:
        return
    mask = np.broadcast_to(mask, costs.shape[1:])
    _law((solutions[:, ~mask] == 0).all(), "a solution has entries other than 0 outside of the mask")
    other = np.where(mask, costs, 1 + costs.max())
    _law(np.array_equal(_solve(solver, other), solutions), "costs outside of the mask change a solution")


def _values(costs: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    return (costs * solutions).reshape(len(costs), -1).sum(1)


def _excess(solver: Solver, costs: np.ndarray, found: np.ndarray, best: np.ndarray) -> float:
    """How much worse ``found`` is than ``best``, relative to the size of the costs that it adds up."""
    sign = 1 if solver.sense == "min" else -1
    size = _values(abs(costs), abs(best)) + _values(abs(costs), abs(found))
    worse = sign * (_values(costs, found) - _values(costs, best)) / np.where(size > 0, size, 1)
    return max(float(worse.max()), 0.0) + 0.0


def _best_of_all(solver: Solver, costs: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    values = costs.reshape(len(costs), -1) @ solutions.reshape(len(costs), -1).T
    return solutions[values.argmin(1) if solver.sense == "min" else values.argmax(1)]


def _scale(solver: Solver, costs: np.ndarray, solutions: np.ndarray) -> float:
    if not solver.scale_free:
        return 0.0
    return max(_excess(solver, costs, _solve(solver, costs * factor), solutions) for factor in (1e-3, 1e3))


def _hyperplane(solver: Solver, costs: np.ndarray, solutions: np.ndarray, tolerance: float) -> float:
    if solver.hyperplane is None:
        return 0.0
    mask = solver.mask_for(costs.shape[1:])
    normal = np.broadcast_to(np.asarray(solver.hyperplane, float), costs.shape[1:])
    normal = normal if mask is None else normal * mask
    levels = _values(np.broadcast_to(normal, costs.shape), solutions)
    spread = np.ptp(levels) / max(abs(levels).max(), 1e-300)
    _law(spread <= tolerance, f"<a, y> runs from {levels.min():g} to {levels.max():g}: no hyperplane with this normal")
    if solver.nonnegative:
        return _excess(solver, costs, _solve(solver, costs + abs(costs).max() * abs(normal)), solutions)
    return max(_excess(solver, costs, _solve(solver, costs + by * normal), solutions) for by in (-2.0, 3.0))
