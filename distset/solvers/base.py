r"""What a solver is: a batch of costs in, the batch of best structures out, and what it declares about its structures.

A solver finds :math:`y(w) = \arg\min_{y \in Y} \langle w, y \rangle` (or the argmax). It knows nothing of gradients; the
strategies of `distset.solve` need four facts that only the solver knows:

* its ``sense``: ``"min"`` (``w`` is a cost) or ``"max"`` (``w`` is a score);
* its ``hyperplane``: a normal ``a`` with ``<a, y>`` the same for every ``y`` in ``Y``, so that ``y(w + c a) = y(w)``;
* its ``mask``: the entries that can be other than 0; costs elsewhere are never looked at;
* its cost domain: ``nonnegative`` where a negative cost is forbidden, ``scale_free`` where ``y(s w) = y(w)`` for s > 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "FunctionSolver",
    "Solved",
    "Solver",
    "Status",
    "TensorSolver",
    "TimeLimit",
    "as_solver",
    "solve_checked",
    "solve_tensor_checked",
]

Array = NDArray[np.generic]
S = TypeVar("S", Tensor, "np.ndarray")


class Status(IntEnum):
    """How the search for one instance ended."""

    SOLVED = 0
    BEST_FOUND = 1  # the time limit came first; a feasible structure, maybe not the best
    NOTHING = 2  # the time limit came first, with nothing feasible in hand


class _Limit(NamedTuple):
    seconds: float
    then: Literal["fail", "best", "skip"]


class TimeLimit(_Limit):
    """Seconds an instance may take, and what happens when it takes longer.

    Attributes:
        seconds: of wall clock, an instance.
        then: ``"fail"`` raises `TimeoutError`; ``"best"`` goes on with the best structure found, and raises only where
            there is none; ``"skip"`` leaves the instance out: its solution is 0 and so is its gradient.

    Raises:
        ValueError: for seconds that are not above 0, another policy.
    """

    __slots__ = ()

    def __new__(cls, seconds: float, then: Literal["fail", "best", "skip"] = "fail") -> TimeLimit:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"seconds: got {seconds}, wanted a time above 0 for an instance, or no limit at all (None)")
        if then not in ("fail", "best", "skip"):
            raise ValueError(f"then: got {then!r}, wanted 'fail', 'best' or 'skip'")
        return super().__new__(cls, seconds, then)


class Solved(NamedTuple):
    """Solutions ``(B, *instance)`` and the `Status` of each, int8 ``(B,)``."""

    solutions: np.ndarray
    status: np.ndarray


class Solver(ABC):
    """The protocol of a solver; see the module's docstring for what the attributes declare.

    A subclass gives `solve` (or, where it can be stopped early, `solve_status`) and what it wants to declare.
    An instance must be solved the same whatever else is in its batch: a pool splits batches as it sees fit.

    Attributes:
        instance_ndim: dimensions of one instance; what comes before them is batch.
        hyperplane: None where there is none; 1.0 for the all-ones normal.
        mask: bool array that broadcasts to the instance; None where every entry counts.
    """

    sense: Literal["min", "max"] = "min"
    instance_ndim: int = 1
    hyperplane: np.ndarray | float | None = None
    nonnegative: bool = False
    scale_free: bool = True
    limit: TimeLimit | None = None

    @abstractmethod
    def solve(self, costs: np.ndarray) -> np.ndarray:
        """The best structure for each of ``costs (B, *instance)``, in an array of the same shape."""

    def solve_status(self, costs: np.ndarray) -> Solved:
        """`solve` and how each search ended; override it where ``limit`` can stop a search."""
        return Solved(self.solve(costs), np.zeros(len(costs), np.int8))

    def mask_for(self, instance: tuple[int, ...]) -> np.ndarray | None:
        """The mask of an instance of this shape."""
        return None

    def check_shape(self, instance: tuple[int, ...]) -> None:  # noqa: B027 - nothing to check is a good answer
        """Raise ValueError where an instance of this shape makes no sense."""

    def feasible(self, solutions: np.ndarray) -> np.ndarray:
        """Which of ``solutions (B, *instance)`` are structures at all, bool ``(B,)``; cheap, for it runs every time."""
        return np.ones(len(solutions), bool)

    def clip(self, costs: Tensor) -> Tensor:
        """Costs that noise or a perturbation has moved, brought back into the cost domain."""
        return costs.clamp_min(0.0) if self.nonnegative else costs

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class TensorSolver(Solver):
    """A solver whose kernel works on tensors, whole batches at a time, on any device."""

    @abstractmethod
    def solve_tensor(self, costs: Tensor) -> Tensor:
        """The best structure for each of ``costs (B, *instance)``, on the same device and of the same dtype."""

    def solve(self, costs: np.ndarray) -> np.ndarray:
        return self.solve_tensor(torch.tensor(costs)).numpy()

    def feasible_tensor(self, solutions: Tensor) -> Tensor:
        """`feasible` for solutions on any device; override it where a copy to the CPU is to be spared."""
        return torch.as_tensor(self.feasible(solutions.cpu().numpy()), device=solutions.device)


class FunctionSolver(Solver):
    """A bare function ``costs (B, *instance) -> solutions`` with its declaration.

    Args:
        fn: from a numpy batch of costs to a numpy batch of solutions.
        sense: ``"min"`` or ``"max"``.
        hyperplane: a normal ``a`` with ``<a, y>`` equal for all structures (1.0: all ones), None if there is none.
        mask: bool, the entries that can be other than 0.
        nonnegative: negative costs are forbidden.
        scale_free: scaling all costs by a positive number changes nothing (true for any exact solver of a linear cost).
        instance_ndim: dimensions of one instance; None: all but the first.

    Example:
        >>> import numpy as np
        >>> from distset.solvers import FunctionSolver
        >>> cheapest = FunctionSolver(lambda w: np.eye(w.shape[1])[w.argmin(1)], hyperplane=1.0)
        >>> cheapest.solve(np.array([[3.0, 1.0, 2.0]]))
        array([[0., 1., 0.]])
    """

    def __init__(
        self,
        fn: Callable[[np.ndarray], np.ndarray],
        *,
        sense: Literal["min", "max"] = "min",
        hyperplane: np.ndarray | float | None = None,
        mask: np.ndarray | None = None,
        nonnegative: bool = False,
        scale_free: bool = True,
        instance_ndim: int | None = None,
    ) -> None:
        if sense not in ("min", "max"):
            raise ValueError(f"sense: got {sense!r}, wanted 'min' (costs) or 'max' (scores)")
        self.fn = fn
        self.sense = sense
        self.hyperplane = hyperplane
        self.mask = mask
        self.nonnegative = nonnegative
        self.scale_free = scale_free
        self.instance_ndim = -1 if instance_ndim is None else instance_ndim

    def solve(self, costs: np.ndarray) -> np.ndarray:
        return self.fn(costs.copy())  # it may write on them

    def mask_for(self, instance: tuple[int, ...]) -> np.ndarray | None:
        return self.mask

    def __repr__(self) -> str:
        return f"FunctionSolver({getattr(self.fn, '__name__', self.fn)})"


def as_solver(solver: Solver | Callable[[np.ndarray], np.ndarray]) -> Solver:
    """A `Solver`, or a bare function wrapped as one that declares nothing but an exact minimum.

    Raises:
        ValueError: for something that is neither.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, type) or not callable(solver):
        raise ValueError(
            f"solver: got {solver!r}, wanted a Solver object or a function from a numpy batch of costs to a numpy batch "
            "of solutions"
        )
    return FunctionSolver(solver)


