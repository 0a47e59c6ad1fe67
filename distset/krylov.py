"""Batched solvers of ``(I - J^T) u = g`` that meet the Jacobian only through products ``u -> J^T u``.

Each is called as ``solver(vjp, g)`` with ``g`` of shape ``(B, N)``: B independent systems of N unknowns, and a product that
treats them one by one. The caller measures what is left over; see `distset.fixed_point`.

References:
    Saad, Schultz: GMRES: A Generalized Minimal Residual Algorithm ... SIAM J. Sci. Stat. Comput. 7 (1986).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GMRES", "Dense", "Neumann"]

Product = Callable[[Tensor], Tensor]


class Neumann(NamedTuple):
    """The series ``u = sum_k (J^T)^k cotangent``: works where the plain iteration contracts, and only there."""

    tol: float = 1e-6
    max_steps: int = 100

    def __call__(self, vjp: Product, cotangent_BN: Tensor) -> Tensor:
        u, term = cotangent_BN, cotangent_BN
        wanted_B = attainable(self.tol, cotangent_BN.dtype) * cotangent_BN.norm(dim=-1)
        for _ in range(self.max_steps):
            term = vjp(term)
            u = u + term
            norm_B = term.norm(dim=-1)
            if bool(((norm_B <= wanted_B) | ~norm_B.isfinite()).all()):
                break
        return u


class GMRES(NamedTuple):
    """Generalised minimal residual, each set with its own Krylov space; also where the map does not contract.

    Memory: ``max_steps + 1`` copies of x.
    """

    tol: float = 1e-6
    max_steps: int = 30

    def __call__(self, vjp: Product, cotangent_BN: Tensor) -> Tensor:
        norm_B = cotangent_BN.norm(dim=-1)
        tol = attainable(self.tol, cotangent_BN.dtype)
        basis, columns = [cotangent_BN / safe(norm_B).unsqueeze(-1)], []
        u = torch.zeros_like(cotangent_BN)
        for k in range(min(self.max_steps, cotangent_BN.shape[-1])):
            column, new = self._orthogonalise(basis[-1] - vjp(basis[-1]), basis)
            columns.append(column)
            weights, residual_B = self._least_squares(columns, norm_B)
            if k + 1 == min(self.max_steps, cotangent_BN.shape[-1]) or bool((residual_B <= tol * norm_B).all()):
                u = (torch.stack(basis, -1) @ weights).squeeze(-1)
                break
            basis.append(new)
        return u

    @staticmethod
    def _orthogonalise(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The new column of the Hessenberg matrix ``(B, k + 2)`` and the new direction (0 where the space is complete)."""
        v_BKN = torch.stack(basis, 1)
        before = w.norm(dim=-1)
        first = (v_BKN @ w.unsqueeze(-1)).squeeze(-1)
        w = w - (first.unsqueeze(1) @ v_BKN).squeeze(1)
        again = (v_BKN @ w.unsqueeze(-1)).squeeze(-1)  # twice is enough: the first pass loses digits
        w = w - (again.unsqueeze(1) @ v_BKN).squeeze(1)
        norm = w.norm(dim=-1)
        norm = torch.where(norm <= 10 * torch.finfo(w.dtype).eps * before, 0.0, norm)
        new = torch.where(norm.unsqueeze(-1) > 0, w / safe(norm).unsqueeze(-1), 0.0)
        return torch.cat([first + again, norm.unsqueeze(-1)], -1), new

    @staticmethod
    def _least_squares(columns: list[Tensor], norm_B: Tensor) -> tuple[Tensor, Tensor]:
        k = len(columns)
        h = torch.stack([torch.nn.functional.pad(c, (0, k + 1 - c.shape[-1])) for c in columns], -1)
        dead = h.abs().amax(-2) == 0  # a set whose space is complete: its further weights are 0
        h = h + torch.nn.functional.pad(torch.diag_embed(dead.to(h.dtype)), (0, 0, 0, 1))
        rhs = torch.zeros(*h.shape[:-1], 1, dtype=h.dtype, device=h.device)
        rhs[:, 0, 0] = norm_B
        q, r = torch.linalg.qr(h)
        weights = torch.linalg.solve_triangular(r, q.mT @ rhs, upper=True)
        return weights, (h @ weights - rhs).squeeze(-1).norm(dim=-1)


class Dense(NamedTuple):
    """The Jacobian column by column and a direct solve: exact, for a small number of unknowns a set; NaN where singular."""

    def __call__(self, vjp: Product, cotangent_BN: Tensor) -> Tensor:
        size = cotangent_BN.shape[-1]
        eye = torch.eye(size, dtype=cotangent_BN.dtype, device=cotangent_BN.device)
        rows = torch.stack([vjp(eye[i].expand_as(cotangent_BN)) for i in range(size)], -2)  # row i: J^T e_i
        u_BN1, failed_B = torch.linalg.solve_ex(eye - rows.mT, cotangent_BN.unsqueeze(-1))
        return u_BN1.squeeze(-1).masked_fill((failed_B != 0).unsqueeze(-1), torch.nan)


def attainable(tol: float, dtype: torch.dtype) -> float:
    """A relative tolerance, no tighter than the type can hold."""
    return max(tol, 30 * torch.finfo(dtype).eps)


def safe(norm: Tensor) -> Tensor:
    """Norms to divide by: 1 where 0."""
    return torch.where(norm > 0, norm, 1.0)
