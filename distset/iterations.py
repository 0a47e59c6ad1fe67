"""How a fixed-point iteration goes on from ``x`` and ``step(x)``: plainly, damped, or by Anderson's combination.

References:
    Walker, Ni: Anderson Acceleration for Fixed-Point Iterations. SIAM J. Numer. Anal. 49 (2011).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Anderson", "Damped", "Iteration", "Plain"]


class Iteration(Protocol):
    """How the next point follows from ``x`` and ``step(x)``; ``start`` gives a function with a memory of its own.

    It sees one dimension of unknowns, ``(*, N)``.
    """

    def start(self) -> Callable[[Tensor, Tensor], Tensor]: ...


class Plain:
    """The next point is ``step(x)``."""

    def start(self) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, fx: fx

    def __repr__(self) -> str:
        return "Plain()"


class Damped:
    """The next point is ``x + rate * (step(x) - x)``, which calms a map that overshoots into a cycle.

    Raises:
        ValueError: for a rate outside (0, 1].
    """

    def __init__(self, rate: float = 0.3) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate: got {rate}, wanted a share of the step in (0, 1]; 1 is Plain()")
        self.rate = rate

    def start(self) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, fx: torch.lerp(x, fx, self.rate)

    def __repr__(self) -> str:
        return f"Damped({self.rate})"


class Anderson:
    """Anderson acceleration: the combination of the last ``memory`` steps that would have the least residual, per set.

    Args:
        memory: differences kept; ``2 * memory`` copies of x.
        rate: the share of the step that is taken from the combination.
        ridge: relative regularisation of the least squares.
    """

    def __init__(self, memory: int = 5, rate: float = 1.0, ridge: float = 1e-10) -> None:
        if memory < 1:
            raise ValueError(f"memory: got {memory}, wanted at least 1 past step; without any it is Plain()")
        self.memory, self.rate, self.ridge = memory, rate, ridge

    def start(self) -> Callable[[Tensor, Tensor], Tensor]:
        points: list[Tensor] = []
        changes: list[Tensor] = []

        def advance(x: Tensor, fx: Tensor) -> Tensor:
            points.append(x)
            changes.append(fx - x)
            del points[: -self.memory - 1], changes[: -self.memory - 1]
            return self._combine(torch.stack(points, -2), torch.stack(changes, -2))

        return advance

    def _combine(self, x_KN: Tensor, r_KN: Tensor) -> Tensor:
        latest = x_KN[..., -1, :] + self.rate * r_KN[..., -1, :]
        if x_KN.shape[-2] == 1:
            return latest
        dx_KN, dr_KN = x_KN.diff(dim=-2), r_KN.diff(dim=-2)
        gram = dr_KN @ dr_KN.mT
        scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        tiny = torch.finfo(gram.dtype).tiny
        ridge = max(self.ridge, torch.finfo(gram.dtype).eps)
        weights = torch.linalg.solve(gram / (scale + tiny) + ridge * eye, dr_KN @ r_KN[..., -1, :, None] / (scale + tiny))
        return latest - (weights * (dx_KN + self.rate * dr_KN)).sum(-2)

    def __repr__(self) -> str:
        return f"Anderson({self.memory}, rate={self.rate})"
