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

from distset.noise import Gumbel

__all__ = ["gumbel_top_k", "relaxed_top_k"]


def gumbel_top_k(logits: Tensor, k: int, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
    """Zeros and ones ``(*sample_shape, *, n)`` from the Plackett-Luce distribution of ``logits (*, n)``.

    An approximation to ``KSubset(logits, k).sample()``: cheap, and biased.

    Raises:
        ValueError: for k outside of 0..n.
    """
    keys = perturbed(logits, sample_shape, generator)
    return top_k(keys, k)


def top_k(keys: Tensor, k: int | Tensor) -> Tensor:
    """Ones at the k largest entries of ``keys (*, n)``; k for all rows, or for each ``(*)``."""
    _check_k(k, keys.shape[-1])
    if isinstance(k, int):
        return torch.zeros_like(keys).scatter(-1, keys.topk(k, sorted=False).indices, 1.0)
    order = keys.argsort(dim=-1, descending=True)
    first = torch.arange(keys.shape[-1], device=keys.device) < k.unsqueeze(-1)
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
        ValueError: for k outside of 0..n or below the number of keys that are ``+inf``, a temperature that is not positive.
    """
    _check_k(k, keys.shape[-1])
    if not tau > 0:
        raise ValueError(f"tau: got {tau}, wanted a positive temperature")
    forced = keys == torch.inf
    left = torch.as_tensor(k, device=keys.device).unsqueeze(-1) - forced.sum(-1, keepdim=True)
    if bool((left < 0).any()):
        worst = int(forced.sum(-1, keepdim=True).expand_as(left).flatten()[left.argmin()])
        raise ValueError(f"keys: got {worst} of +inf (forced in), wanted at most k = {worst + int(left.min())}")
    total = forced.to(keys.dtype)
    keys = keys.masked_fill(forced, -torch.inf).masked_fill(left == 0, 0.0)
    for step in range(int(left.max()) if left.numel() else 0):
        log_share = torch.log_softmax(keys / tau, -1)
        total = total + log_share.exp().masked_fill(left <= step, 0.0)
        tiny = torch.finfo(keys.dtype).tiny
        keys = keys + torch.log((-torch.expm1(log_share)).clamp_min(tiny))
    return total


def _check_k(k: int | Tensor, n: int) -> None:
    ks = torch.as_tensor(k)
    if bool(((ks < 0) | (ks > n)).any()):
        raise ValueError(f"k: got {k}, wanted 0 <= k <= n = {n}")
