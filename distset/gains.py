r"""Expected marginal gains of all elements of an offer, three ways, each with a derivative in psi that is right.

An estimator is started once for an offer and a solve, ``estimator.start(utility, elements, mask, generator)``: it embeds the
elements and fixes its draws. What it gives back maps logits of psi ``(*, N)`` to `Gains`, deterministically, so that a
fixed point exists. Given ``places (*, C)``, it finds the gains of those elements alone: a last step needs no others.

Shapes: ``*`` batch of offers, ``N`` elements, ``M`` draws, ``D`` width of an element's code, ``C`` places.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from distset.set_functions import SetFunction, SumUtility

__all__ = ["Drawn", "Enumerated", "Gains", "GainsEstimator", "Smoothed", "gains_at", "soft_subset", "started"]


class Gains(NamedTuple):
    """Expected marginal gains with the rows they are the mean of.

    Attributes:
        mean: ``(*, N)``, or ``(*, C)`` at places.
        rows: ``(*, M, N)`` or ``(*, M, C)``, row m times the root of its weight, so that ``mean`` is the roots' product with
            ``rows``.
        log_prob: ``(*, M)`` of the draws, where a statistic of the rows has its derivative in psi through their
            probabilities (the mean has its own); None where the rows themselves are smooth in psi.
    """

    mean: Tensor
    rows: Tensor
    log_prob: Tensor | None


Estimator = Callable[[Tensor], Gains]
"""Logits of psi ``(*, N)`` -> `Gains`; a deterministic function, its draws are fixed."""


class GainsEstimator(Protocol):
    """How expected gains are found: `Enumerated`, `Drawn`, `Smoothed`, or yours, also without ``places``."""

    def start(
        self,
        utility: SetFunction,
        elements: Tensor,
        mask: Tensor | None,
        generator: torch.Generator | None = None,
        places: Tensor | None = None,
    ) -> Estimator: ...


def started(
    gains: GainsEstimator,
    utility: SetFunction,
    elements: Tensor,
    mask: Tensor | None,
    generator: torch.Generator | None = None,
    places: Tensor | None = None,
) -> Estimator:
    """The estimator for an offer; one that takes no ``places`` finds all gains, of which those at the places are kept."""
    if places is None:
        return gains.start(utility, elements, mask, generator)
    if "places" in signature(gains.start).parameters:
        return gains.start(utility, elements, mask, generator, places=places)
    everywhere = gains.start(utility, elements, mask, generator)

    def at_places(logits: Tensor) -> Gains:
        found = everywhere(logits)
        return found._replace(mean=found.mean.gather(-1, places), rows=_at(found.rows, places))

    return at_places


class Enumerated:
    """Exact gains from all 2^N subsets, for N of at most 16: the multilinear extension itself."""

    def start(
        self,
        utility: SetFunction,
        elements: Tensor,
        mask: Tensor | None,
        generator: torch.Generator | None = None,
        places: Tensor | None = None,
    ) -> Estimator:
        n = elements.shape[-getattr(utility, "element_ndim", 1) - 1]
        if n > 16:
            raise ValueError(f"elements: got an offer of {n}, wanted at most 16 to enumerate; use Drawn() or Smoothed()")
        codes = torch.arange(2**n, device=elements.device)
        bits = torch.arange(n, device=elements.device)
        subsets_SN = (codes.unsqueeze(-1) >> bits) & 1
        batch = elements.shape[: -getattr(utility, "element_ndim", 1) - 1]
        inside_SN = subsets_SN.bool() if mask is None else subsets_SN.bool() & mask.unsqueeze(-2)
        values_S = utility(elements, inside_SN.to(elements.dtype).expand(*batch, -1, -1), mask)
        with_i, without_i = codes.unsqueeze(-1) | (1 << bits), codes.unsqueeze(-1) & ~(1 << bits)
        rows_SN = _at(values_S[..., with_i] - values_S[..., without_i], places)

        def gains(logits: Tensor) -> Gains:
            log_q = _log_prob(logits.unsqueeze(-2), inside_SN, mask).sum(-1)
            # a subset of real elements counts once, not once for every subset of the padding
            log_q = log_q.masked_fill((inside_SN != subsets_SN).any(-1), -torch.inf)
            mean = (log_q.exp().unsqueeze(-2) @ rows_SN).squeeze(-2)
            return Gains(mean, (0.5 * log_q).exp().unsqueeze(-1) * rows_SN, None)

        return gains

    def __repr__(self) -> str:
        return "Enumerated()"


class Drawn:
    """Gains at M subsets drawn from psi, by comparison with uniform numbers that stay the same through a solve.

    Unbiased in psi. The map itself is piecewise constant, so autograd alone would find a derivative of 0 in psi (as in
    both published codes); `derivative` says what to use:

    * ``"score"``: the score function with a leave-one-out baseline over the same draws, at no evaluation of F more.
      Unbiased; its noise falls as 1/sqrt(M): at M = 5 it is useless, at 100 the implicit gradient is 6 to 10 % off;
    * ``"differences"``: second differences of F at the same draws. Unbiased and far less noisy, but a product with a
      vector costs O(M N^2 D): for small offers;
    * None: 0, as published. `Implicit` is then the same as `OneStep`.

    Args:
        samples: M.
        derivative: see above.

    Raises:
        ValueError: for no samples, an unknown derivative, "score" with one sample (a baseline needs another one).

    Example:
        >>> import torch
        >>> from distset.gains import Drawn, Enumerated
        >>> from distset.set_functions import UserUtility
        >>> three = UserUtility(lambda elements, subsets: -(subsets.sum(-1) - 3) ** 2)  # it wants three of the four
        >>> offer, logits = torch.zeros(4, 1), torch.zeros(4)
        >>> Enumerated().start(three, offer, None)(logits).mean  # of k others the gain is 5 - 2 k, and k is 1.5 on average
        tensor([2., 2., 2., 2.])
        >>> drawn = Drawn(4000, derivative=None).start(three, offer, None, torch.Generator().manual_seed(0))
        >>> [round(gain, 1) for gain in drawn(logits).mean.tolist()]
        [2.0, 2.0, 2.0, 2.0]
    """

    def __init__(self, samples: int = 5, derivative: str | None = "score") -> None:
        if samples < 1 or (samples < 2 and derivative == "score"):
            raise ValueError(
                f"samples: got {samples}, wanted at least {2 if derivative == 'score' else 1} for {derivative!r}"
            )
        if derivative not in ("score", "differences", None):
            raise ValueError(f"derivative: got {derivative!r}, wanted 'score', 'differences' or None")
        self.samples, self.derivative = samples, derivative

    def start(
        self,
        utility: SetFunction,
        elements: Tensor,
        mask: Tensor | None,
        generator: torch.Generator | None = None,
        places: Tensor | None = None,
    ) -> Estimator:
        uniform = _numbers(torch.rand, utility, elements, self.samples, generator)
        at = gains_at(utility, elements, mask, places)

        def gains(logits: Tensor) -> Gains:
            inside = uniform < torch.sigmoid(logits.detach()).unsqueeze(-2)
            if mask is not None:
                inside = inside & mask.unsqueeze(-2)
            rows = at(inside)
            if self.derivative is None:
                return Gains(rows.mean(-2), rows / self.samples**0.5, None)
            log_probs = _log_prob(logits.unsqueeze(-2), inside, mask)
            log_prob = log_probs.sum(-1)
            if self.derivative == "score":
                slope = self._score(rows.detach(), log_prob.unsqueeze(-1) - _at(log_probs, places))
            else:
                slope = _SecondDifferences.apply(torch.sigmoid(logits), at, inside, rows.detach(), places)
            return Gains((rows + slope).mean(-2), rows / self.samples**0.5, log_prob)

        return gains

    def _score(self, rows: Tensor, log_prob: Tensor) -> Tensor:
        """0 with the derivative of E[rows]: (row - mean of the others) d log q, where element i's own draw is left out."""
        centred = (rows - rows.mean(-2, keepdim=True)) * (self.samples / (self.samples - 1))
        return centred * (log_prob - log_prob.detach())

    def __repr__(self) -> str:
        return f"Drawn({self.samples}, derivative={self.derivative!r})"


