r"""Rank-based losses through the ranking solver: recall and average precision themselves, not a surrogate of them.

Ranks :math:`rk(i)` of scores come from `solve(scores, Ranking(), grad=...)`, 1 for the highest. For a relevant element i,
:math:`rk_+(i)` is its rank among the relevant ones alone, so that :math:`rk(i) - rk_+(i)` others are ranked above it.

The gradient goes through :math:`rk` only. Through :math:`rk_+` as well, `Identity` would send each relevant score the same
gradient twice with opposite signs: they cancel, and nothing is learnt.

References:
    Rolínek, Musil, Paulus, Vlastelica, Michaelis, Martius 2020, "Optimizing Rank-Based Metrics with Blackbox
    Differentiation", https://arxiv.org/abs/1912.03500 (average precision eq. 6, recall loss eq. 12, margin section 4.3).
    Sahoo et al. 2023, https://arxiv.org/abs/2205.15213 (eq. 20).
"""

from __future__ import annotations

from math import isfinite
from numbers import Integral

import torch
from torch import Tensor

from distset.solve import Strategy, solve
from distset.solvers.ranking import Ranking

__all__ = ["average_precision_loss", "recall_at", "recall_at_loss", "recall_loss"]


def recall_loss(scores: Tensor, relevant: Tensor, *, grad: Strategy | None = None, margin: float = 0.0) -> Tensor:
    r"""The recall loss: recall at every k, the small ones weighing most.

    .. math:: \frac{1}{|rel|} \sum_{i \in rel} \log\bigl(1 + \log(1 + rk(i) - rk_+(i))\bigr)

    averaged over the queries that have something relevant; 0 where everything relevant is ranked first.

    Args:
        scores: ``(*, N)``, of the elements for each query, the query itself left out.
        relevant: bool ``(*, N)``.
        grad: `Identity()` (default; its projection matters: without it training degrades), `Blackbox(lam)`.
        margin: relevant scores are lowered and the others raised by half of it.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that differ, ``relevant`` that is not bool, not one relevant element; scores or a margin that
            are not finite.

    Example:
        >>> import torch
        >>> from distset.losses import recall_loss
        >>> scores = torch.tensor([[0.9, 0.5, 0.1]], requires_grad=True)
        >>> recall_loss(scores, torch.tensor([[False, True, False]]))
        tensor(0.5266, grad_fn=<...>)
    """
    ranks, above = _ranks(scores, relevant, grad, margin)
    ahead = torch.where(relevant, ranks - above, 0.0)
    return _mean(torch.log1p(torch.log1p(ahead)), relevant)


def recall_at_loss(scores: Tensor, relevant: Tensor, k: int, *, grad: Strategy | None = None, margin: float = 0.0) -> Tensor:
    r"""One minus recall@k: the share of queries that have nothing relevant among their first ``k``.

    .. math:: \min\bigl(1, \max(0, \min_{i \in rel} rk(i) - k)\bigr)

    averaged over the queries that have something relevant. Ranks are whole numbers, so that this is 0 or 1 for each. The
    gradient passes straight through the outer minimum, which would leave a query that misses by more than one place without
    any. It lifts the best of the relevant where a query misses and is 0 where it does not, sparse therefore: to train on
    recall at every k there is `recall_loss`.

    Args:
        scores, relevant, grad, margin: as in `recall_loss`.
        k: from 1 to N.

    Returns:
        A scalar.

    Raises:
        ValueError: as in `recall_loss`, and for k out of range.

    Example:
        >>> import torch
        >>> from distset.losses import recall_at_loss
        >>> from distset.solve import Identity
        >>> scores = torch.tensor([[0.9, 0.5, 0.1], [0.3, 0.2, 0.7]], requires_grad=True)
        >>> relevant = torch.tensor([[False, False, True], [False, False, True]])
        >>> loss = recall_at_loss(scores, relevant, k=1, grad=Identity("none"))
        >>> loss
        tensor(0.5000, grad_fn=<...>)
        >>> loss.backward()
        >>> scores.grad[:, 2]
        tensor([-0.5000, -0.0000])
    """
    ranks, _ = _ranks(scores, relevant, grad, margin)
    _check_k(scores, k)
    best = ranks.masked_fill(~relevant, torch.inf).amin(-1)[relevant.any(-1)]
    surplus = (best - k).relu()
    return (surplus + (surplus.clamp_max(1) - surplus).detach()).mean()


