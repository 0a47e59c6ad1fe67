r"""The other gradients through a k-subset: relaxations, perturbations and straight-through estimators.

All are biased, and all but `GumbelScore` need a differentiable f; what each gives up is said by its attributes.

References:
    Xie, Ermon 2019, "Reparameterizable Subset Sampling via Continuous Relaxations", https://arxiv.org/abs/1901.10517.
    Niepert, Minervini, Franceschi 2021, "Implicit MLE", https://arxiv.org/abs/2106.01798.
    Minervini, Franceschi, Niepert 2023, "Adaptive Perturbation-Based Gradient Estimation", https://arxiv.org/abs/2209.04862.
    Ahmed, Zeng, Niepert, Van den Broeck 2023, "SIMPLE: A Gradient Estimator for k-Subset Sampling",
    https://arxiv.org/abs/2210.01941.
    Wijk, Vinuesa, Azizpour 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR (its published code).
    Pervez, Lippe, Gavves 2023, "Scalable Subset Sampling with Neural Conditional Poisson Networks", ICLR.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distset.expect.estimator import Estimator, Function, attach_gradient
from distset.noise import Noise, SumOfGamma, check_noise
from distset.subsets import KSubset, relaxed_top_k
from distset.subsets.distribution import settle
from distset.subsets.gumbel import perturbed, top_k
from distset.subsets.quadrature import LogitRange, cut, solve_tilt, tilted_moments

__all__ = [
    "IMLE", "NCPSS", "AdaptiveTarget", "FixedTarget", "GumbelScore", "GumbelSoftmax", "Simple", "StraightThrough",
]  # fmt: skip


class GumbelSoftmax(Estimator):
    """Relaxed subset sampling: f is called at relaxed Gumbel top-k samples (GS), or at hard ones with their slope (STGS).

    Args:
        tau: temperature of the relaxation.
        hard: f sees zeros and ones, the gradient is that of the relaxed sample.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    exact_samples, unbiased, needs_differentiable_f = False, False, True

    def __init__(self, tau: float = 0.5, *, hard: bool = False) -> None:
        self.tau, self.hard = _positive("tau", tau), hard

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        k = row_k(subset)
        keys = perturbed(plain_logits(subset), (num_samples,), _generator(subset, seed))
        z = relaxed_top_k(keys, k, self.tau)
        if self.hard:
            z = top_k(keys.detach(), k) + (z - z.detach())
        # Where there is nothing to choose the relaxation would still have a slope.
        z = torch.where(subset.free.any(-1, keepdim=True), z, subset.settled_in.to(z.dtype))
        return f.differentiable(z).mean(0)

    def __repr__(self) -> str:
        return f"GumbelSoftmax(tau={self.tau}, hard={self.hard})"


class GumbelScore(Estimator):
    r"""SFESS with variance reduction as its published code has it: Gumbel top-k samples under the score of `KSubset`.

    .. math:: \hat g = \frac1S \sum_s (f(z_s) - \bar f)\, z_s

    The baseline is the mean of all samples, so that the gradient comes out (S - 1)/S of its size; the samples are not those
    of the distribution whose score is taken. `ScoreFunction(LeaveOneOut())` is the same without either.
    """

    exact_samples, unbiased, needs_differentiable_f = False, False, False

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        z = top_k(perturbed(plain_logits(subset).detach(), (num_samples,), _generator(subset, seed)), row_k(subset))
        values = f(z)
        if not (torch.is_grad_enabled() and subset.logits.requires_grad):
            return values.mean(0)
        centred = (values - values.mean(0)).detach()
        gradient = (centred.reshape(centred.shape + (1,) * (z.dim() - centred.dim())) * z).mean(0)
        return attach_gradient(values.mean(0), subset.logits, gradient)

    def __repr__(self) -> str:
        return "GumbelScore()"


class Simple(Estimator):
    """SIMPLE: exact samples, and the gradient of f pulled back through the exact inclusion probabilities.

    Unbiased where f is affine.

    Example:
        >>> import torch
        >>> from distset.expect import Simple, expect
        >>> from distset.subsets import KSubset
        >>> logits = torch.zeros(4, requires_grad=True)
        >>> expect(lambda z: z[:, 0], KSubset(logits, k=2), 1, grad=Simple(), seed=0).backward()
        >>> 12 * logits.grad
        tensor([ 3., -1., -1., -1.])
    """

    exact_samples, unbiased, needs_differentiable_f = True, False, True

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        pi = subset.inclusion_probabilities()
        z = subset.sample((num_samples,), seed=seed) + (pi - pi.detach())
        return f.differentiable(z).mean(0)

    def __repr__(self) -> str:
        return "Simple()"