class Smoothed:
    r"""Gains where the sum over a random subset is replaced by a normal of the same mean and covariance.

    .. math:: u_m = \sum_j \tilde s_{mj} \phi_j, \qquad
              \tilde s_{mj} = \psi_j + \sqrt{\psi_j (1 - \psi_j)}\, \epsilon_{mj},

    with M fixed draws of epsilon: given phi, u is exactly normal, and nothing of D x D is built. Element i's own share
    is taken out before it is put in or left out. The map is smooth in psi, and plain autograd gives its derivative. The
    bias is that of the normal approximation: at most :math:`\sup|f'''| / 6 \sum_j E|X_j|^3 + E|G_j|^3` (Lindeberg) for
    a gain f of a scalar sum of X_j, falling with N.

    Args:
        samples: M.

    Raises:
        ValueError: for no samples; at use, for a utility that is no `SumUtility`.
    """

    def __init__(self, samples: int = 5) -> None:
        if samples < 1:
            raise ValueError(f"samples: got {samples}, wanted at least 1 draw of the sum")
        self.samples = samples

    def start(
        self,
        utility: SetFunction,
        elements: Tensor,
        mask: Tensor | None,
        generator: torch.Generator | None = None,
        places: Tensor | None = None,
    ) -> Estimator:
        if not isinstance(utility, SumUtility):
            raise ValueError(
                f"utility: got {type(utility).__name__}, wanted a SumUtility, whose sum can be smoothed; use Drawn()"
            )
        normal = _numbers(torch.randn, utility, elements, self.samples, generator)
        h_ND = utility.embed(elements, mask)
        total, h_CD = utility.total(h_ND), _rows_at(h_ND, places)

        def gains(logits: Tensor) -> Gains:
            soft = soft_subset(logits, normal, mask)
            rows = utility.gains_of_sums(h_CD, soft @ h_ND, _at(soft, places), total)
            return Gains(rows.mean(-2), rows / self.samples**0.5, None)

        return gains

    def __repr__(self) -> str:
        return f"Smoothed({self.samples})"