def average_precision_loss(scores: Tensor, relevant: Tensor, *, grad: Strategy | None = None, margin: float = 0.0) -> Tensor:
    r"""One minus the mean average precision, :math:`1 - \frac{1}{|rel|} \sum_{i \in rel} rk_+(i) / rk(i)`.

    Arguments, result and errors as in `recall_loss`.

    Example:
        >>> import torch
        >>> from distset.losses import average_precision_loss
        >>> average_precision_loss(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([True, False, True]))
        tensor(0.1667)
    """
    ranks, above = _ranks(scores, relevant, grad, margin)
    return 1 - _mean(above / ranks, relevant)


def recall_at(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Recall@k as retrieval counts it: the share of queries with something relevant among their first ``k``.

    Args:
        scores, relevant: as in `recall_loss`, but scores may be infinite; queries without anything relevant count as missed.
        k: from 1 to N.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that differ, ``relevant`` that is not bool, no query, scores that are NaN, k out of range.

    Example:
        >>> import torch
        >>> from distset.losses import recall_at
        >>> recall_at(torch.tensor([[0.9, 0.5], [0.2, 0.3]]), torch.tensor([[False, True], [False, True]]), k=1)
        tensor(0.5000)
    """
    _check(scores, relevant)
    _check_k(scores, k)
    if scores.numel() == 0:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, wanted at least one query; leave empty batches out")
    if scores.isnan().any():
        raise ValueError("scores: got NaN entries, wanted numbers; look for NaN in what the scores are made of")
    first = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return relevant.gather(-1, first).any(-1).to(torch.get_default_dtype()).mean()


def _ranks(scores: Tensor, relevant: Tensor, grad: Strategy | None, margin: float) -> tuple[Tensor, Tensor]:
    """Ranks among all, differentiable, and among the relevant, not."""
    _check(scores, relevant)
    if not relevant.any():
        raise ValueError("relevant: got not one relevant element, wanted at least one for some query")
    if not scores.isfinite().all():
        raise ValueError(
            "scores: got NaN or infinite entries, wanted finite ones; look for them in what the scores are made of"
        )
    if not isfinite(margin):
        raise ValueError(f"margin: got {margin}, wanted a finite number, in units of the scores")
    moved = scores + margin * (0.5 - relevant.to(scores.dtype))
    ranks = solve(moved, Ranking(), grad=grad)
    # From the ranks, not from the scores: a projection's rounding may have broken a near tie the other way.
    order = ranks.detach().argsort(dim=-1)
    counted = relevant.gather(-1, order).cumsum(-1)
    above = torch.empty_like(counted).scatter_(-1, order, counted)
    return ranks, above.to(ranks.dtype)


def _mean(values: Tensor, relevant: Tensor) -> Tensor:
    """Over the relevant elements of each query, then over the queries that have any."""
    counts = relevant.sum(-1)
    of_query = torch.where(relevant, values, 0.0).sum(-1) / counts.clamp_min(1)
    return of_query.sum() / (counts > 0).sum()


def _check(scores: Tensor, relevant: Tensor) -> None:
    if scores.ndim == 0:
        raise ValueError("scores: got a single number, wanted (*, N), N scores for each query")
    if relevant.dtype != torch.bool:
        raise ValueError(f"relevant: got {relevant.dtype}, wanted torch.bool")
    if scores.shape != relevant.shape:
        raise ValueError(f"relevant: got shape {tuple(relevant.shape)}, wanted {tuple(scores.shape)}, that of the scores")


def _check_k(scores: Tensor, k: int) -> None:
    if not isinstance(k, Integral) or not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k: got {k}, wanted a whole number from 1 to {scores.shape[-1]}, the number of scores")
