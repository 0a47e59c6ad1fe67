"""Ranks of scores, as the best permutation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distset.solvers.base import TensorSolver

__all__ = ["Ranking"]


class Ranking(TensorSolver):
    r"""Ranks, 1 for the highest score: :math:`\arg\min \{\langle w, y\rangle : y \text{ a permutation of } 1..n\}`.

    The rearrangement inequality pairs the largest score with the smallest rank, so that ranking is the minimum of a linear
    cost (Rolínek et al. 2020). Exact, O(n log n) an instance, on any device. Among equal scores the lower index ranks first.

    The sum of the ranks is fixed, so that mean and norm can be projected out. Without, `Identity` only ever raises what
    should rank higher, and training degrades.

    References:
        Rolínek, Musil, Paulus, Vlastelica, Michaelis, Martius 2020, "Optimizing Rank-Based Metrics with Blackbox
        Differentiation", https://arxiv.org/abs/1912.03500 (eq. 3).

    Example:
        >>> import numpy as np
        >>> from distset.solvers import Ranking
        >>> Ranking().solve(np.array([[0.1, 3.0, -1.0, 2.0]]))
        array([[3., 1., 4., 2.]])
    """

    sense = "min"
    hyperplane = 1.0

    def check_shape(self, instance: tuple[int, ...]) -> None:
        if len(instance) != 1 or instance[0] < 1:
            raise ValueError(f"cost: got instances of shape {instance}, wanted scores of shape (n,) with n of at least 1")

    def solve_tensor(self, costs: Tensor) -> Tensor:
        order = costs.sort(dim=-1, descending=True, stable=True).indices
        ranks = torch.arange(1, costs.shape[-1] + 1, dtype=costs.dtype, device=costs.device)
        return torch.empty_like(costs).scatter_(-1, order, ranks.expand_as(costs))

    def feasible(self, solutions: np.ndarray) -> np.ndarray:
        return (np.sort(solutions, -1) == np.arange(1, solutions.shape[-1] + 1)).all(-1)
