r"""Gumbel top-k: the approximation to k-subset sampling that most published code uses, and its relaxation.

The k largest of ``logits + Gumbel`` noise are k draws *without replacement, one after another* (Plackett-Luce): not the
distribution `KSubset` has, except for k = 1, k = n - 1 where all logits are equal, or k in {0, n}.

References:
    Xie, Ermon 2019, "Reparameterizable Subset Sampling via Continuous Relaxations", https://arxiv.org/abs/1901.10517.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distset.noise import Gumbel
from distset.subsets.distribution import check_k, check_subset

__all__ = ["gumbel_top_k", "relaxed_top_k"]


def gumbel_top_k(logits: Tensor, k: int, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
    """Zeros and ones ``(*sample_shape, *, n)`` from the Plackett-Luce distribution of ``logits (*, n)``.

    An approximation to ``KSubset(logits, k).sample()``: cheap, and biased.

    Raises:
        ValueError: as `KSubset`.

    Example:
        >>> import torch
        >>> from distset.subsets import gumbel_top_k
        >>> z = gumbel_top_k(torch.tensor([0.0, 9.0, -torch.inf, 0.0]), 2, (1000,))
        >>> z.sum(-1).unique(), z[:, 2].sum()
        (tensor([2.]), tensor(0.))
    """
    check_subset(logits, k)
    return top_k(perturbed(logits, sample_shape, generator), k)


def top_k(keys: Tensor, k: int | Tensor) -> Tensor:
    """Ones at the k largest entries of ``keys (*, n)``; k for all rows, or for each ``(*)``."""
    counts = check_k(k, keys.shape[-1], keys.shape[:-1]).to(keys.device)
    if counts.dim() == 0:
        return torch.zeros_like(keys).scatter(-1, keys.topk(int(counts), sorted=False).indices, 1.0)
    order = keys.argsort(dim=-1, descending=True)
    first = torch.arange(keys.shape[-1], device=keys.device) < counts.unsqueeze(-1)
    return torch.zeros_like(keys).scatter(-1, order, first.to(keys.dtype).expand_as(keys))


def perturbed(logits: Tensor, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
    """``logits`` plus standard Gumbel noise, ``(*sample_shape, *, n)``."""
    shape = (*sample_shape, *logits.shape)
    return logits + Gumbel().sample(shape, generator, logits.dtype, logits.device)


def relaxed_top_k(keys: Tensor, k: int | Tensor, tau: float) -> Tensor:
    r"""Shares that add up to k and tend to the k largest ``keys (*, n)`` as tau goes to 0 [eq. 4 to 6].

    k is for all rows, or for each ``(*)``.
    k successive softmaxes :math:`a^{j} = \mathrm{softmax}(\alpha^{j} / \tau)`, each element's share taken out before the
    next: :math:`\alpha^{j+1} = \alpha^{j} + \log(1 - a^{j})`. The logarithm is of the sum of the other shares: no epsilon.
    No sum is negative, but one may exceed 1. A key of ``+inf`` is in, and the softmaxes are of what is left; one of ``-inf``
    has no share.

    Raises:
        ValueError: for NaN keys; for k outside of 0..n, below the number of keys that are ``+inf`` or above the number of
            those that are not ``-inf``; for a temperature that is not positive.

    Example:
        >>> import torch
        >>> from distset.subsets import relaxed_top_k
        >>> keys = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> relaxed_top_k(keys, 2, tau=1.0)
        tensor([1.0843, 0.5841, 0.2399, 0.0917])
        >>> relaxed_top_k(keys, 2, tau=0.05).round(decimals=4)
        tensor([1., 1., 0., 0.])
    """
    if not tau > 0:
        raise ValueError(f"tau: got {tau}, wanted a positive temperature")
    counts = check_k(k, keys.shape[-1], keys.shape[:-1]).to(keys.device).unsqueeze(-1)
    forced = keys == torch.inf
    left = counts - forced.sum(-1, keepdim=True)
    _check_keys(keys, left)
    total = forced.to(keys.dtype)
    steps = int(left.max()) if left.numel() else 0
    keys = keys.masked_fill(forced, -torch.inf)
    for step in range(steps):
        # Rows that are done go on with zeros, where every slope is finite.
        scaled = keys.masked_fill(left <= step, 0.0) / tau
        total = total + scaled.softmax(-1).masked_fill(left <= step, 0.0)
        if step + 1 < steps:
            keys = keys.masked_fill(left <= step + 1, 0.0)
            keys = keys + _log_others(keys / tau)
    return total


def _log_others(scaled: Tensor) -> Tensor:
    """``log(1 - softmax)`` of ``scaled (*, n)``, n > 1, to full precision.

    A share near 1 has lost what the others have: that of the leading element is the logistic function of
    ``-log sum exp`` of the others, less the leader.
    """
    first = scaled.argmax(-1, keepdim=True)
    leads = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, first, True)
    others = (scaled - scaled.gather(-1, first)).masked_fill(leads, -torch.inf).logsumexp(-1, keepdim=True)
    log_share = torch.log_softmax(scaled, -1).masked_fill(leads, -1.0)
    return torch.where(leads, F.logsigmoid(others), torch.log(-torch.expm1(log_share)))


def _check_keys(keys: Tensor, left: Tensor) -> None:
    """Whether ``left (*, 1)`` elements can be chosen from the finite ``keys (*, n)``."""
    if bool(keys.isnan().any()):
        raise ValueError(f"keys: got NaN ({int(keys.isnan().sum())} of {keys.numel()} entries), wanted numbers")
    forced, finite = (keys == torch.inf).sum(-1, keepdim=True), keys.isfinite().sum(-1, keepdim=True)
    if bool((left < 0).any()):
        worst = int(forced.expand_as(left).flatten()[left.argmin()])
        raise ValueError(f"keys: got {worst} of +inf (forced in), wanted at most k = {worst + int(left.min())}")
    if bool((left > finite).any()):
        row = int((left - finite).argmax())
        most = int((forced + finite).expand_as(left).flatten()[row])
        wanted = int((left + forced).flatten()[row])
        raise ValueError(
            f"keys: got {most} of {keys.shape[-1]} that are not -inf (forced out), wanted at least k = {wanted}"
        )
