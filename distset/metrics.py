"""What no library measures: the overlap of subsets, and how good an estimator of a gradient is.

AUROC and its kin are scikit-learn's business; `distset.report` puts intervals around them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Estimate", "EstimatorError", "estimator_error", "jaccard"]


def jaccard(chosen: Tensor, truth: Tensor) -> Tensor:
    r"""The Jaccard index of subsets, :math:`|A \cap B| / |A \cup B|`; 1 where both are empty.

    Args:
        chosen, truth: subsets as bool ``(*, N)``, True where an element is in.

    Returns:
        ``(*)`` in torch's default precision.

    Raises:
        ValueError: for tensors that are not bool or whose shapes differ.

    Example:
        >>> import torch
        >>> from distset.metrics import jaccard
        >>> jaccard(torch.tensor([True, True, False]), torch.tensor([False, True, True]))
        tensor(0.3333)
    """
    for name, subset in (("chosen", chosen), ("truth", truth)):
        if subset.dtype != torch.bool:
            raise ValueError(f"{name}: got {subset.dtype}, wanted torch.bool, True where an element is in the subset")
    if chosen.shape != truth.shape:
        raise ValueError(f"chosen, truth: got shapes {tuple(chosen.shape)} and {tuple(truth.shape)}, wanted the same")
    dtype = torch.get_default_dtype()
    both, either = (chosen & truth).sum(-1, dtype=dtype), (chosen | truth).sum(-1, dtype=dtype)
    return torch.where(either == 0, 1.0, both / either.clamp_min(1))


class Estimate(NamedTuple):
    """A figure with its Monte-Carlo standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


class EstimatorError(NamedTuple):
    """How far an estimator is from the truth; ``mean_squared = bias_squared + variance``, exactly."""

    bias_squared: Estimate
    variance: Estimate
    mean_squared: Estimate
    cosine: Estimate


def estimator_error(samples: Tensor, truth: Tensor) -> EstimatorError:
    r"""Bias, variance and direction of an estimator :math:`\hat g` of a gradient :math:`g`, from S independent draws.

    .. math:: \|E \hat g - g\|^2, \qquad \operatorname{tr} \operatorname{Cov} \hat g, \qquad E \|\hat g - g\|^2, \qquad
              E (1 - \cos(\hat g, g)).

    Each is estimated without bias: the first by the products of *different* draws,
    :math:`\frac{1}{S(S-1)} \sum_{s \ne t} (\hat g_s - g)^\top (\hat g_t - g)`, which is therefore as often below zero as
    above where there is no bias (the squared norm of the mean error, which it is often taken for, holds 1/S of the
    variance). Its error, and the variance's, are the jackknife's, which for the bias of an unbiased estimator is too
    large by a factor of 1.4; the others are those of means over the draws.

    Args:
        samples: ``(S, *shape)``, S of at least 3.
        truth: ``(*shape)``.

    Raises:
        ValueError: for shapes that do not fit, fewer than 3 draws, or values that are not finite.

    Example:
        >>> import torch
        >>> from distset.metrics import estimator_error
        >>> draws = 1 + torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0))
        >>> error = estimator_error(draws, truth=torch.ones(3))
        >>> abs(error.bias_squared.value) < 0.01, abs(error.variance.value - 3) < 0.1
        (True, True)
    """
    if samples.shape[1:] != truth.shape or samples.dim() == 0:
        raise ValueError(f"samples: got shape {tuple(samples.shape)}, wanted (S, *{tuple(truth.shape)}), the truth's shape")
    draws = len(samples)
    if draws < 3:
        raise ValueError(f"samples: got {draws} draws, wanted at least 3 to tell noise from bias")
    if not (samples.isfinite().all() and truth.isfinite().all()):
        raise ValueError("samples, truth: got values that are not finite; clean the gradients first")
    g_SD, g_D = samples.detach().reshape(draws, -1).double(), truth.detach().reshape(-1).double()
    off_SD = g_SD - g_D
    squares, total = off_SD.square().sum(-1), off_SD.sum(0)
    # Leaving out draw s takes |off_s|² from the squares, and leaves |total - off_s|² of the squared total.
    left_squares = squares.sum() - squares
    left_total = (total - off_SD).square().sum(-1)
    bias = (total.square().sum() - squares.sum()) / (draws * (draws - 1))
    left_bias = (left_total - left_squares) / ((draws - 1) * (draws - 2))
    left_variance = left_squares / (draws - 1) - left_bias
    return EstimatorError(
        Estimate(float(bias), _jackknife(left_bias)),
        Estimate(float(squares.mean() - bias), _jackknife(left_variance)),
        _mean(squares),
        _mean(1 - F.cosine_similarity(g_SD, g_D.unsqueeze(0), dim=-1)),
    )


def _jackknife(left_out: Tensor) -> float:
    """The standard error of a statistic from its values with each draw left out."""
    return float(((len(left_out) - 1) * left_out.var(correction=0)).sqrt())


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))
