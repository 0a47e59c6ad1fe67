r"""Mean-field inference of an optimal-subset oracle: DiffMF, iDiffMF and EquiVSet from one step.

An oracle that picks S* from V is modelled as :math:`p(S \mid V) \propto e^{F(S, V)}` and approximated by independent
choices with probabilities :math:`\psi`. The best ones solve

.. math:: \psi_i = \sigma\bigl(E_{S \sim \psi}[F(S \cup i) - F(S \setminus i)]\bigr) \qquad [1, eq. 7],

which `mean_field` iterates in the logits of :math:`\psi`, the expected marginal gains themselves. How the expectation is
taken is one object (`Enumerated`, `Drawn`, `Smoothed`), how the gains are scaled another (`Constant`, `L2`, `Nuclear`),
how the gradient is taken a third (`Unrolled`, `OneStep`, `Implicit`); a published method is a choice of the three:

=====================  ==========================================================================
DiffMF [1]             ``Unrolled(K)``, ``Drawn(5, derivative=None)``, from 0.5
EquiVSet [1]           the same, from the guess of a recognition network trained by `elbo`
iDiffMF_c, _2, _* [2]  ``Implicit()`` with `Constant`, `L2`, `Nuclear`
=====================  ==========================================================================

Shapes: ``*`` batch of offers, ``N`` elements, ``M`` draws, ``D`` width of an element's code.

References:
    [1] Ou et al.: Learning Neural Set Functions Under the Optimal Subset Oracle. NeurIPS 2022. arXiv:2203.01693
    [2] Özcan, Shi, Ioannidis: Learning Set Functions with Implicit Differentiation. AAAI 2025. arXiv:2412.11239
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distset.fixed_point import (
    FixedPointWarning,
    Implicit,
    Iteration,
    OneStep,
    Solution,
    Stop,
    Unrolled,
    fixed_point,
    lipschitz,
)
from distset.gains import Drawn, Gains, GainsEstimator, Smoothed, real_dtype, started
from distset.offers import check_elements
from distset.set_functions import Guess, SetFunction, SumUtility

__all__ = [
    "L2", "Constant", "Nuclear", "check_contraction", "diff_mf", "equivset", "field_step", "idiff_mf", "mean_field",
    "oracle_loss",
]  # fmt: skip


class Constant(NamedTuple):
    """Gains times a constant: iDiffMF_c [2]; 1 / c is a temperature."""

    c: float = 1.0

    def __call__(self, gains: Gains, size: Tensor) -> Tensor:
        return self.c * gains.mean


class L2(NamedTuple):
    """Gains scaled to a given l2 norm: iDiffMF_2 [2]. The norm is taken for each set and is differentiated.

    ``norm`` None is the published 2 / N, which satisfies Assumption 4.1 and keeps psi within .005 of 0.5 at N = 100.
    """

    norm: float | None = None

    def __call__(self, gains: Gains, size: Tensor) -> Tensor:
        return _scaled(gains.mean, torch.linalg.vector_norm(gains.mean, dim=-1), self.norm, size)


class Nuclear(NamedTuple):
    """Gains scaled by the nuclear norm of their rows, for each set: iDiffMF_* [2], at most `L2`.

    With draws in the rows; of one row it is the l2 norm. Differentiated: through the rows, and where the draws depend
    on psi by the score function with a leave-one-out baseline.
    """

    norm: float | None = None

    def __call__(self, gains: Gains, size: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(gains.rows, "nuc")
        if gains.log_prob is not None:
            if gains.rows.shape[-2] < 2:
                raise ValueError(
                    "samples: got 1 draw with Nuclear(), whose derivative compares each draw with the others, wanted at "
                    "least 2; use Drawn(2, 'differences') or more, or L2(), which is the same for one draw"
                )
            rest = self._leave_one_out(gains.rows.detach())
            norm = norm + ((norm.detach().unsqueeze(-1) - rest) * (gains.log_prob - gains.log_prob.detach())).sum(-1)
        return _scaled(gains.mean, norm, self.norm, size)

    @staticmethod
    def _leave_one_out(rows: Tensor) -> Tensor:
        m = rows.shape[-2]
        kept = [torch.cat([rows[..., :i, :], rows[..., i + 1 :, :]], -2) for i in range(m)]
        return torch.stack([torch.linalg.matrix_norm(k, "nuc") * (m / (m - 1)) ** 0.5 for k in kept], -1)


Scale = Constant | L2 | Nuclear


def mean_field(
    utility: SetFunction,
    elements: Tensor,
    *,
    gains: GainsEstimator | None = None,
    scale: Scale | None = None,
    grad: Implicit | OneStep | Unrolled | None = None,
    iteration: Iteration | None = None,
    stop: Stop | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """The mean field of each offer: ``value`` are the logits of psi ``(*, N)``, carrying their gradient.

    Args:
        utility: F.
        elements: ``(*, N, *element)``.
        gains: how expected gains are found; `Smoothed(5)` for a `SumUtility`, else `Drawn(5)`.
        scale: of the gains, `Constant(1)` if None.
        grad, iteration, stop: as in `fixed_point`.
        start: logits ``(*, N)`` to start from, 0 (psi = 0.5) if None.
        mask: bool ``(*, N)``, False at padding, whose logits are 0.
        generator: of the draws; seed 0 if None.

    Raises:
        ValueError: for features that are not finite, a mask that does not fit, a scale that is not positive, a map that is
            not finite.

    Example:
        >>> import torch
        >>> from distset.mean_field import mean_field
        >>> from distset.set_functions import published_utility
        >>> solution = mean_field(published_utility(2), torch.randn(4, 30, 2))
        >>> solution.value.shape, bool(solution.converged.all())
        (torch.Size([4, 30]), True)
    """
    step = field_step(utility, elements, gains=gains, scale=scale, mask=mask, generator=generator)
    batch = elements.shape[: elements.dim() - getattr(utility, "element_ndim", 1)]
    if start is None:
        start = elements.new_zeros(batch, dtype=real_dtype(utility, elements))
    return fixed_point(step, start, grad=grad, iteration=iteration, stop=stop)


def field_step(
    utility: SetFunction,
    elements: Tensor,
    *,
    gains: GainsEstimator | None = None,
    scale: Scale | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    places: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """The map from logits to logits whose fixed point `mean_field` finds; arguments as there.

    With ``places`` int64 ``(*, C)`` it gives the logits of these elements alone, ``(*, C)``, at the cost of C of N: the
    last one of a few unrolled steps, in training on some of the elements.

    Raises:
        ValueError: as `mean_field`; for places with a scale that takes the norm over all elements.
    """
    if places is not None and not isinstance(scale, Constant | None):
        raise ValueError(f"places: got a scale {scale!r}, which takes the norm over all gains; use Constant(), or no places")
    for figure in scale if isinstance(scale, Scale) else ():
        if figure is not None and not 0 < figure < math.inf:
            raise ValueError(f"scale: got {scale}, wanted a positive finite number in it")
    check_elements(elements, mask, getattr(utility, "element_ndim", 1))
    if gains is None:
        gains = Smoothed() if isinstance(utility, SumUtility) else Drawn()
    estimate = started(gains, utility, elements, mask, generator, places)
    scaling = Constant() if scale is None else scale
    n = elements.shape[-getattr(utility, "element_ndim", 1) - 1]
    size = torch.tensor(float(n), device=elements.device) if mask is None else mask.sum(-1)
    inside = mask if mask is None or places is None else mask.gather(-1, places)

    def step(logits: Tensor) -> Tensor:
        found = estimate(logits)
        # Autocast may hand out gains in half precision; norms and the iteration keep to that of the logits.
        found = found._replace(mean=found.mean.to(logits.dtype), rows=found.rows.to(logits.dtype))
        if inside is not None:
            found = found._replace(
                mean=found.mean.masked_fill(~inside, 0.0), rows=found.rows.masked_fill(~inside.unsqueeze(-2), 0.0)
            )
        return scaling(found, size)

    return step


def oracle_loss(logits: Tensor, chosen: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The cross-entropy of the oracle's choice, :math:`-\sum_{S^*} \log\psi_i - \sum_{V \setminus S^*} \log(1 - \psi_i)`,
    averaged over the offers [1, eq. 5].

    Args:
        logits: of psi, ``(*, N)``.
        chosen: bool ``(*, N)``, True in S*.
        mask: bool ``(*, N)``, False where an element does not count: padding, or the elements beside S* that a
            training step leaves out (the published code keeps |S*| drawn at random).
    """
    loss = F.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype), reduction="none")
    return (loss if mask is None else loss.masked_fill(~mask, 0.0)).sum(-1).mean()


