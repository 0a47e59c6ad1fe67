r"""Control variates for the score function, each cross-fitted: what is subtracted from a sample never saw that sample.

A baseline says, for every sample s, an affine function :math:`h_s(z) = a_s + b_s \cdot (z - \pi)` made without it. Then

.. math:: \hat g = \frac1S \sum_s (f(z_s) - h_s(z_s)) (z_s - \pi) + \mathrm{Cov}(z)\, \frac1S \sum_s b_s

is unbiased whatever the functions are, since :math:`E[h(z) (z - \pi)] = \mathrm{Cov}(z)\, b`, a covariance product in O(n).

Shapes: ``S`` samples, ``B`` rows (flattened batch), ``n`` elements, ``F`` folds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Baseline", "LeaveOneOut", "NoBaseline", "Past", "Ridge", "Surrogate", "Tangent"]


class Surrogate(NamedTuple):
    """Affine functions of ``z - pi``: ``intercept (S, B)``; ``slope (F, B, n)`` of each fold, None for constants.

    ``fold (S,)`` says which slope belongs to a sample.
    """

    intercept: Tensor
    slope: Tensor | None = None
    fold: Tensor | None = None


class Samples(NamedTuple):
    """What a baseline is made from: ``values (S, B)``, ``centred (S, B, n)`` samples, ``slopes (S, B, n)`` of f or None."""

    values: Tensor
    centred: Tensor
    slopes: Tensor | None


class Baseline(ABC):
    """A cross-fitted control variate."""

    least = 1
    needs_differentiable_f = False
    needs_inclusion = True

    @abstractmethod
    def fit(self, samples: Samples) -> Surrogate: ...

    def update(self, samples: Samples) -> None:
        """Learn for later steps; called after the gradient of this one is made."""
        return


class NoBaseline(Baseline):
    """Nothing is subtracted: the plain score function."""

    def fit(self, samples: Samples) -> Surrogate:
        return Surrogate(torch.zeros_like(samples.values))

    def __repr__(self) -> str:
        return "NoBaseline()"


class LeaveOneOut(Baseline):
    r"""The mean of the *other* samples: the gradient is the sample covariance of z and f, and pi is not needed.

    .. math:: \hat g = \frac{1}{S - 1} \sum_s (f(z_s) - \bar f)(z_s - \bar z)
    """

    least = 2
    needs_inclusion = False

    def fit(self, samples: Samples) -> Surrogate:
        total, count = samples.values.sum(0), len(samples.values)
        return Surrogate((total - samples.values) / (count - 1))

    def __repr__(self) -> str:
        return "LeaveOneOut()"


class Ridge(Baseline):
    """A ridge regression of f on z, fitted on the other folds of the samples; needs nothing from f.

    Its penalty, and the factor in [0, 1] by which its prediction is shrunk, are chosen by the leave-one-out error *within*
    those folds. With one sample nothing is subtracted, with two to five a mean.

    Args:
        folds: into which the samples are split; no more than there are samples.

    Raises:
        ValueError: for fewer than 2 folds.
    """

    def __init__(self, folds: int = 8) -> None:
        self.folds = _checked_folds(folds)

    def fit(self, samples: Samples) -> Surrogate:
        return _cross_fit(samples, self.folds, lambda train: _ridge(train.values, train.centred))

    def __repr__(self) -> str:
        return f"Ridge(folds={self.folds})"


class Tangent(Baseline):
    """The mean slope of f at the other samples, shrunk, and a ridge regression of what it leaves; f differentiable.

    The slope is what `Simple` follows, here without its bias.

    Raises:
        ValueError: for fewer than 2 folds.
    """

    needs_differentiable_f = True

    def __init__(self, folds: int = 8) -> None:
        self.folds = _checked_folds(folds)

    def fit(self, samples: Samples) -> Surrogate:
        def fitted(train: Samples) -> Tensor:
            assert train.slopes is not None, "asked for by needs_differentiable_f"
            return _shrunk_then_ridge(train, train.slopes.mean(0))

        return _cross_fit(samples, self.folds, fitted)

    def __repr__(self) -> str:
        return f"Tangent(folds={self.folds})"


class Past(nn.Module, Baseline):
    """A slope learned from past steps, shared by all rows; its coefficient is fitted on the other folds of this step.

    A slope that went stale is switched off by its coefficient. As a module it is saved with a checkpoint; give it to the
    model, and to `ScoreFunction`.

    Args:
        n: elements of z; where f sees several subsets together, of all of them.
        rate: share of the newly fitted slope that is taken over in each step.
        folds: as in `Ridge`.

    Raises:
        ValueError: for a rate outside of (0, 1], fewer than 2 folds; on use, for draws of another n.
    """

    slope: Tensor

    def __init__(self, n: int, *, rate: float = 0.1, folds: int = 8) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"rate: got {rate}, wanted a share in (0, 1]")
        self.rate, self.folds = rate, _checked_folds(folds)
        self.register_buffer("slope", torch.zeros(n, dtype=torch.float64))

    def fit(self, samples: Samples) -> Surrogate:
        n = samples.centred.shape[-1]
        if len(self.slope) != n:
            raise ValueError(f"n: got {self!r} where a draw has {n} elements, wanted Past(n={n})")
        return _cross_fit(samples, self.folds, lambda train: _coefficient(train, self.slope).unsqueeze(-1) * self.slope)

    def update(self, samples: Samples) -> None:
        if len(samples.values) >= FEWEST:
            left = samples.values - samples.centred @ self.slope
            self.slope += self.rate * _step(left, samples.centred).mean(0)

    def __repr__(self) -> str:
        return f"Past(n={len(self.slope)}, rate={self.rate}, folds={self.folds})"


# Penalties of the ridge regression, relative to the mean squared length of a centred sample in the training folds.
PENALTIES = (0.3, 1.0, 3.0)
# The F statistic below which a prediction is not trusted: of one given direction, and of as many as there are samples.
DOUBT_ONE, DOUBT_ALL = 4.0, 8.0
# So many times as much evidence is wanted, at most, of a fit by the weakest penalty.
MORE_DOUBT = 3.0
# Training samples below which no slope is fitted, a mean only.
FEWEST = 5


def _cross_fit(samples: Samples, folds: int, fit_slope: Callable[[Samples], Tensor]) -> Surrogate:
    """Fit on all folds but one, for each; intercepts make the residual's mean over the training folds zero."""
    count = len(samples.values)
    folds = min(folds, count)
    fold = torch.arange(count, device=samples.values.device) * folds // count
    intercept = torch.zeros_like(samples.values)
    slopes = samples.centred.new_zeros(folds, *samples.centred.shape[1:])
    for number in range(folds):
        here = fold == number
        train = Samples(*(None if part is None else part[~here] for part in samples))  # type: ignore[arg-type]
        if not len(train.values):
            continue
        if len(train.values) >= FEWEST:
            slopes[number] = fit_slope(train)
        intercept[here] = train.values.mean(0) - torch.linalg.vecdot(train.centred.mean(0), slopes[number])
    return Surrogate(intercept, slopes, fold)


