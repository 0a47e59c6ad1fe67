r"""Projections of a cost that leave its solution alone: the regulariser of Identity with projection.

.. math:: P_a(w) = w - \frac{\langle a, w\rangle}{\|a\|^2} a, \quad P_{mean} = P_{\mathbf 1}, \quad
          P_{norm}(w) = \frac{w}{\|w\|}, \quad P_{std} = P_{norm} \circ P_{mean}

All are idempotent, and the gradient that comes back through one is orthogonal to what it took away: through
:math:`P_a` to :math:`a`, through :math:`P_{norm}` to :math:`w`. They are plain functions of tensors, usable alone. ``ndim``
says how many of the last dimensions are one instance, ``mask`` which entries of it count: the others become 0.

A cost that is 0 after its mean has gone has no direction: its norm projection is 0, and so is its gradient.

Reference:
    Sahoo, Paulus, Vlastelica, Musil, Kuleshov, Martius 2023, "Backpropagation through Combinatorial Algorithms: Identity
    with Projection Works", https://arxiv.org/abs/2205.15213 (section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distset.solvers.base import FunctionSolver, Solver

__all__ = ["Plane", "Projection", "project_mean", "project_norm", "project_plane", "project_std", "projection_for"]


class Plane(NamedTuple):
    """``Identity(projection=Plane(a))``: project along ``a``, for which ``<a, y>`` is the same for all structures."""

    normal: Tensor


Projection = Literal["auto", "none", "mean", "norm", "std"] | Plane


def project_plane(cost: Tensor, normal: Tensor, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``cost - <a, cost> / |a|^2 a``: what is left within the hyperplane of normal ``a``.

    Args:
        cost: ``(*, *instance)``.
        normal: ``(*instance)``, or anything that broadcasts to it.
        ndim: dimensions of one instance.
        mask: bool ``(*instance)``; entries outside count as if they were not there, and become 0.

    Raises:
        ValueError: for a normal that is 0 wherever the mask lets it be seen.

    Example:
        >>> import torch
        >>> from distset.projections import project_plane
        >>> project_plane(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor([0., 1.])
    """
    cost = _masked(cost, mask)
    normal = torch.as_tensor(normal, dtype=cost.dtype, device=cost.device).broadcast_to(cost.shape[cost.ndim - ndim :])
    normal = _masked(normal, mask)
    square = normal.square().sum()
    if square == 0:
        raise ValueError("normal: got the zero vector (within the mask), wanted the normal of a hyperplane")
    dims = _dims(ndim)
    return cost - (cost * normal).sum(dims, keepdim=True) / square * normal


