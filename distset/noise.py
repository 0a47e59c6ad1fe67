r"""Noise for sampling as an argmax: perturb the scores, then let a solver decide.

Adding independent noise to the scores of a discrete exponential family and solving for the best structure draws from it,
exactly where the noise is Gumbel and the structures are one-hot, approximately otherwise (Papandreou and Yuille 2011).
Each noise is a small value with ``sample(shape, ...)``; the generator is explicit, or torch's default one.

References:
    Niepert, Minervini, Franceschi 2021, "Implicit MLE: Backpropagating Through Discrete Exponential Family
    Distributions", https://arxiv.org/abs/2106.01798 (sum of gamma, section 3.3).
    Sahoo, Paulus, Vlastelica, Musil, Kuleshov, Martius 2023, "Backpropagation through Combinatorial Algorithms: Identity
    with Projection Works", https://arxiv.org/abs/2205.15213 (two-point margin, section 3.4; sampling, section 4.1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["Fading", "Gumbel", "Noise", "Normal", "SumOfGamma", "TwoPoint", "Uniform"]


class Noise(ABC):
    """Independent noise for every element of a tensor."""

    @abstractmethod
    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A draw of the given shape; the generator lives on ``device``, None is torch's default one."""

    def score(self, draw: Tensor) -> Tensor:
        """``-d log p(draw) / d draw``, which the gradient of an expectation over the noise is made of.

        Raises:
            ValueError: for noise without a smooth density.
        """
        raise ValueError(f"noise: got {self}, which has no smooth density, wanted Normal or Gumbel")

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({named})"


class Gumbel(Noise):
    """Gumbel noise ``-scale log E``, ``E`` standard exponential: the argmax of perturbed logits is a categorical draw.

    Raises:
        ValueError: for a scale that is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _positive("scale", scale)

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        wide = _at_least_float32(dtype)
        exponential = torch.empty(tuple(shape), dtype=wide, device=device).exponential_(generator=generator)
        return exponential.clamp_min_(torch.finfo(wide).tiny).log_().mul_(-self.scale).to(dtype)

    def score(self, draw: Tensor) -> Tensor:
        return -torch.expm1(-draw / self.scale) / self.scale


class SumOfGamma(Noise):
    r"""Noise whose sum over ``k`` elements is Gumbel: made for structures with ``k`` ones.

    .. math:: \frac{\text{scale}}{k}\Big(\sum_{i=1}^{\text{terms}} \mathrm{Gamma}(1/k,\ k/i) - \log\text{terms}\Big)

    (shape and scale of the gamma distribution). The sum of ``k`` draws tends to ``Gumbel(scale)`` as ``terms`` grows;
    its error in mean is about ``scale / (2 terms)``, the same for all structures of ``k`` ones: it does not change who wins.

    Args:
        k: ones in a structure; a tensor that broadcasts to what is drawn has them for each row.
        scale: the temperature tau of the perturbed distribution.
        terms: terms of the series; 10 as published.

    Raises:
        ValueError: for ``k`` or ``terms`` below 1 or between whole numbers, a scale that is not positive.
    """

    def __init__(self, k: int | Tensor, scale: float = 1.0, terms: int = 10) -> None:
        for name, value in (("k", k), ("terms", terms)):
            _check_counts(name, value)
        self.k, self.scale, self.terms = k, _positive("scale", scale), terms

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        k = torch.as_tensor(self.k, dtype=_at_least_float32(dtype), device=device)
        concentration = (1 / k).expand(tuple(shape)).contiguous()
        total = torch.zeros_like(concentration)
        for i in range(1, self.terms + 1):
            total += torch._standard_gamma(concentration, generator=generator) * (k / i)
        return total.sub_(math.log(self.terms)).mul_(self.scale / k).to(dtype)


class TwoPoint(Noise):
    """Either ``-width / 2`` or ``width / 2``, a fair coin for each element: the margin of Identity with projection.

    Raises:
        ValueError: for a negative width.
    """

    def __init__(self, width: float) -> None:
        self.width = _not_negative("width", width)

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        coins = torch.randint(0, 2, tuple(shape), generator=generator, dtype=dtype, device=device)
        return coins.sub_(0.5).mul_(self.width)


class Fading(Noise):
    """Noise that gets weaker as training goes on: ``1 - share / over`` of it is left when a ``share`` of the steps is done.

    A margin of one width keeps answers apart by more than the truth may be: at first it unfolds what the costs are made
    of, at the end it would bend it. Whoever trains calls `progress`; `distset.train.fit` has the task do so.

    Args:
        noise: at full strength.
        over: share of the training at which none is left.

    Raises:
        ValueError: for something else than noise, ``over`` outside 0 to 1.

    Example:
        >>> import torch
        >>> margin = Fading(TwoPoint(0.2), over=0.5)
        >>> margin.progress(0.4)
        >>> margin.sample((2, 3)).abs()
        tensor([[0.0200, 0.0200, 0.0200],
                [0.0200, 0.0200, 0.0200]])
    """

    def __init__(self, noise: Noise, over: float = 0.7) -> None:
        if not 0 < over <= 1:
            raise ValueError(f"over: got {over}, wanted a share of the training above 0 and up to 1")
        self.noise, self.over, self.strength = check_noise("noise", noise), over, 1.0

    def progress(self, share: float) -> None:
        """A ``share`` of the training, 0 to 1, is done."""
        self.strength = max(0.0, 1 - share / self.over)

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        return self.noise.sample(shape, generator, dtype, device).mul_(self.strength)


class Uniform(Noise):
    """Uniform on ``[-width / 2, width / 2)``.

    Raises:
        ValueError: for a negative width.
    """

    def __init__(self, width: float) -> None:
        self.width = _not_negative("width", width)

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=device).sub_(0.5).mul_(self.width)


class Normal(Noise):
    """Normal noise of mean 0 and standard deviation ``scale``.

    Raises:
        ValueError: for a scale that is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _positive("scale", scale)

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device).mul_(self.scale)

    def score(self, draw: Tensor) -> Tensor:
        return draw / self.scale**2


def check_noise(name: str, noise: object) -> Noise:
    """Raise ValueError for what is no noise at all."""
    if isinstance(noise, Noise):
        return noise
    came = f"the class {noise.__name__}" if isinstance(noise, type) else repr(noise)
    raise ValueError(
        f"{name}: got {came}, wanted noise, such as Normal(scale), Gumbel(scale), SumOfGamma(k), TwoPoint(width)"
    )


def _check_counts(name: str, counts: int | Tensor) -> None:
    if isinstance(counts, Tensor):
        wrong = counts[~((counts >= 1) & (counts == counts.long()))].tolist()
    else:
        whole = isinstance(counts, Integral) and not isinstance(counts, bool)
        wrong = [] if whole and counts >= 1 else [counts]
    if wrong:
        raise ValueError(f"{name}: got {wrong[0]!r}, wanted a whole number of at least 1")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Half precision has neither the range nor the tails: draw wider, round at the end."""
    return dtype if dtype == torch.float64 else torch.float32


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, wanted a positive finite number")
    return float(value)


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, wanted a finite number of at least 0")
    return float(value)