def diff_mf(
    utility: SetFunction,
    elements: Tensor,
    *,
    steps: int = 1,
    samples: int = 5,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """DiffMF [1]: a few unrolled steps over hard draws, whose derivative in psi is taken for 0."""
    gains = Drawn(samples, derivative=None)
    return mean_field(
        utility, elements, gains=gains, grad=Unrolled(steps), start=start, mask=mask, generator=generator
    )  # fmt: skip


def equivset(
    utility: SetFunction,
    guess: Guess,
    elements: Tensor,
    *,
    steps: int = 1,
    samples: int = 5,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """EquiVSet_ind and _copula [1]: `diff_mf` from the marginals a recognition network guesses, which `elbo` trains."""
    start = guess.masked(mask).logits.detach()
    return diff_mf(utility, elements, steps=steps, samples=samples, start=start, mask=mask, generator=generator)


def idiff_mf(
    utility: SetFunction,
    elements: Tensor,
    *,
    scale: Scale | None = None,
    gains: GainsEstimator | None = None,
    iteration: Iteration | None = None,
    stop: Stop | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """iDiffMF [2]: the fixed point with its implicit gradient, Theorem 4.3 with its Hessian term.

    ``scale`` is `Constant(c)` for iDiffMF_c, `L2()` (default) for iDiffMF_2, `Nuclear()` for iDiffMF_*.
    """
    return mean_field(
        utility, elements, gains=gains, scale=L2() if scale is None else scale, grad=Implicit(), iteration=iteration,
        stop=stop, mask=mask, generator=generator,
    )  # fmt: skip


def check_contraction(
    utility: SetFunction,
    elements: Tensor,
    *,
    gains: GainsEstimator | None = None,
    scale: Scale | None = None,
    mask: Tensor | None = None,
    points: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the Lipschitz constant of ``psi -> sigma(gains(psi))`` for each offer (Assumption 4.1 of [2] in practice).

    The largest spectral norm of its Jacobian at psi = 0.5 and at random points, ``(*)``: from below, so a value of at
    least 1 proves that the map is no contraction, and is warned of. For `Drawn` without a derivative it is 0: its map
    is constant but for jumps.

    Raises:
        ValueError: as `mean_field`; for gains whose derivative cannot be differentiated again, as that of
            ``Drawn(m, "differences")``.
    """
    if isinstance(gains, Drawn) and gains.derivative == "differences":
        raise ValueError(
            f"gains: got {gains!r}, whose derivative cannot be differentiated again, wanted Enumerated(), Smoothed() or "
            f"Drawn({max(2, gains.samples)}, 'score') to measure how far the map stretches"
        )
    step = field_step(utility, elements, gains=gains, scale=scale, mask=mask, generator=generator)
    batch = elements.shape[: elements.dim() - getattr(utility, "element_ndim", 1)]
    numbers = torch.Generator().manual_seed(0)
    found = []
    for i in range(points):
        psi = torch.rand(batch, generator=numbers, dtype=real_dtype(utility, elements)).to(elements.device) if i else None
        psi = elements.new_full(batch, 0.5, dtype=real_dtype(utility, elements)) if psi is None else psi.clamp(0.01, 0.99)
        found.append(lipschitz(lambda p: torch.sigmoid(step(torch.logit(p))), psi, generator=numbers))
    constant = torch.stack(found).amax(0)
    if bool((constant >= 1).any()):
        worst = float(constant.max())
        warnings.warn(
            f"check_contraction: the mean-field step stretches by {worst:.3g} or more in {int((constant >= 1).sum())} of "
            f"{constant.numel()} offers: it may have no fixed point that the iteration finds, or several; scale the gains "
            f"(about Constant({0.9 / worst:.2g}) for the worst, or L2()), or iterate with Damped() and read the status",
            FixedPointWarning,
            stacklevel=2,
        )
    return constant


def _scaled(mean: Tensor, norm: Tensor, wanted: float | None, size: Tensor) -> Tensor:
    """The mean rescaled to the norm ``wanted``, or 2 / N; gains that are all 0 stay so."""
    target = 2 / size.to(mean.dtype) if wanted is None else wanted
    factor = torch.where(norm > 0, target / torch.where(norm > 0, norm, 1.0), 0.0)
    return mean * factor.unsqueeze(-1)