def project_mean(cost: Tensor, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``cost - mean(cost)``, over the entries within the mask; arguments as in `project_plane`.

    Example:
        >>> import torch
        >>> from distset.projections import project_mean
        >>> project_mean(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    return project_plane(cost, torch.ones((), dtype=cost.dtype, device=cost.device), ndim=ndim, mask=mask)


def project_norm(cost: Tensor, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``cost / |cost|``, over the entries within the mask; arguments as in `project_plane`.

    Example:
        >>> import torch
        >>> from distset.projections import project_norm
        >>> project_norm(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return _unit(_masked(cost, mask), _dims(ndim), torch.finfo(cost.dtype).tiny)


def project_std(cost: Tensor, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``project_norm(project_mean(cost))``: the cost standardised; arguments as in `project_plane`."""
    return project_plane_norm(cost, torch.ones((), dtype=cost.dtype, device=cost.device), ndim=ndim, mask=mask)


def project_plane_norm(cost: Tensor, normal: Tensor, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``project_norm(project_plane(cost, normal))``; arguments as in `project_plane`."""
    dims = _dims(ndim)
    # What is left of a multiple of the normal is rounding: it must not be blown up to norm 1.
    size = _masked(cost.detach(), mask).abs().amax(dims, keepdim=True)
    rounding = (8 * torch.finfo(cost.dtype).eps * size).clamp_min(torch.finfo(cost.dtype).tiny)
    return _unit(project_plane(cost, normal, ndim=ndim, mask=mask), dims, rounding)


def projection_for(projection: Projection, solver: Solver, instance: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """What a strategy does to costs ``(B, *instance)`` before the solver sees them.

    Raises:
        ValueError: for a projection that would change the solver's solutions, with the reason.
    """
    normal, unit = _parts(projection, solver)
    ndim, declared = len(instance), solver.mask_for(instance)
    mask = None if declared is None else torch.as_tensor(declared)
    reason = _invalid(normal, unit, solver, instance, mask)
    if reason:
        raise ValueError(f"projection: got {projection!r} for {solver}, which it does not allow: {reason}")
    if normal is None:
        return (lambda cost: project_norm(cost, ndim=ndim, mask=mask)) if unit else (lambda cost: cost)
    project = project_plane_norm if unit else project_plane
    return lambda cost: project(cost, normal, ndim=ndim, mask=mask)


def check_projection(projection: Projection) -> Projection:
    """Raise ValueError for what is no projection at all."""
    if isinstance(projection, Plane) or projection in ("auto", "none", "mean", "norm", "std"):
        return projection
    raise ValueError(f"projection: got {projection!r}, wanted 'auto', 'none', 'mean', 'norm', 'std' or Plane(normal)")


def _parts(projection: Projection, solver: Solver) -> tuple[Tensor | None, bool]:
    """The normal that is taken out (None: none), and whether the norm is."""
    if isinstance(projection, Plane):
        return projection.normal, False
    if projection == "auto":  # all that the declaration allows
        plane = solver.hyperplane is not None and not solver.nonnegative
        return (torch.as_tensor(solver.hyperplane, dtype=torch.float64) if plane else None), solver.scale_free
    ones = torch.ones((), dtype=torch.float64) if projection in ("mean", "std") else None
    return ones, projection in ("norm", "std")


def _invalid(
    normal: Tensor | None, unit: bool, solver: Solver, instance: tuple[int, ...], mask: Tensor | None
) -> str | None:
    """Why a projection would change the solutions."""
    if unit and not solver.scale_free:
        return "its solution depends on the scale of the costs; choose 'none' or 'mean'"
    if normal is None:
        return None
    if solver.nonnegative:
        return "taking out a mean makes costs negative, which it forbids; choose 'norm'"
    if solver.hyperplane is None and isinstance(solver, FunctionSolver) and normal.ndim > 0:
        return None  # a normal given by the caller is a declaration
    if solver.hyperplane is None:
        return (
            "it declares no hyperplane (the sum over a structure's entries is not the same for all structures, or nobody "
            "said so); choose 'norm', or declare it: FunctionSolver(fn, hyperplane=1.0)"
        )
    wanted = torch.as_tensor(solver.hyperplane, dtype=torch.float64).broadcast_to(instance)
    given = normal.to("cpu", torch.float64).broadcast_to(instance)
    if mask is not None:
        wanted, given = wanted * mask, given * mask
    lengths = wanted.square().sum() * given.square().sum()
    parallel = ((wanted * given).sum().square() - lengths).abs() <= 1e-9 * lengths
    return None if parallel else "its hyperplane has another normal; choose projection='auto'"


def _unit(cost: Tensor, dims: tuple[int, ...], rounding: Tensor | float) -> Tensor:
    return _Unit.apply(cost, dims, rounding)


class _Unit(torch.autograd.Function):
    """``cost / |cost|``, 0 where no entry is above ``rounding``; the gradient in closed form, four passes over the cost."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, dims: tuple[int, ...], rounding: Tensor | float) -> Tensor:
        # Scaled by the largest entry first, so that the squares neither overflow nor vanish.
        largest = cost.abs().amax(dims, keepdim=True)
        inverse = torch.where(largest > rounding, 1 / largest, 0.0)
        unit = cost * inverse
        inverse_norm = unit.square().sum(dims, keepdim=True).clamp_min_(1.0).rsqrt_()  # the largest entry is 1, or all are 0
        unit *= inverse_norm
        ctx.dims = dims
        ctx.save_for_backward(unit, inverse * inverse_norm)
        return unit

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse = ctx.saved_tensors
        return (g - (g * unit).sum(ctx.dims, keepdim=True) * unit) * inverse, None, None


def _masked(cost: Tensor, mask: Tensor | None) -> Tensor:
    return cost if mask is None else torch.where(mask.to(cost.device), cost, 0.0)


def _dims(ndim: int) -> tuple[int, ...]:
    return tuple(range(-ndim, 0))
