r"""Projections of a cost that leave its solution alone: the regulariser of Identity with projection.

.. math:: P_a(w) = w - \frac{\langle a, w\rangle}{\|a\|^2} a, \quad P_{mean} = P_{\mathbf 1}, \quad
          P_{norm}(w) = \frac{w}{\|w\|}, \quad P_{std} = P_{norm} \circ P_{mean}

All are idempotent, and the gradient that comes back through one is orthogonal to what it took away: through
:math:`P_a` to :math:`a`, through :math:`P_{norm}` to :math:`w`. They are plain functions of tensors, usable alone. ``ndim``
says how many of the last dimensions are one instance, ``mask`` which entries of it count: the others become 0. They can be
differentiated once, by their closed form: with :math:`u = P(w)` in the plane and :math:`c` its scale,

.. math:: P'(w)^\top g = P_a(c\,(g - \langle u, g\rangle u))

A cost that is 0 after its mean has gone has no direction: its norm projection is 0, and so is its gradient.

Reference:
    Sahoo, Paulus, Vlastelica, Musil, Kuleshov, Martius 2023, "Backpropagation through Combinatorial Algorithms: Identity
    with Projection Works", https://arxiv.org/abs/2205.15213 (section 3.3).
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distset.solvers.base import FunctionSolver, Solver

__all__ = [
    "Plane", "Projection", "Projector", "mask_of", "project_mean", "project_norm", "project_plane", "project_std",
    "projection_for",
]  # fmt: skip


class Plane(NamedTuple):
    """``Identity(projection=Plane(a))``: project along ``a``, for which ``<a, y>`` is the same for all structures."""

    normal: Tensor | np.ndarray


Projection = Literal["auto", "none", "mean", "norm", "std"] | Plane
ONES = torch.ones((), dtype=torch.float64)


def project_plane(cost: Tensor, normal: Tensor | np.ndarray, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``cost - <a, cost> / |a|^2 a``: what is left within the hyperplane of normal ``a``.

    Args:
        cost: ``(*, *instance)``.
        normal: ``(*instance)``, or anything that broadcasts to it; no gradient goes to it.
        ndim: dimensions of one instance.
        mask: bool ``(*instance)``; entries outside count as if they were not there, and become 0.

    Raises:
        ValueError: for a normal that is not finite, or 0 wherever the mask lets it be seen; for a normal or a mask that does
            not fit an instance, a mask that is not bool.

    Example:
        >>> import torch
        >>> from distset.projections import project_plane
        >>> project_plane(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0]))
        tensor([0., 1.])
    """
    return Projector(_normal("normal", normal), False, ndim, mask)(cost)