class StraightThrough(Estimator):
    """Exact samples, and the gradient of f taken for that of the logits, as if ``dz / dlogits`` were the identity.

    It is 0 for elements whose fate is settled: by infinite logits, by a k of 0 or of all.
    """

    exact_samples, unbiased, needs_differentiable_f = True, False, True

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        logits = plain_logits(subset).masked_fill(~subset.free, 0.0)
        z = _Through.apply(subset.sample((num_samples,), seed=seed), logits)
        return f.differentiable(z).mean(0)

    def __repr__(self) -> str:
        return "StraightThrough()"


class NCPSS(Estimator):
    """Neural conditional Poisson subset sampling: independent elements whose probabilities add up to k.

    f sees subsets of *about* k elements (binary concrete samples made hard, with the gradient of the relaxed ones); the tilt
    that makes the probabilities add up is differentiated. Elements whose fate is settled (by infinite logits, by a k of 0 or
    of all) are set aside.

    Args:
        tau: temperature of the binary concrete relaxation.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    exact_samples, unbiased, needs_differentiable_f = False, False, True

    def __init__(self, tau: float = 0.5) -> None:
        self.tau = _positive("tau", tau)

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        logits = plain_logits(subset)
        free, included, k = settle(logits.reshape(-1, subset.n), subset.k.reshape(-1))
        logits = logits.masked_fill(~free.view_as(logits), -torch.inf)
        logits = logits - cut(logits.detach().double().reshape(free.shape), k).to(logits).view_as(logits[..., :1])
        a = logits + calibrating_tilt(logits, k.view(subset.batch_shape)).unsqueeze(-1)
        u = torch.rand(num_samples, *logits.shape, generator=_generator(subset, seed), device=a.device, dtype=a.dtype)
        relaxed = torch.sigmoid((a + torch.logit(u, eps=1e-7)) / self.tau)
        z = ((relaxed > 0.5) | included.view_as(logits)).to(a.dtype) + (relaxed - relaxed.detach())
        return f.differentiable(z).mean(0)

    def __repr__(self) -> str:
        return f"NCPSS(tau={self.tau})"


class FixedTarget:
    """The target logits ``theta - strength * slope``.

    Raises:
        ValueError: for a strength that is not positive.
    """

    def __init__(self, strength: float = 10.0) -> None:
        self._strength = _positive("strength", strength)

    def strength(self, logits: Tensor, slope: Tensor) -> Tensor:
        """Of the push along ``slope (S, *, n)``."""
        return torch.as_tensor(self._strength, dtype=slope.dtype, device=slope.device)

    def observe(self, gradient: Tensor) -> None:
        """Nothing is learned from the gradients ``(S, *, n)``."""

    def __repr__(self) -> str:
        return f"FixedTarget({self._strength})"


class AdaptiveTarget(nn.Module):
    """The strength grows until a sample's gradient has ``wanted`` non-zero entries on average [Minervini et al. 2023].

    It is relative: ``beta |theta| / |slope|`` (finite logits count), so that it does not depend on the scale of f. As a
    module it is saved with a checkpoint.

    Args:
        wanted: non-zero entries a sample.
        step: by which beta goes up or down.
        momentum: of the running mean of non-zero entries.

    Raises:
        ValueError: for values that are not positive, a momentum outside of [0, 1).
    """

    beta: Tensor
    found: Tensor

    def __init__(self, wanted: float = 1.0, *, step: float = 1e-3, momentum: float = 0.9) -> None:
        super().__init__()
        self.wanted, self.step = _positive("wanted", wanted), _positive("step", step)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: got {momentum}, wanted a number in [0, 1)")
        self.momentum = momentum
        self.register_buffer("beta", torch.zeros(()))
        self.register_buffer("found", torch.ones(()))

    def strength(self, logits: Tensor, slope: Tensor) -> Tensor:
        size = logits.masked_fill(~logits.isfinite(), 0.0).norm()
        return self.beta * size / slope.norm().clamp_min(torch.finfo(slope.dtype).tiny)

    def observe(self, gradient: Tensor) -> None:
        self.found += (1 - self.momentum) * ((gradient != 0).sum(-1).float().mean() - self.found)
        self.beta += self.step if self.found < self.wanted else -self.step
        self.beta.clamp_min_(0.0)

    def __repr__(self) -> str:
        return f"AdaptiveTarget(wanted={self.wanted})"


class IMLE(Estimator):
    r"""Implicit maximum likelihood: the difference between perturb-and-MAP samples of the logits and of target logits.

    .. math:: \hat g = \frac1S \sum_s \frac{z(\theta + \epsilon_s) - z(\theta - \lambda g_s + \epsilon_s)}{\lambda}, \quad
              g_s = \partial f / \partial z_s

    Args:
        target: `FixedTarget(strength)` (default) or `AdaptiveTarget()`.
        noise: `SumOfGamma(k)` unless given, as published.

    Raises:
        ValueError: for a target that is none, for something else than noise.
    """

    exact_samples, unbiased, needs_differentiable_f = False, False, True

    def __init__(self, target: FixedTarget | AdaptiveTarget | None = None, *, noise: Noise | None = None) -> None:
        self.target = FixedTarget() if target is None else target
        if not isinstance(self.target, (FixedTarget, AdaptiveTarget)):
            raise ValueError(f"target: got {target!r}, wanted a target such as FixedTarget(10.0)")
        self.noise = None if noise is None else check_noise("noise", noise)

    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        logits, k = plain_logits(subset), row_k(subset)
        ones = max(k, 1) if isinstance(k, int) else k.clamp_min(1).unsqueeze(-1)
        noise = SumOfGamma(ones) if self.noise is None else self.noise
        shape = (num_samples, *logits.shape)
        drawn = noise.sample(shape, _generator(subset, seed), logits.dtype, logits.device)
        return f.differentiable(_ToTarget.apply(logits, drawn, k, self.target)).mean(0)

    def learned(self) -> nn.ModuleList:
        return nn.ModuleList([self.target] if isinstance(self.target, nn.Module) else [])

    def __repr__(self) -> str:
        return f"IMLE({self.target!r})"


class _ToTarget(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, noise: Tensor, k: int | Tensor, target: FixedTarget | AdaptiveTarget) -> Tensor:
        keys = logits + noise
        z = top_k(keys, k)
        ctx.save_for_backward(keys, logits, z)
        ctx.k, ctx.target = k, target
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keys, logits, z = ctx.saved_tensors
        slope = grad * len(grad)  # of each sample's f: the mean over samples divided it
        strength = ctx.target.strength(logits, slope)
        difference = z - top_k(keys - strength * slope, ctx.k)
        ctx.target.observe(difference)
        tiny = torch.finfo(slope.dtype).tiny
        return difference.mean(0) / strength.clamp_min(tiny) * (strength > 0), None, None, None


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, logits: Tensor) -> Tensor:
        ctx.like = logits.shape, logits.dtype
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.like
        return None, grad.sum(0).sum_to_size(shape).to(dtype)


def calibrating_tilt(logits: Tensor, k: Tensor) -> Tensor:
    r"""The tilt ``(*)`` at which :math:`\sum_i \sigma(\theta_i + \lambda) = k`, differentiable (implicitly); 0 for k = 0.

    One Newton step from the solution both polishes it and carries the derivative
    :math:`d\lambda = -\sum_i p_i q_i\, d\theta_i / \sum_i p_i q_i`.
    """
    rows = logits.reshape(-1, logits.shape[-1]).double()
    with torch.no_grad():
        wanted = k.expand(logits.shape[:-1]).reshape(-1).double()
        tilt, _, variance = solve_tilt(LogitRange.of(rows), wanted, lambda t: tilted_moments(rows, t))
    error = torch.sigmoid(rows + tilt.unsqueeze(-1)).sum(-1) - wanted
    return (tilt - error / variance.where(variance > 0, 1.0)).reshape(logits.shape[:-1]).to(logits.dtype)


def plain_logits(subset: KSubset) -> Tensor:
    """In the subset's batch shape and the precision of its results."""
    return subset.logits.to(subset.mode.dtype).expand(*subset.batch_shape, subset.n)


def row_k(subset: KSubset) -> int | Tensor:
    """One k where all rows have the same, else the k of each ``(*)``."""
    ks = subset.k.unique()
    return int(ks) if len(ks) == 1 else subset.k


def _generator(subset: KSubset, seed: int | None) -> torch.Generator | None:
    if seed is None:
        return None
    return torch.Generator(subset.logits.device).manual_seed(seed % 2**63)


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, wanted a positive finite number")
    return float(value)
