r"""Keypoint matching by graph matching: points onto points so that pairs fall onto pairs as far apart.

As `distset.tasks.keypoints`, with a cost for every pair of points of one cloud on every pair of the other:

.. math:: \sum_{ij} |d_i - d_j|^2\, v_{ij} + \sum_{ef} |d_e - d_f|^2\, v_{ef}

for descriptors of points and of ordered pairs. The loss counts wrong matches of both.

References:
    Rolínek et al. 2020, "Deep Graph Matching via Blackbox Differentiation of Combinatorial Solvers",
    https://arxiv.org/abs/2003.11657 (its graphs are triangulations; here every pair is an edge).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from distset.sets import ChunkedSet
from distset.solve import Identity, Strategy, solve
from distset.solvers.matching import GraphMatching
from distset.tasks.keypoints import Descriptors, MatchingTask, bumps, points_of, squared_distances
from distset.train import Example

__all__ = ["GraphDescriptors", "GraphMatchingTask", "graph_matching_task"]


class GraphDescriptors(nn.Module):
    """Points ``(*, N, 2 + F)`` to descriptors ``(*, N, D)`` of points and ``(*, N, N, D)`` of ordered pairs."""

    def __init__(self, features: int = 0, dim: int = 32, width: int = 64) -> None:
        super().__init__()
        self.points = Descriptors(features, dim, width)
        self.pairs = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.points(points), self.pairs(bumps(points))


class GraphMatchingTask(MatchingTask):
    """`MatchingTask` with `GraphMatching`, a heuristic, over all pairs of points.

    Args:
        model: points to descriptors of points and of pairs.
        n, grad, at_once: as in `MatchingTask`.
    """

    cost_ndim = 1

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """Wrong matches of points and of pairs, halved; its gradient is 0 where the match is right."""
        costs = torch.cat([self._costs(example.set) for example in examples])
        self.alarm(costs)
        match = torch.cat([example.target for example in examples]).to(costs)
        solver = matcher(*match.shape[1:])
        truth = with_pairs(solver, match)
        found = solve(costs, solver, grad=self.grad, truth=truth, seed=seed)
        return (found - truth).square().sum(1).mean() / 2

    def predict(self, set: ChunkedSet) -> Tensor:
        """The matching and the costs it was found by, ``(2, B, size)``, as `GraphMatching.pack` has them."""
        costs = self._costs(set)
        solver = matcher(self.n, points_of(set).shape[1] - self.n)
        return torch.stack([solve(costs, solver, grad=self.grad, seed=0), costs])

    def _of_points(self, found: Tensor, m: int) -> Tensor:
        return matcher(self.n, m).unpack(found)[0]

    def _costs(self, set: ChunkedSet) -> Tensor:
        """Squared distances of descriptors, of points and of pairs, packed: ``(B, size)``."""
        points = points_of(set).to(next(self.model.parameters()).device)
        first, second = self.model(points[:, : self.n]), self.model(points[:, self.n :])
        solver = matcher(self.n, points.shape[1] - self.n)
        pairs = [each[1][:, edges[:, 0], edges[:, 1]] for each, edges in ((first, solver.first), (second, solver.second))]
        return solver.pack(squared_distances(first[0], second[0]), squared_distances(*pairs))


def graph_matching_task(
    *, n: int, features: int = 0, grad: Strategy | None = None, dim: int = 32, width: int = 64
) -> GraphMatchingTask:
    """A task for clouds of which the smaller has ``n`` points; ``grad`` is `Identity()` if None."""
    return GraphMatchingTask(GraphDescriptors(features, dim, width), n, grad or Identity())


@lru_cache(maxsize=8)
def matcher(n: int, m: int) -> GraphMatching:
    """The solver of two complete graphs."""
    return GraphMatching((n, m))


def with_pairs(solver: GraphMatching, match: Tensor) -> Tensor:
    """The solution ``(B, size)`` in which points match as in ``match (B, n, m)``."""
    (a, to_a), (b, to_b) = solver.first.T, solver.second.T
    return solver.pack(match, match[:, a][:, :, b] * match[:, to_a][:, :, to_b])