def solve_checked(solver: Solver, costs: np.ndarray) -> Solved:
    """Solve a batch ``(B, *instance)`` and let nothing pass that is not a structure.

    Raises:
        ValueError: for costs that are not finite or outside of the solver's domain, for instances of a wrong shape, and
            for solutions of a wrong shape, not finite or infeasible; the solver and the instance are named.
        TimeoutError: where a time limit was hit and the policy is to fail.
    """
    check_costs(solver, torch.from_numpy(costs))
    if len(costs) == 0:
        return Solved(np.zeros_like(costs), np.zeros(0, np.int8))
    costs = costs.view()
    costs.setflags(write=False)  # they may be a parameter's own memory
    solutions, status = solver.solve_status(costs)
    _check_returned(solver, solutions, costs)
    status = apply_limit(solver, status)
    skipped = status == Status.NOTHING
    if skipped.any():
        solutions = np.where(skipped.reshape(-1, *[1] * (solutions.ndim - 1)), 0, solutions)
    finite = np.isfinite(solutions).reshape(len(solutions), -1).all(1)
    _check_good(solver, torch.from_numpy(finite), torch.from_numpy(solver.feasible(solutions) | skipped))
    return Solved(solutions, status)


def solve_tensor_checked(solver: TensorSolver, costs: Tensor) -> Tensor:
    """`solve_checked` for costs that stay on their device; solutions ``(B, *instance)`` of the same device and dtype.

    Raises:
        ValueError: as in `solve_checked`.
    """
    check_costs(solver, costs)
    if len(costs) == 0:
        return torch.zeros_like(costs)
    solutions = solver.solve_tensor(costs)
    _check_returned(solver, solutions, costs)
    finite = (solutions.flatten(1) * 0).sum(1) == 0  # many times quicker than isfinite().all(1)
    _check_good(solver, finite, solver.feasible_tensor(solutions))
    return solutions.to(costs)


