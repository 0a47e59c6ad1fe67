r"""k-subsets as solutions: the top k of noisy logits, with any gradient that `distset.solve` has.

A sample is :math:`z = \arg\max_z \langle \theta + \epsilon, z\rangle`; what comes back through it is a strategy of `solve`:
`Identity` with its projections, `Blackbox`, or none of them exact. As an estimator it stands behind the same call as all
others, ``expect(f, KSubset(logits, k), S, grad=PerturbAndMap(...))``.

A projection is over the elements that can be chosen: padding, whose logit is -inf, has no part in a row's mean or norm.

References:
    Papandreou, Yuille 2011, "Perturb-and-MAP Random Fields".
    Sahoo et al. 2023, "Backpropagation through Combinatorial Algorithms: Identity with Projection Works",
    https://arxiv.org/abs/2205.15213 (section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distset.expect.estimator import Estimator, Function
from distset.expect.rivals import plain_logits
from distset.noise import Noise, SumOfGamma, check_noise
from distset.seeds import generator_for, seed_for
from distset.solve import Identity, Strategy, check_strategy, solve
from distset.solvers.topk import TopK
from distset.subsets import KSubset
from distset.subsets.distribution import settle

__all__ = ["PerturbAndMap"]


class PerturbAndMap(Estimator):
    """Samples by noise and a top-k solver, their gradient by a strategy of `solve`.

    Elements whose fate is settled (by infinite logits, by a k of 0 or of all) are set aside: they have no gradient, and rows
    that are left with equally many elements and an equal k are solved together. A row gets what it would get without its
    settled elements.

    Args:
        strategy: `Identity()` unless given. One with noise of its own (`IMLE`) is better taken from `distset.expect`.
        noise: `SumOfGamma(k)` unless given, as published; k as far as it is not settled.

    Raises:
        ValueError: for a strategy that is none, for something else than noise.

    Example:
        >>> import torch
        >>> from distset.expect import expect
        >>> from distset.perturb_and_map import PerturbAndMap
        >>> from distset.solve import Identity
        >>> from distset.subsets import KSubset
        >>> logits, cost = torch.zeros(4, requires_grad=True), torch.tensor([4.0, 1.0, 2.0, 1.0])
        >>> grad = PerturbAndMap(Identity("mean"))
        >>> expect(lambda z: z @ cost, KSubset(logits, k=2), 8, grad=grad, seed=0).backward()
        >>> logits.grad
        tensor([ 2., -1.,  0., -1.])
    """

    exact_samples, unbiased, needs_differentiable_f = False, False, True

    def __init__(self, strategy: Strategy | None = None, *, noise: Noise | None = None) -> None:
        self.strategy = Identity() if strategy is None else check_strategy("strategy", strategy)
        self.noise = None if noise is None else check_noise("noise", noise)

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        logits = plain_logits(subset)
        free, included, left = settle(logits.reshape(-1, subset.n), subset.k.reshape(-1).double())
        generator = None if seed is None else generator_for(seed, "perturb")
        flat = logits.flatten()
        places, chosen = [flat.new_empty(0, dtype=torch.long)], [flat.new_empty(num_samples, 0)]
        for k, place in _kinds(free, left):
            noise = SumOfGamma(k) if self.noise is None else self.noise
            drawn = noise.sample((num_samples, *place.shape), generator, logits.dtype).to(logits.device)
            keys = flat.index_select(0, place.flatten()).view(place.shape) + drawn
            own = None if seed is None else seed_for(seed, "strategy", *place.shape, k)
            places.append(place.flatten())
            chosen.append(solve(keys, TopK(k), grad=self.strategy, seed=own).flatten(1))
        settled = included.to(logits).flatten().expand(num_samples, -1)
        z = settled.index_copy(1, torch.cat(places), torch.cat(chosen, 1))
        return f.differentiable(z.view(num_samples, *logits.shape)).mean(0)

    def __repr__(self) -> str:
        return f"PerturbAndMap({self.strategy!r})"


def _kinds(free: Tensor, left: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Rows of ``free (B, n)`` with as many free elements and as many to choose, ``left (B,)``, together.

    Yields k and the places ``(R, m)`` of the rows' free elements in the flattened ``free``.
    """
    counts = free.sum(-1)
    for m, k in torch.stack([counts, left.long()], -1).unique(dim=0).tolist():
        if m:
            rows = (counts == m) & (left == k)
            yield k, (free & rows.unsqueeze(-1)).flatten().nonzero().view(-1, m)
