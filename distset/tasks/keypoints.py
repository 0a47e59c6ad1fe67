"""Keypoint matching: which point of one cloud is which of the other.

A point is described by the distances to the others of its cloud, which turning and moving the cloud leaves as they are; a
small set network turns them (and the point's own features, where it has any) into a descriptor, and a linear assignment
matches the descriptors. Outliers of the larger cloud stay unmatched. `distset.tasks.graph_matching` matches pairs as well.

References:
    Rolínek et al. 2020, "Deep Graph Matching via Blackbox Differentiation of Combinatorial Solvers",
    https://arxiv.org/abs/2003.11657. Sahoo et al. 2023, https://arxiv.org/abs/2205.15213.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distset.collapse import CollapseAlarm
from distset.sets import ChunkedSet
from distset.solve import Identity, Strategy, solve
from distset.solvers.assignment import Assignment
from distset.tasks.fading import FadingMargin
from distset.train import Example, Parts

__all__ = ["Descriptors", "MatchingTask", "matching_task"]


class Descriptors(nn.Module):
    """Points ``(*, N, 2 + F)`` to descriptors ``(*, N, D)``: a DeepSets over a point's distances, and its features."""

    def __init__(self, features: int = 0, dim: int = 32, width: int = 64) -> None:
        super().__init__()
        self.near = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(width + features, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, points: Tensor) -> Tensor:
        others = 1 - torch.eye(points.shape[-2], device=points.device, dtype=points.dtype)
        near = (self.near(bumps(points)) * others.unsqueeze(-1)).mean(-2)
        return self.head(torch.cat([near, points[..., 2:]], -1))


def bumps(points: Tensor) -> Tensor:
    """How far apart points ``(*, N, 2 + F)`` are, as 16 smooth indicators of distances from 0 to 2, ``(*, N, N, 16)``."""
    places = points[..., :2]
    distance = (places.unsqueeze(-2) - places.unsqueeze(-3)).square().sum(-1).clamp_min(1e-12).sqrt()
    centres = torch.linspace(0, 2, 16, device=points.device, dtype=points.dtype)
    return torch.exp(-(((distance.unsqueeze(-1) - centres) / 0.15) ** 2))


class MatchingTask(FadingMargin):
    """Loss, prediction and metrics of keypoint matching.

    An example is both clouds as one set of ``n + m`` points ``(*, n + m, 2 + F)``, the first n of the smaller, with the
    true match ``(*, n, m)``.

    Args:
        model: points to descriptors.
        n: points of the smaller cloud.
        grad: the strategy of `solve`.
        at_once: pairs matched together.
    """

    cost_ndim = 2

    def __init__(self, model: nn.Module, n: int, grad: Strategy, *, at_once: int = 32) -> None:
        self.model, self.n, self.grad, self.at_once, self.solver = model, n, grad, at_once, Assignment()
        self.alarm = model.alarm = CollapseAlarm(ndim=self.cost_ndim)  # within the model: checkpoints keep its state

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """Wrong matches of a pair, on average over a batch of them."""
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """Wrong matches a pair: entries of the matching that differ, halved; the alarm rings where the costs collapse."""
        costs = torch.cat([self._costs(example.set) for example in examples])
        self.alarm(costs)
        truth = torch.cat([example.target for example in examples]).to(costs.device)
        found = solve(costs, self.solver, grad=self.grad, truth=truth, seed=seed)
        return (found * (1 - truth) + (1 - found) * truth).sum((1, 2)).mean() / 2

    def predict(self, set: ChunkedSet) -> Tensor:
        """The matching and the costs it was found by, ``(2, B, n, m)``."""
        costs = self._costs(set)
        return torch.stack([solve(costs, self.solver, grad=self.grad, seed=0), costs])

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """The share of points matched rightly, the wrong matches a pair, and the alarm's figures."""
        (found, costs), truth = torch.cat(list(outputs), 1), torch.cat(list(targets))
        found = self._of_points(found, truth.shape[-1])
        return {
            "accuracy": ((found * truth).sum((1, 2)) / truth.sum((1, 2))).mean().item(),
            "loss": ((found - truth).abs().sum((1, 2)) / 2).mean().item(),
            **self.alarm.figures(costs),
        }

    def draw(self, folder: Path, parts: Parts) -> None:
        """Test pairs with the matches found: right ones blue, wrong ones red."""
        from distset.report.structures import plot_matches

        example = parts.test[0]
        with torch.no_grad():
            found = self._of_points(self.predict(example.set)[0], example.target.shape[-1])
        points = points_of(example.set)[:6, :, :2]
        plot_matches(points[:, : self.n], points[:, self.n :], example.target[:6], found[:6].cpu(), folder / "matches.png")

    def _of_points(self, found: Tensor, m: int) -> Tensor:
        """The matches ``(B, n, m)`` of points within what was found."""
        return found

    def _costs(self, set: ChunkedSet) -> Tensor:
        """Squared distances ``(B, n, m)`` of descriptors."""
        points = points_of(set).to(next(self.model.parameters()).device)
        first, second = self.model(points[:, : self.n]), self.model(points[:, self.n :])
        return squared_distances(first, second)


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Of descriptors ``(B, n, D)`` and ``(B, m, D)``, ``(B, n, m)``."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square()


def matching_task(
    *, n: int, features: int = 0, grad: Strategy | None = None, dim: int = 32, width: int = 64
) -> MatchingTask:
    """A task for clouds of which the smaller has ``n`` points; ``grad`` is `Identity()` if None."""
    return MatchingTask(Descriptors(features, dim, width), n, grad or Identity())


def points_of(set: ChunkedSet) -> Tensor:
    """Both clouds of each pair, ``(B, n + m, 2 + F)``."""
    points = set.whole().elements
    return points if set.batch_shape else points.unsqueeze(0)
