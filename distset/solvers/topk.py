"""The k largest scores, as a 0/1 vector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distset.solvers.base import TensorSolver

__all__ = ["TopK"]


class TopK(TensorSolver):
    r"""The best ``k`` of ``n``: :math:`\arg\max \{\langle w, y\rangle : y \in \{0, 1\}^n, \sum_i y_i = k\}`.

    Exact, O(n log n) an instance, on any device. Among equal scores the lower index wins.

    Args:
        k: ones in a solution.

    Raises:
        ValueError: for ``k`` that is no whole number of at least 1; at use, for ``k`` larger than the instance.

    Example:
        >>> import numpy as np
        >>> from distset.solvers import TopK
        >>> TopK(2).solve(np.array([[0.1, 3.0, -1.0, 2.0]]))
        array([[0., 1., 0., 1.]])
    """

    sense = "max"
    hyperplane = 1.0

    def __init__(self, k: int) -> None:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k: got {k!r}, wanted a whole number (int) of at least 1")
        self.k = k

    def check_shape(self, instance: tuple[int, ...]) -> None:
        if len(instance) != 1 or instance[0] < self.k:
            raise ValueError(f"cost: got instances of shape {instance}, wanted (n,) with n of at least k = {self.k}")

    def solve_tensor(self, costs: Tensor) -> Tensor:
        order = costs.sort(dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(costs).scatter_(-1, order[..., : self.k], 1.0)

    def feasible(self, solutions: np.ndarray) -> np.ndarray:
        return self.feasible_tensor(torch.from_numpy(solutions)).numpy()

    def feasible_tensor(self, solutions: Tensor) -> Tensor:
        apart = (solutions * (1 - solutions)).abs().sum(-1)  # from 0 and 1; torch is quicker at sums than at all()
        return (apart == 0) & (solutions.sum(-1) == self.k)

    def __repr__(self) -> str:
        return f"TopK({self.k})"