def project_mean(cost: Tensor, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``cost - mean(cost)``, over the entries within the mask; arguments as in `project_plane`.

    Example:
        >>> import torch
        >>> from distset.projections import project_mean
        >>> project_mean(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    return Projector(ONES, False, ndim, mask)(cost)


def project_norm(cost: Tensor, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``cost / |cost|``, over the entries within the mask; arguments as in `project_plane`.

    Example:
        >>> import torch
        >>> from distset.projections import project_norm
        >>> project_norm(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return Projector(None, True, ndim, mask)(cost)


def project_std(cost: Tensor, *, ndim: int = 1, mask: Tensor | None = None) -> Tensor:
    """``project_norm(project_mean(cost))``: the cost standardised; arguments as in `project_plane`."""
    return Projector(ONES, True, ndim, mask)(cost)


class Projector:
    """A projection: what is left of a cost once its part along ``normal`` and, where ``unit``, its length are taken away.

    Args:
        normal: as in `project_plane`; None takes nothing away.
        unit: what is left gets length 1, or 0 where it is nothing but rounding.
        ndim, mask: as in `project_plane`.
    """

    def __init__(self, normal: Tensor | None, unit: bool, ndim: int, mask: Tensor | np.ndarray | None = None) -> None:
        self.normal = None if normal is None else normal.detach()
        self.mask = None if mask is None else _bool("mask", mask)
        self.unit, self.dims = unit, tuple(range(-ndim, 0))
        self.level = self.normal is not None and mask is None and self.normal.ndim == 0 and bool(self.normal != 0)

    def __call__(self, cost: Tensor) -> Tensor:
        """Of ``cost (*, *instance)``, in the same shape."""
        for name, tensor in (("normal", self.normal), ("mask", self.mask)):
            if tensor is not None:
                _fit(name, tensor, tuple(cost.shape[-len(self.dims) :]))
        if self.normal is None and not self.unit:
            return self._masked(cost)
        return _Project.apply(cost, self)

    def forward(self, cost: Tensor) -> tuple[Tensor, Tensor | None]:
        """The projected cost, and what it was scaled by ``(*, 1...)``; None where lengths are left alone."""
        cost = self._masked(cost)
        flat = cost if self.normal is None else self._flatten(cost)
        if not self.unit:
            return flat, None
        tiny, eps = torch.finfo(cost.dtype).tiny, torch.finfo(cost.dtype).eps
        # What is left of a multiple of the normal is rounding: it must not be blown up to length 1.
        rounding = tiny if self.normal is None else (8 * eps * self._largest(cost)).clamp_min_(tiny)
        # Scaled by the largest entry first, so that the squares neither overflow nor vanish.
        largest = self._largest(flat)
        scale = torch.where(largest > rounding, 1 / largest, 0.0)
        projected = flat * scale
        shorter = torch.linalg.vector_norm(projected, dim=self.dims, keepdim=True).clamp_min_(1.0)  # 1 or more, or all are 0
        return projected.div_(shorter), scale.div_(shorter)

    def pull_back(self, g: Tensor, projected: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """The gradient at the cost, from ``g`` at what `forward` gave for it; linear in ``g`` and in ``scale``.

        Few passes over the instance, and one tensor of its size: it is not differentiable itself.
        """
        if projected is None or scale is None:
            out = self._masked(g)
        else:
            out = g * projected
            along = out.sum(self.dims, keepdim=True)
            out = self._masked(torch.addcmul(g, along, projected, value=-1, out=out).mul_(scale))
        return out if self.normal is None else self._flatten(out)

    def _flatten(self, cost: Tensor) -> Tensor:
        """Without its part along the normal, ``cost - <a, cost> / |a|^2 a``."""
        assert self.normal is not None, "there is a normal to take out"
        if self.level:
            return cost - cost.mean(self.dims, keepdim=True)
        normal = self.normal.to(cost)
        normal = self._masked(normal.broadcast_to(cost.shape[cost.ndim - len(self.dims) :]))
        largest = normal.abs().amax()
        if largest == 0:
            raise ValueError("normal: got the zero vector (within the mask), wanted the normal of a hyperplane")
        normal = normal / largest  # its length says nothing, and its square might overflow or vanish
        return cost.addcmul((cost * normal).sum(self.dims, keepdim=True) / normal.square().sum(), normal, value=-1)

    def _largest(self, cost: Tensor) -> Tensor:
        return cost.abs().amax(self.dims, keepdim=True)

    def _masked(self, cost: Tensor) -> Tensor:
        return cost if self.mask is None else torch.where(self.mask.to(cost.device), cost, 0.0)


def projection_for(projection: Projection, solver: Solver, instance: tuple[int, ...]) -> Projector:
    """What a strategy does to costs ``(B, *instance)`` before the solver sees them.

    Raises:
        ValueError: for a projection that would change the solver's solutions, with the reason.
    """
    normal, unit = _parts(projection, solver, instance)
    mask = mask_of(solver, instance)
    reason = _invalid(normal, unit, solver, instance, mask)
    if reason:
        raise ValueError(f"projection: got {projection!r} for {solver}, which it does not allow: {reason}")
    return Projector(normal, unit, len(instance), mask)


def mask_of(solver: Solver, instance: tuple[int, ...]) -> Tensor | None:
    """The mask that a solver declares for instances of this shape.

    Raises:
        ValueError: for one that is not bool, or does not fit.
    """
    declared = solver.mask_for(instance)
    if declared is None:
        return None
    name = f"mask: that of {solver}"
    return _fit(name, _bool(name, declared), instance)


def check_projection(projection: Projection) -> Projection:
    """Raise ValueError for what is no projection at all."""
    if isinstance(projection, Plane):
        _normal("projection", projection.normal)
        return projection
    if isinstance(projection, str) and projection in ("auto", "none", "mean", "norm", "std"):
        return projection
    raise ValueError(f"projection: got {projection!r}, wanted 'auto', 'none', 'mean', 'norm', 'std' or Plane(normal)")


def _parts(projection: Projection, solver: Solver, instance: tuple[int, ...]) -> tuple[Tensor | None, bool]:
    """The normal that is taken out (None: none), and whether the norm is."""
    if isinstance(projection, Plane):
        return _fit("projection", _normal("projection", projection.normal), instance), False
    if projection == "auto":  # all that the declaration allows
        return (None if solver.nonnegative else _hyperplane(solver, instance)), solver.scale_free
    return (ONES if projection in ("mean", "std") else None), projection in ("norm", "std")


def _hyperplane(solver: Solver, instance: tuple[int, ...]) -> Tensor | None:
    if solver.hyperplane is None:
        return None
    if isinstance(solver.hyperplane, (int, float)) and isfinite(solver.hyperplane):
        return torch.tensor(solver.hyperplane, dtype=torch.float64)  # at every step: without the checks of arrays
    name = f"hyperplane: that of {solver}"
    return _fit(name, _normal(name, solver.hyperplane).double(), instance)


def _normal(name: str, given: Any) -> Tensor:
    """A normal from a tensor, an array or a number; no gradient goes to it."""
    try:
        normal = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: got {given!r} as a normal, wanted a tensor, an array or a number") from None
    if not normal.isfinite().all():
        raise ValueError(f"{name}: got a normal with NaN or infinite entries, wanted the normal of a hyperplane")
    return normal


def _bool(name: str, given: Any) -> Tensor:
    mask = torch.as_tensor(given)
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: got {mask.dtype}, wanted torch.bool, True for the entries that count; give mask != 0")
    return mask


def _fit(name: str, tensor: Tensor, instance: tuple[int, ...]) -> Tensor:
    """The tensor, where it broadcasts to an instance."""
    pairs = zip(reversed(tensor.shape), reversed(instance))
    if tensor.ndim > len(instance) or not all(size in (1, wanted) for size, wanted in pairs):
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, wanted {instance}, the shape of an instance, or one that broadcasts "
            "to it"
        )
    return tensor


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
    wanted = _hyperplane(solver, instance)
    if wanted is None and isinstance(solver, FunctionSolver) and normal.ndim > 0:
        return None  # a normal given by the caller is a declaration
    if wanted is None:
        return (
            "it declares no hyperplane (the sum over a structure's entries is not the same for all structures, or nobody "
            "said so); choose 'norm', or declare it: FunctionSolver(fn, hyperplane=1.0)"
        )
    wanted, given = (n.to("cpu", torch.float64).broadcast_to(instance) for n in (wanted, normal))
    if mask is not None:
        wanted, given = wanted * mask, given * mask
    lengths = wanted.square().sum() * given.square().sum()
    parallel = ((wanted * given).sum().square() - lengths).abs() <= 1e-9 * lengths
    return None if parallel else "its hyperplane has another normal; choose projection='auto'"


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, projector: Projector) -> Tensor:
        projected, scale = projector.forward(cost)
        ctx.projector = projector
        ctx.save_for_backward(*(() if scale is None else (projected, scale)))
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.projector.pull_back(g, *ctx.saved_tensors), None