def _ridge(values: Tensor, x: Tensor) -> Tensor:
    """The shrunk ridge slope ``(B, n)`` of ``values (T, B)`` on ``x (T, B, n)``.

    Worked out along the r = min(T, n) principal directions of x, in which every penalty is a division: W ``(B, T, r)`` are
    the samples' coordinates, of squared lengths ``spectrum (B, r)``. The leave-one-out error leaves out a subset with all
    its copies: beside a copy of itself every sample is foretold.
    """
    count = len(values)
    xc, fc = (x - x.mean(0)).transpose(0, 1), (values - values.mean(0)).T  # (B, T, n), (B, T)
    spectrum, W, slope_of = _principal(xc)
    size = (spectrum.sum(-1) / count).clamp_min(torch.finfo(x.dtype).tiny)
    along = (W.mT @ fc.unsqueeze(-1)).squeeze(-1)
    copies = _copies(W)
    different = copies.reciprocal().sum(-1)
    wanted = fc * count / (count - copies).clamp_min(1)  # f less the mean of the others
    best, chosen = torch.full_like(size, torch.inf), torch.zeros_like(along)
    for penalty in PENALTIES:
        inverse = 1 / (spectrum + (penalty * size).unsqueeze(-1))
        leverage = (W.square() @ inverse.unsqueeze(-1)).squeeze(-1) + 1 / count
        fitted = (W @ (inverse * along).unsqueeze(-1)).squeeze(-1)
        predicted = wanted - (fc - fitted) / (1 - copies * leverage).clamp_min(1e-9)  # by the others
        factor = _shrinkage(predicted, wanted, different, _doubt(penalty, spectrum.shape[-1], count)).unsqueeze(-1)
        error = (wanted - factor * predicted).square().sum(-1)
        chosen = (factor * inverse * along).where((error < best).unsqueeze(-1), chosen)
        best = torch.minimum(error, best)
    return slope_of(chosen)