def _check_returned(solver: Solver, solutions: object, costs: np.ndarray | Tensor) -> None:
    kind = Tensor if isinstance(costs, Tensor) else np.ndarray
    if not isinstance(solutions, kind) or solutions.shape != costs.shape:
        came = tuple(solutions.shape) if isinstance(solutions, kind) else type(solutions).__name__
        raise ValueError(
            f"{solver}: returned solutions of shape {came}, wanted {tuple(costs.shape)}, the shape of the costs"
        )


def _check_good(solver: Solver, finite: Tensor, feasible: Tensor) -> None:
    """Raise ValueError for the first instance whose solution is not finite or not feasible, bool ``(B,)`` each."""
    good = finite & feasible
    if not good.all():
        worst = int((~good).nonzero()[0])
        why = "infeasible" if finite[worst] else "not finite"
        raise ValueError(f"{solver}: its solution of instance {worst} of {len(good)} is {why}; the solver is at fault")


def check_costs(solver: Solver, costs: Tensor) -> None:
    """Raise ValueError for costs ``(B, *instance)`` that the solver cannot take."""
    instance = tuple(costs.shape[1:])
    solver.check_shape(instance)
    if costs.numel() == 0:
        return
    low, high = torch.aminmax(costs)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = (~torch.isfinite(costs)).reshape(len(costs), -1).any(1).nonzero()[0].item()
        raise ValueError(f"cost: got NaN or infinite entries (first in instance {bad}), wanted finite ones")
    if solver.nonnegative and low < 0:
        raise ValueError(
            f"cost: got {low.item():g}, but {solver} forbids negative costs; make them positive in the network "
            "(softplus, exp, relu)"
        )


def apply_limit(solver: Solver, status: np.ndarray) -> np.ndarray:
    """Apply the solver's policy for time limits; what is to be left out becomes `Status.NOTHING`."""
    if not status.any():
        return status
    assert solver.limit is not None, "a solver without a limit solves everything"
    seconds, then = solver.limit
    fails = status > 0 if then == "fail" else status == Status.NOTHING
    if then != "skip" and fails.any():
        worst = int(np.argmax(fails))
        found = "a feasible structure but no proof" if status[worst] == Status.BEST_FOUND else "nothing feasible"
        raise TimeoutError(
            f"{solver}: {int(fails.sum())} of {len(status)} instances were not solved within {seconds:g} s (first: "
            f"instance {worst}, {found}); raise the limit, or choose TimeLimit(seconds, then='best') or 'skip'"
        )
    return np.where(status > 0, np.int8(Status.NOTHING), status) if then == "skip" else status
