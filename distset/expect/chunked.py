r"""The leave-one-out score function over elements that are spread over chunks: k of n where n fits no one machine.

.. math:: \partial_i \, E f \approx \frac{1}{S - 1} \sum_s (f_s - \bar f) \, z_{si},

which is `ScoreFunction(LeaveOneOut())` term by term: the sample covariance of f with each element's membership. It is zero
for elements in no sample, so at most S k numbers come of it, however many elements there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distset.expect.estimator import Function, check_samples
from distset.subsets import ChunkedKSubset

__all__ = ["SparseEstimate", "expect_chunked"]


class SparseEstimate(NamedTuple):
    """A mean and its gradient.

    Attributes:
        value: the mean of f, a scalar.
        positions: int64 ``(M,)``, the elements in any sample, ascending.
        gradient: float64 ``(M,)``, the estimated derivative of the mean in their logits; that in all others is 0.
    """

    value: Tensor
    positions: Tensor
    gradient: Tensor


def expect_chunked(f: Callable[[Tensor], Any], subset: ChunkedKSubset, num_samples: int, *, seed: int) -> SparseEstimate:
    """The mean of ``f`` over k-subsets of a chunked set, with its unbiased score-function gradient in the logits.

    Args:
        f: the chosen elements' positions ``(S, k)`` to values ``(S,)``; a black box. Where it needs the elements, let it
            ``merge`` a function of chunk and positions, which runs where they are.
        subset: of one set, not of a batch.
        num_samples: S, at least 2.
        seed: names the samples, which are the same for any chunks and any number of workers.

    Raises:
        ValueError: for a batch of sets, fewer than two samples, values of a wrong shape or not finite.

    Example:
        >>> import torch
        >>> from distset import InMemory
        >>> from distset.expect import expect_chunked
        >>> from distset.subsets import ChunkedKSubset, LogitTable
        >>> logits, cost = torch.zeros(100), torch.arange(100.0)
        >>> chunks = InMemory(cost.unsqueeze(-1), chunk_size=30)
        >>> for step in range(60):
        ...     subset = ChunkedKSubset(chunks, k=10, logits=LogitTable(logits))
        ...     estimate = expect_chunked(lambda chosen: cost[chosen].mean(-1), subset, 32, seed=step)
        ...     _ = logits.index_add_(0, estimate.positions, -0.3 * estimate.gradient.float())
        >>> bool(estimate.value < 15)  # from 49.5; the best subset has 4.5
        True
    """
    if subset.batch_shape:
        raise ValueError(f"subset: got one of a batch {tuple(subset.batch_shape)} of sets, wanted that of one set")
    count = check_samples(num_samples, 2, "the baseline of a sample is made from the others")
    chosen = subset.sample_indices((count,), seed=seed)
    values = Function(f)(chosen).detach().double().cpu()
    weights = (values - values.mean()) / (count - 1)
    positions, place = chosen.flatten().unique(return_inverse=True)
    gradient = torch.zeros(len(positions), dtype=torch.float64)
    gradient.index_add_(0, place, weights.repeat_interleave(chosen.shape[-1]))
    return SparseEstimate(values.mean(), positions, gradient)