def _copies(W: Tensor) -> Tensor:
    """How many of the samples with coordinates ``W (B, T, r)`` are the same subset as each, itself counted, ``(B, T)``."""
    gram = W @ W.mT
    length = gram.diagonal(dim1=-2, dim2=-1)
    apart = length.unsqueeze(-1) + length.unsqueeze(-2) - 2 * gram  # squared, and an even number: 0, 2, 4, ...
    return (apart < 1).sum(-1).to(W)


def _step(values: Tensor, x: Tensor) -> Tensor:
    """The ridge slope ``(B, n)`` of penalty 1: not shrunk, since steps to come average what chance puts into it."""
    xc, fc = (x - x.mean(0)).transpose(0, 1), (values - values.mean(0)).T
    spectrum, W, slope_of = _principal(xc)
    size = spectrum.sum(-1, keepdim=True) / len(values)
    return slope_of((W.mT @ fc.unsqueeze(-1)).squeeze(-1) / (spectrum + size.clamp_min(torch.finfo(x.dtype).tiny)))


def _principal(xc: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Spectrum and coordinates of ``xc (B, T, n)``, and the map from coordinates back to slopes ``(B, n)``."""
    if xc.shape[-2] > xc.shape[-1]:
        spectrum, V = torch.linalg.eigh(xc.mT @ xc)
        return spectrum.clamp_min(0), xc @ V, lambda c: (V @ c.unsqueeze(-1)).squeeze(-1)
    spectrum, U = torch.linalg.eigh(xc @ xc.mT)
    root = spectrum.clamp_min(0).sqrt()
    inverse = torch.where(root > 1e-7 * root.amax(-1, keepdim=True), 1 / root, 0.0)
    W = U * root.unsqueeze(-2)
    return spectrum.clamp_min(0), W, lambda c: (xc.mT @ (U @ (inverse * c).unsqueeze(-1))).squeeze(-1)


def _doubt(penalty: float, directions: int, count: int) -> float:
    r"""The F statistic wanted of a ridge fit of so many directions to ``count`` samples: :math:`8 \rho`, their ratio.

    By the weakest penalty :math:`8 \rho^2 / (1 - \rho)^2`, between that and 3 times that: chance alone explains
    :math:`\rho / (1 - \rho)` of what it leaves, so that near as many directions as samples the errors within the training
    folds, from which the statistic comes, say little about those outside. A stronger penalty fits fewer directions.
    """
    share = directions / count
    if penalty > PENALTIES[0]:
        return DOUBT_ALL * share
    odds = share / (1 - share) if share < 1 else torch.inf
    return DOUBT_ALL * min(max(odds**2, share), MORE_DOUBT * share)


def _shrinkage(predicted: Tensor, wanted: Tensor, count: Tensor | int, doubt: float) -> Tensor:
    """The factor in [0, 1] by which ``predicted (*, T)`` is to be trusted to predict ``wanted``, of ``count`` subsets.

    The least-squares factor, shrunk as James and Stein do by the F statistic of the prediction; 0 where that is below
    ``doubt``: a baseline that only chance speaks for is not used.
    """
    tiny = torch.finfo(predicted.dtype).tiny
    both, own = torch.linalg.vecdot(predicted, wanted), predicted.square().sum(-1).clamp_min(tiny)
    explained = both.clamp_min(0).square() / own
    left = (wanted.square().sum(-1) - explained).clamp_min(0)
    trust = (1 - doubt * left / (count * explained).clamp_min(tiny)).clamp_min(0)
    return (both / own).clamp(0, 1) * trust


def _coefficient(train: Samples, slope: Tensor) -> Tensor:
    """How much of ``slope (n,)`` or ``(B, n)`` the training samples confirm, ``(B,)``."""
    predicted = torch.linalg.vecdot(train.centred, slope)
    centred = (train.values - train.values.mean(0)).T
    return _shrinkage((predicted - predicted.mean(0)).T, centred, len(predicted), DOUBT_ONE)


def _shrunk_then_ridge(train: Samples, slope: Tensor) -> Tensor:
    shrunk = _coefficient(train, slope).unsqueeze(-1) * slope
    return shrunk + _ridge(train.values - torch.linalg.vecdot(train.centred, shrunk), train.centred)


def _checked_folds(folds: int) -> int:
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds: got {folds!r}, wanted at least 2: a sample's baseline comes from the other folds")
    return folds
