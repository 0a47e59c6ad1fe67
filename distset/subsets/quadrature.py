r"""Log-normaliser, inclusion probabilities and covariances of k-subsets by tilted contour quadrature.

Let :math:`K = \sum_i z_i` with independent :math:`z_i \sim \mathrm{Bernoulli}(p_i)`, :math:`p_i = \sigma(\theta_i +
\lambda)`. For every tilt :math:`\lambda`

.. math:: \log e_k(e^\theta) = \sum_i \mathrm{softplus}(\theta_i + \lambda) - k \lambda + \log P(K = k), \qquad
          P(K = k) = \frac1M \sum_{j<M} \varphi(t_j) e^{-i k t_j}, \quad t_j = 2\pi j / M

up to the aliases :math:`P(K = k \pm M), \dots`. With :math:`M = n + 1` there is none: that is the published discrete
Fourier transform. Tilted such that :math:`E[K] = k`, the count pmf has a width of :math:`\sqrt V`, :math:`V = \sum p_i
q_i`, and its characteristic function one of :math:`1 / \sqrt V`: some :math:`9 \sqrt V + 14` nodes are enough whatever n
and k, and at most 27 of them (fewer than 14 by symmetry once V is large) are not negligible. Every quantity below is a
sum over elements at these nodes, so it is a sum of chunk sums, and nothing is ever subtracted that is large. The tilt is not
large either: rows with large logits are shifted by their `cut` beforehand, which leaves the distribution as it is.

Shapes: ``B`` rows (flattened batch), ``N`` elements, ``J`` nodes. Everything in float64. Logits are finite or ``-inf``
(an element that is out: it adds nothing to any sum).

References:
    Wijk, Vinuesa, Azizpour 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR, eq. 2 to 4.
    Fernandez, Williams 2010, "Closed-Form Expression for the Poisson-Binomial Probability Density Function".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distset.states import Sum

__all__ = [
    "LogitRange",
    "Moments",
    "NodeSums",
    "Quadrature",
    "covariance_product",
    "inclusion",
    "log_normalizer",
    "quadrature",
]

# The temporaries of a block: 2^16 float64 stay in the second-level cache of a core.
BLOCK = 2**16
# Nodes where the characteristic function is below exp(-41), 1e-18, are left out.
NEGLIGIBLE = 41.0
MAX_ROUNDS = 200
# Logits this far from the cut are certain (exp(-1024) is 0); rows with logits this large are shifted by it.
WIDE = 2.0**10


class LogitRange(NamedTuple):
    """What the search for the tilt starts from, of each row's finite logits: a mergeable state, all ``(B,)``.

    Attributes:
        n: their number.
        forced: the number of logits that are ``+inf``.
        low, high: the smallest and largest, no larger in size than WIDE.
        lse, lse_negated: log-sum-exp of the logits, and of the negated logits, where none is larger in size than WIDE.
    """

    n: Tensor
    forced: Tensor
    low: Tensor
    high: Tensor
    lse: Tensor
    lse_negated: Tensor

    @staticmethod
    def of(logits: Tensor) -> LogitRange:
        finite, near = logits.isfinite(), logits.clamp(-WIDE, WIDE)
        up, down = near.masked_fill(~finite, -math.inf), (-near).masked_fill(~finite, -math.inf)
        forced = (logits == math.inf).sum(-1).double()
        return LogitRange(finite.sum(-1).double(), forced, -down.amax(-1), up.amax(-1), up.logsumexp(-1), down.logsumexp(-1))

    @property
    def wide(self) -> Tensor:
        """Which rows have large logits, bool ``(B,)``."""
        return torch.maximum(-self.low, self.high) >= WIDE

    def merge(self, other: LogitRange) -> LogitRange:
        return LogitRange(
            self.n + other.n,
            self.forced + other.forced,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            torch.logaddexp(self.lse, other.lse),
            torch.logaddexp(self.lse_negated, other.lse_negated),
        )


class Moments(NamedTuple):
    """Mean and variance ``(B,)`` of the tilted count: a mergeable state."""

    mean: Tensor
    variance: Tensor

    def merge(self, other: Moments) -> Moments:
        return Moments(self.mean + other.mean, self.variance + other.variance)


class NodeSums(NamedTuple):
    """Sums over elements that give the characteristic function at the nodes: a mergeable state.

    Attributes:
        log_modulus: of the characteristic function, ``(B, J)``.
        phase: its phase less that of the mean, ``(B, J)``.
        softplus: of the tilted logits, ``(B,)``.
    """

    log_modulus: Tensor
    phase: Tensor
    softplus: Tensor

    def merge(self, other: NodeSums) -> NodeSums:
        return NodeSums(*(a + b for a, b in zip(self, other)))


class Quadrature(NamedTuple):
    """The tilt, the nodes and what the sums at the nodes add up to.

    Attributes:
        tilt: lambda, ``(B,)``.
        mean, variance: of the tilted count, ``(B,)``.
        angles: the nodes t in [0, pi], ``(B, J)``.
        weights: complex, the nodes' shares of ``P(K = k)``, real parts adding up to 1, ``(B, J)``.
        log_count: ``log P(K = k)``, ``(B,)``.
        softplus: of the tilted logits, added up, ``(B,)``.
    """

    tilt: Tensor
    mean: Tensor
    variance: Tensor
    angles: Tensor
    weights: Tensor
    log_count: Tensor
    softplus: Tensor

    def log_normalizer(self, k: Tensor) -> Tensor:
        return self.softplus + self.log_count - k * self.tilt


def quadrature(
    start: LogitRange,
    k: Tensor,
    moments: Callable[[Tensor], Moments],
    node_sums: Callable[[Tensor, Tensor], NodeSums],
) -> Quadrature:
    """Solve for the tilt, place the nodes, add up.

    Args:
        start: of the logits.
        k: the count, float64 ``(B,)``, 0 where ``start.n`` is 0 and strictly between 0 and ``start.n`` elsewhere.
        moments: ``tilt (B,) -> Moments`` (see `tilted_moments`).
        node_sums: ``tilt (B,), angles (B, J) -> NodeSums`` (see `chunk_node_sums`).

    Raises:
        ValueError: where no tilt is found.
    """
    tilt, mean, variance = solve_tilt(start, k, moments)
    angles, share = place_nodes(variance, start.n)
    sums = node_sums(tilt, angles)
    phase = sums.phase + (mean - k).unsqueeze(-1) * angles
    values = share * torch.polar(torch.exp(sums.log_modulus), phase)
    total = values.real.sum(-1)
    return Quadrature(tilt, mean, variance, angles, values / total.unsqueeze(-1), total.log(), sums.softplus)


def solve_tilt(start: LogitRange, k: Tensor, moments: Callable[[Tensor], Moments]) -> tuple[Tensor, Tensor, Tensor]:
    """The tilt at which the mean count is k: safeguarded Newton steps on the log-odds of the mean share ``E[K] / n``.

    Newton's step is exact where all logits are equal. Where it leaves the bracket, or is over half as long as the step
    before the last one (Brent 1973: between groups of logits far apart Newton's steps go to and fro), the bracket is halved.
    The tilt need not be exact (every tilt gives the same answer); a hundredth of a standard deviation is plenty, and saves
    rounds of sums over the elements.
    """
    free = start.n > 0
    n, k = start.n.where(free, 2.0), k.where(free, 1.0)
    wanted = torch.log(k) - torch.log(n - k)
    low = torch.maximum(wanted - start.high, torch.log(k) - start.lse).where(free, 0.0)
    high = torch.minimum(wanted - start.low, start.lse_negated - torch.log(n - k)).where(free, 0.0)
    tilt = low.where(2 * k <= n, high)
    before_last = last = torch.full_like(tilt, math.inf)
    for _ in range(MAX_ROUNDS):
        mean, variance = moments(tilt)
        error = mean - k
        if bool(((error.abs() <= 1e-2 * variance.sqrt() + 1e-4) | ~free).all()):
            break
        low, high = tilt.where(error < 0, low), tilt.where(error > 0, high)
        slope = variance * n / (mean * (n - mean))
        newton = tilt - (torch.log(mean) - torch.log(n - mean) - wanted) / slope
        fine = (newton > low) & (newton < high) & (2 * (newton - tilt).abs() <= before_last)  # False for nan
        step = newton.where(fine, 0.5 * (low + high)).where(free, 0.0) - tilt
        tilt, before_last, last = tilt + step, last, step.abs()
    else:
        row = int((error.abs() * free).argmax())
        raise ValueError(
            f"logits: row {row} has a mean count of {float(mean[row]):g} at its best tilt, wanted k = {float(k[row]):g}; "
            f"use -inf and inf for elements that are out or in whatever the others are"
        )
    return tilt, mean, variance


def cut(logits: Tensor, k: Tensor) -> Tensor:
    """The k-th largest of ``logits (B, N)``, finite or -inf, in rows with large ones; 0 in others and where k is 0.

    Less the cut, ties at it are ties at 0 exactly, and the tilt need not be large.

    Raises:
        ValueError: for logits so far apart that the differences, or their sum, are not finite.
    """
    finite = logits.isfinite()
    wide = (logits.abs().masked_fill(~finite, 0.0).amax(-1) >= WIDE) & (k > 0)
    if not bool(wide.any()):
        return logits.new_zeros(k.shape)
    best = logits.topk(int(k.max()), -1).values
    found = best.gather(-1, (k.long() - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1).where(wide, 0.0)
    check_spread(spread(logits - found.unsqueeze(-1)), finite.sum(-1))
    return found


def spread(shifted: Tensor) -> Sum:
    """Of logits less their cut: what those above it add up to, and how many are finite."""
    return Sum(F.relu(shifted).sum(-1), shifted.isfinite().sum(-1))


def check_spread(found: Sum, n: Tensor) -> None:
    """Raises ValueError unless the differences of all rows are finite, and their sum is."""
    bad = ~found.total.isfinite() | (found.n != n)
    if bool(bad.any()):
        raise ValueError(
            f"logits: those of row {int(bad.nonzero()[0])} are too far apart for float64, wanted differences with a finite "
            f"sum; use -inf and inf for elements that are out or in whatever the others are"
        )


def place_nodes(variance: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes in ``[0, pi]``, ``(B, J)``, and the share of each: 1/M at 0, 2/M for a pair, 0 for padding.

    M is odd, so that no node meets the zero of ``1/2 + 1/2 e^{i t}`` at pi; with M > n the rule is exact.
    """
    count = torch.minimum(torch.ceil(13.7 + torch.sqrt(160 + 76 * variance)), n + 1)
    count = count + (1 - count % 2)
    half = (count - 1) / 2
    reach = torch.asin(torch.sqrt(NEGLIGIBLE / (2 * variance).clamp_min(NEGLIGIBLE))) * count / math.pi
    used = torch.minimum(half, torch.ceil(reach))
    j = torch.arange(int(used.max()) + 1, dtype=variance.dtype, device=variance.device)
    angles = (2 * math.pi / count).unsqueeze(-1) * j
    share = torch.where(j == 0, 1.0, 2.0) / count.unsqueeze(-1)
    kept = j <= used.unsqueeze(-1)
    return angles.where(kept, 0.0), share.where(kept, 0.0)


def tilted_moments(logits: Tensor, tilt: Tensor) -> Moments:
    """Mean and variance of the count of ``logits (B, N)`` under ``tilt (B,)``."""
    mean, variance = torch.zeros_like(tilt), torch.zeros_like(tilt)
    for _, block in _blocks(logits, 4):
        a = block + tilt.unsqueeze(-1)
        p = torch.sigmoid(a)
        mean += p.sum(-1)
        variance += torch.linalg.vecdot(p, torch.sigmoid(-a))
    return Moments(mean, variance)


def chunk_node_sums(logits: Tensor, tilt: Tensor, angles: Tensor) -> NodeSums:
    """The sums over ``logits (B, N)`` that the characteristic function at ``angles (B, J)`` is made of."""
    t = angles.unsqueeze(-1)
    sine, cosine, depth = torch.sin(t), torch.cos(t), -4 * torch.sin(t / 2).square()
    log_modulus, phase, softplus = torch.zeros_like(angles), torch.zeros_like(angles), torch.zeros_like(tilt)
    for _, block in _blocks(logits, angles.shape[-1]):
        a = block + tilt.unsqueeze(-1)
        softplus += stable_softplus(a).sum(-1)
        p, q = torch.sigmoid(a).unsqueeze(-2), torch.sigmoid(-a).unsqueeze(-2)
        log_modulus += torch.log1p((p * q) * depth).sum(-1)
        phase += torch.atan2(p * sine, q + p * cosine).sub_(p * t).sum(-1)
    return NodeSums(0.5 * log_modulus, phase, softplus)


def chunk_inclusion(logits: Tensor, rule: Quadrature) -> tuple[Tensor, Tensor]:
    r"""Inclusion probabilities of ``logits (B, N)`` and their complements, each to full relative precision.

    .. math:: \pi_i = \Re \sum_j \omega_j \frac{p_i e^{i t_j}}{q_i + p_i e^{i t_j}}
                    = p_i \sum_j \frac{p_i \Re\omega_j + q_i \Re(\omega_j e^{i t_j})}{1 - 4 p_i q_i \sin^2(t_j / 2)}
    """
    turned = rule.weights * torch.polar(torch.ones_like(rule.angles), rule.angles)
    back = rule.weights * torch.polar(torch.ones_like(rule.angles), -rule.angles)
    columns = torch.stack([rule.weights.real, turned.real, back.real], -1)  # (B, J, 3)
    depth = (-4 * torch.sin(rule.angles / 2).square()).unsqueeze(-2)
    included, excluded = torch.empty_like(logits), torch.empty_like(logits)
    for place, block in _blocks(logits, rule.angles.shape[-1]):
        a = block + rule.tilt.unsqueeze(-1)
        p, q = torch.sigmoid(a), torch.sigmoid(-a)
        sums = torch.reciprocal((p * q).unsqueeze(-1) * depth + 1) @ columns
        included[:, place] = p * (p * sums[..., 0] + q * sums[..., 1])
        excluded[:, place] = q * (q * sums[..., 0] + p * sums[..., 2])
    return included, excluded


def chunk_surprise(logits: Tensor, rule: Quadrature) -> Tensor:
    """The entropy's sum over elements, ``sum_i pi_i softplus(-a_i) + (1 - pi_i) softplus(a_i)``, ``(B,)``."""
    included, excluded = chunk_inclusion(logits, rule)
    a = logits + rule.tilt.unsqueeze(-1)
    terms = included * stable_softplus(-a) + excluded * stable_softplus(a)
    return terms.masked_fill(logits == -math.inf, 0.0).sum(-1)


def chunk_direction(logits: Tensor, rule: Quadrature, direction: Tensor) -> Tensor:
    """The sums ``sum_i r_ij v_i``, complex ``(B, J)``, that the covariance product needs from every chunk."""
    total = torch.zeros_like(rule.weights)
    for place, block in _blocks(logits, 4 * rule.angles.shape[-1]):
        r = _complex_probability(block, rule)
        total += (r * direction[:, place].unsqueeze(-1)).sum(-2)
    return total


def chunk_covariance_product(logits: Tensor, rule: Quadrature, direction: Tensor, along: Tensor) -> Tensor:
    r"""``Cov(z) v`` for the elements ``logits (B, N)``, given ``v`` there and ``along``, the whole set's `chunk_direction`.

    .. math:: (\mathrm{Cov}(z) v)_i = \Re \sum_j \omega_j \big(r_{ij} (1 - r_{ij}) v_i + r_{ij} (s_j - \bar s)\big), \quad
              \bar s = \Re \sum_j \omega_j s_j
    """
    centred = along - (rule.weights * along).real.sum(-1, keepdim=True)
    columns = torch.stack([rule.weights, rule.weights * centred], -1)
    out = torch.empty_like(direction)
    for place, block in _blocks(logits, 4 * rule.angles.shape[-1]):
        r = _complex_probability(block, rule)
        own = ((r * (1 - r)) @ columns[..., :1]).real.squeeze(-1)
        out[:, place] = own * direction[:, place] + (r @ columns[..., 1:]).real.squeeze(-1)
    return out


def in_memory(logits: Tensor, k: Tensor) -> Quadrature:
    """The quadrature of ``logits (B, N)``, float64, finite or -inf; k as in `quadrature`."""
    with torch.no_grad():
        return quadrature(
            LogitRange.of(logits),
            k,
            lambda tilt: tilted_moments(logits, tilt),
            lambda tilt, angles: chunk_node_sums(logits, tilt, angles),
        )


def log_normalizer(logits: Tensor, k: Tensor, rule: Quadrature) -> Tensor:
    """``log e_k`` of ``logits (B, N)``, ``(B,)``, twice differentiable in reverse mode, once in forward mode."""
    return _LogNormalizer.apply(logits, k, rule)


def inclusion(logits: Tensor, rule: Quadrature) -> Tensor:
    """Inclusion probabilities ``(B, N)``; their derivative is the covariance of the distribution."""
    return _Inclusion.apply(logits, rule)


def covariance_product(logits: Tensor, rule: Quadrature, direction: Tensor) -> Tensor:
    """``Cov(z) v`` for ``v (B, N)``: the Jacobian-vector product of the inclusion probabilities (symmetric)."""
    return _CovarianceProduct.apply(logits, rule, direction)


class _LogNormalizer(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, k: Tensor, rule: Quadrature) -> Tensor:
        return rule.log_normalizer(k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.rule = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.unsqueeze(-1) * inclusion(ctx.saved_tensors[0], ctx.rule), None, None

    @staticmethod
    def jvp(ctx: Any, direction: Tensor, *_: Any) -> Tensor:
        return torch.linalg.vecdot(inclusion(ctx.saved_tensors[0], ctx.rule), direction)


class _Inclusion(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, rule: Quadrature) -> Tensor:
        return chunk_inclusion(logits, rule)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.rule = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return covariance_product(ctx.saved_tensors[0], ctx.rule, grad), None

    @staticmethod
    def jvp(ctx: Any, direction: Tensor, *_: Any) -> Tensor:
        return covariance_product(ctx.saved_tensors[0], ctx.rule, direction)


class _CovarianceProduct(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, rule: Quadrature, direction: Tensor) -> Tensor:
        direction = direction.masked_fill(logits == -math.inf, 0.0)
        return chunk_covariance_product(logits, rule, direction, chunk_direction(logits, rule, direction))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.rule = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            raise NotImplementedError(
                "logits: third derivatives of the log-normaliser are not implemented; detach the logits inside the "
                "covariance product, or differentiate an enumeration (n <= 20)"
            )
        return None, None, covariance_product(logits, ctx.rule, grad)

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> Tensor:
        if directions[0] is not None:
            raise NotImplementedError("logits: third derivatives of the log-normaliser are not implemented")
        return covariance_product(ctx.saved_tensors[0], ctx.rule, directions[-1])


def stable_softplus(a: Tensor) -> Tensor:
    """``log(1 + e^a)`` to full precision (torch's softplus is the identity beyond its threshold, off by 2e-9)."""
    return F.relu(a) + torch.log1p(torch.exp(-a.abs()))


def _complex_probability(block: Tensor, rule: Quadrature) -> Tensor:
    """``r_ij``: the logistic function at ``theta_i + lambda + i t_j``, complex ``(B, N, J)``."""
    a = block + rule.tilt.unsqueeze(-1)
    p, q = torch.sigmoid(a).unsqueeze(-1), torch.sigmoid(-a).unsqueeze(-1)
    t = rule.angles.unsqueeze(-2)
    turned = torch.complex(p * torch.cos(t), p * torch.sin(t))
    return turned / (turned + q)


def _blocks(logits: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of ``logits (B, N)`` along N whose ``B x piece x width`` temporaries fit a block."""
    n = logits.shape[-1]
    size = max(1, BLOCK // max(1, logits.shape[0] * width))
    for start in range(0, n, size):
        place = slice(start, min(n, start + size))
        yield place, logits[:, place]
