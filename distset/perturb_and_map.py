r"""k-subsets as solutions: the top k of noisy logits, with any gradient that `distset.solve` has.

A sample is :math:`z = \arg\max_z \langle \theta + \epsilon, z\rangle`; what comes back through it is a strategy of `solve`:
`Identity` with its projections, `Blackbox`, or none of them exact. As an estimator it stands behind the same call as all
others, ``expect(f, KSubset(logits, k), S, grad=PerturbAndMap(...))``.

References:
    Papandreou, Yuille 2011, "Perturb-and-MAP Random Fields".
    Sahoo et al. 2023, "Backpropagation through Combinatorial Algorithms: Identity with Projection Works",
    https://arxiv.org/abs/2205.15213 (section 4.1).
"""

from __future__ import annotations

from torch import Tensor

from distset.expect.estimator import Estimator, Function
from distset.expect.rivals import one_k, plain_logits
from distset.noise import Noise, SumOfGamma
from distset.seeds import generator_for
from distset.solve import Identity, Strategy, solve
from distset.solvers.topk import TopK
from distset.subsets import KSubset

__all__ = ["PerturbAndMap"]


class PerturbAndMap(Estimator):
    """Samples by noise and a top-k solver, their gradient by a strategy of `solve`.

    Args:
        strategy: `Identity()` unless given. One with noise of its own (`IMLE`) is better taken from `distset.expect`.
        noise: `SumOfGamma(k)` unless given, as published.

    Raises:
        ValueError: at use, for a k that differs between rows, or logits that are not finite.
    """

    exact_samples, unbiased, needs_differentiable_f = False, False, True

    def __init__(self, strategy: Strategy | None = None, *, noise: Noise | None = None) -> None:
        self.strategy = Identity() if strategy is None else strategy
        self.noise = noise

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        logits, k = plain_logits(subset), one_k(subset)
        noise = SumOfGamma(k) if self.noise is None else self.noise
        generator = None if seed is None else generator_for(seed, "perturb")
        drawn = noise.sample((num_samples, *logits.shape), generator, logits.dtype).to(logits.device)
        z = solve(logits + drawn, TopK(k), grad=self.strategy, seed=seed)
        return f.differentiable(z).mean(0)

    def __repr__(self) -> str:
        return f"PerturbAndMap({self.strategy!r})"
