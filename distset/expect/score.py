r"""`ScoreFunction`: unbiased gradients from exact samples, needing nothing from f.

References:
    Wijk, Vinuesa, Azizpour 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR, section 3,
    https://openreview.net/forum?id=q87GUkdQBm.
    Kool, van Hoof, Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!" (leave-one-out).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distset.expect.baselines import Baseline, Ridge, Samples
from distset.expect.estimator import Estimator, Function, attach_gradient, check_samples
from distset.subsets import KSubset

__all__ = ["ScoreFunction", "score_gradient"]


class ScoreFunction(Estimator):
    r"""The score-function gradient :math:`E[(f(z) - h(z)) (z - \pi)] + \mathrm{Cov}(z)\, b`, with a control variate h.

    Args:
        baseline: `Ridge()` (default), `LeaveOneOut()`, `NoBaseline()`, `Past(n)`; `Tangent()` where f is differentiable.

    Raises:
        ValueError: for a baseline that is none.

    Example:
        >>> import torch
        >>> from distset.expect import LeaveOneOut, ScoreFunction, expect
        >>> from distset.subsets import KSubset
        >>> logits = torch.zeros(4, requires_grad=True)
        >>> chosen_first = lambda z: z.numpy()[:, 0]  # a black box
        >>> expect(chosen_first, KSubset(logits, k=2), 4000, grad=ScoreFunction(LeaveOneOut()), seed=0).backward()
        >>> torch.allclose(logits.grad, torch.tensor([3.0, -1.0, -1.0, -1.0]) / 12, atol=0.02)
        True
    """

    exact_samples, unbiased = True, True

    def __init__(self, baseline: Baseline | None = None) -> None:
        self.baseline = Ridge() if baseline is None else baseline
        if not isinstance(self.baseline, Baseline):
            raise ValueError(f"baseline: got {baseline!r}, wanted a baseline (not its class or name), such as LeaveOneOut()")

    @property
    def needs_differentiable_f(self) -> bool:  # type: ignore[override]
        return self.baseline.needs_differentiable_f

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        why = f"{self.baseline!r} is made from the other samples of the same step; with one there is none (use NoBaseline())"
        check_samples(num_samples, self.baseline.least, why)
        z = subset.sample((num_samples,), seed=seed)
        if not (torch.is_grad_enabled() and subset.logits.requires_grad):
            return f(z).mean(0)
        if self.needs_differentiable_f:
            z.requires_grad_()
            values = f.differentiable(z)
            slopes = f.slopes(values, z)
        else:
            values, slopes = f(z), None
        gradient = score_gradient(values, z, subset, self.baseline, slopes)
        return attach_gradient(values.mean(0), subset.logits, gradient)

    def learned(self) -> nn.ModuleList:
        return nn.ModuleList([self.baseline] if isinstance(self.baseline, nn.Module) else [])

    def __repr__(self) -> str:
        return f"ScoreFunction({self.baseline!r})"


@torch.no_grad()
def score_gradient(values: Tensor, z: Tensor, subset: KSubset, baseline: Baseline, slopes: Tensor | None = None) -> Tensor:
    """The gradient of ``E f`` in the logits, ``(*, n)``, from ``values (S, *)`` at ``z (S, *, n)``, float64.

    Where a value belongs to several subsets, ``values`` lacks dimensions of ``*``: the baseline then sees them as one
    vector, whose covariance is block by block that of the subsets.
    """
    count, rows = len(z), values[0].numel()
    z = z.detach().double()
    # A leave-one-out gradient is a covariance: any centre will do, and the mean of the samples keeps it small.
    centre = subset.inclusion_probabilities().double() if baseline.needs_inclusion else z.mean(0)
    x = (z - centre).reshape(count, rows, -1)
    f = values.detach().double().reshape(count, rows)
    samples = Samples(f, x, None if slopes is None else slopes.detach().double().reshape(x.shape))
    surrogate = baseline.fit(samples)
    residual = f - surrogate.intercept
    gradient = torch.zeros_like(x[0])
    if surrogate.slope is not None:
        assert surrogate.fold is not None, "slopes come with folds"
        share = torch.bincount(surrogate.fold, minlength=len(surrogate.slope)).to(x) / count
        mean_slope = (share.view(-1, 1, 1) * surrogate.slope).sum(0)
        gradient = subset.covariance_product(mean_slope.view(z.shape[1:])).double().reshape(gradient.shape)
        for number, slope in enumerate(surrogate.slope):
            here = surrogate.fold == number
            residual[here] -= torch.linalg.vecdot(x[here], slope)
    gradient = gradient + torch.einsum("sb,sbn->bn", residual, x) / count
    baseline.update(samples)
    return gradient.reshape(z.shape[1:])