def soft_subset(logits: Tensor, normal: Tensor, mask: Tensor | None = None) -> Tensor:
    """``psi + sqrt(psi (1 - psi)) eps`` for ``eps (*, M, N)``; smooth in the logits, 0 at padding."""
    spread = torch.exp(0.5 * (F.logsigmoid(logits) + F.logsigmoid(-logits)))
    soft = torch.addcmul(torch.sigmoid(logits).unsqueeze(-2), spread.unsqueeze(-2), normal)
    return soft if mask is None else soft.masked_fill(~mask.unsqueeze(-2), 0.0)


class _SecondDifferences(torch.autograd.Function):
    """0 with the derivative of E[rows] in psi_j at the same draws: ``rows(S + j) - rows(S - j)``, one j after the other."""

    @staticmethod
    def forward(
        ctx: Any, psi: Tensor, at: Callable[[Tensor], Tensor], inside: Tensor, rows: Tensor, places: Tensor | None
    ) -> Tensor:
        ctx.job = (at, inside, rows, places)
        return torch.zeros_like(rows, dtype=psi.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        at, inside, rows, places = ctx.job
        whose = torch.arange(inside.shape[-1], device=inside.device) if places is None else places
        parts = []
        with torch.no_grad():
            for j in range(inside.shape[-1]):
                flipped = inside.clone()
                flipped[..., j] ^= True
                change = ((at(flipped) - rows) * cotangent).masked_fill((whose == j).unsqueeze(-2), 0.0)
                sign = 1 - 2 * inside[..., j].to(rows.dtype)
                parts.append((sign * change.sum(-1)).sum(-1))
        return torch.stack(parts, -1), None, None, None, None


def gains_at(
    utility: SetFunction, elements: Tensor, mask: Tensor | None, places: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Hard subsets -> gains, with the elements' codes computed once."""
    if not isinstance(utility, SumUtility):
        return lambda inside: _at(utility.gains(elements, inside, mask), places)
    h_ND = utility.embed(elements, mask)
    total, h_CD = utility.total(h_ND), _rows_at(h_ND, places)
    return lambda inside: utility.gains_of_sums(h_CD, inside.to(h_ND.dtype) @ h_ND, _at(inside, places), total)


def _at(values: Tensor, places: Tensor | None) -> Tensor:
    """Of ``(*, M, N)`` the elements at ``places (*, C)``."""
    if places is None:
        return values
    return values.gather(-1, places.unsqueeze(-2).expand(*values.shape[:-1], places.shape[-1]))


def _rows_at(h_ND: Tensor, places: Tensor | None) -> Tensor:
    """Of ``(*, N, D)`` the elements at ``places (*, C)``."""
    return h_ND if places is None else h_ND.gather(-2, places.unsqueeze(-1).expand(*places.shape, h_ND.shape[-1]))


def _log_prob(logits: Tensor, inside: Tensor, mask: Tensor | None) -> Tensor:
    log_prob = torch.where(inside.bool(), F.logsigmoid(logits), F.logsigmoid(-logits))
    return log_prob if mask is None else log_prob.masked_fill(~mask.unsqueeze(-2), 0.0)


def _numbers(
    draw: Callable[..., Tensor], utility: SetFunction, elements: Tensor, samples: int, generator: torch.Generator | None
) -> Tensor:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    *batch, n = elements.shape[: elements.dim() - getattr(utility, "element_ndim", 1)]
    numbers = draw(*batch, samples, n, generator=generator, dtype=real_dtype(utility, elements), device=generator.device)
    return numbers.to(elements.device)


def real_dtype(utility: SetFunction, elements: Tensor) -> torch.dtype:
    first = next((p for p in utility.parameters() if p.is_floating_point()), None)
    if first is not None:
        return first.dtype
    return elements.dtype if elements.is_floating_point() else torch.get_default_dtype()
