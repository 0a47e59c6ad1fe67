"""An alarm for costs that collapse: bare, a network can make its loss small by making all costs equal to 0."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

__all__ = ["CollapseAlarm"]


class CollapseAlarm(nn.Module):
    """Warns once when the norm of the costs falls below a fraction of what it was at first.

    Near 0, solutions are decided by rounding; a margin or a projection keeps costs from there. Call the alarm with the
    costs of every training step; it returns their mean norm. What it remembers are buffers: as a part of the model that
    makes the costs it goes on from a checkpoint as if there had been no break.

    Args:
        fraction: of the first mean norm.
        ndim: dimensions of one instance.

    Example:
        >>> import torch
        >>> from distset.collapse import CollapseAlarm
        >>> model, costs = torch.nn.Linear(2, 3), torch.ones(8, 3)
        >>> model.alarm = CollapseAlarm()
        >>> model.alarm(costs), model.alarm.figures(costs / 2)
        (1.732..., {'cost_norm': 0.866..., 'collapsed': 0.0})
    """

    first: Tensor
    rung: Tensor

    def __init__(self, fraction: float = 0.1, ndim: int = 1) -> None:
        super().__init__()
        self.fraction, self.ndim = fraction, ndim
        self.register_buffer("first", torch.tensor(math.nan))
        self.register_buffer("rung", torch.tensor(False))

    def forward(self, cost: Tensor) -> float:
        norm = self._norm(cost)
        if self.first.isnan():
            self.first.fill_(norm)
        if not self.rung and norm < self.fraction * self.first:
            self.rung.fill_(True)
            warnings.warn(
                f"the mean cost norm fell from {self.first.item():.3g} to {norm:.3g}: the costs collapse; use a projection "
                "(Identity(projection='auto')) or a margin (margin=TwoPoint(width))",
                stacklevel=4,  # the caller of the module
            )
        return norm

    def figures(self, cost: Tensor) -> dict[str, float]:
        """For a task's metrics: ``cost_norm`` of costs ``(*, *instance)``; ``collapsed``, 1 where the alarm has rung."""
        return {"cost_norm": self._norm(cost), "collapsed": float(self.rung)}

    def _norm(self, cost: Tensor) -> float:
        return cost.detach().flatten(-self.ndim).norm(dim=-1).mean().item()
