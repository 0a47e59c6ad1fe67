"""Sets of points, each drawn from a Gaussian mixture of its own: the task of amortized clustering.

References:
    Lee et al.: Set Transformer. ICML 2019. https://arxiv.org/abs/1810.00825
    Willette et al.: Scalable Set Encoding with Universal Mini-Batch Consistency and Unbiased Full Set Gradient
    Approximation. ICML 2023, appendix C. https://arxiv.org/abs/2208.12401
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distset.seeds import seed_for

__all__ = ["DrawnMixture", "MixtureSets"]

FloatArray = NDArray[np.float32]


class DrawnMixture(NamedTuple):
    """Points ``(N, D)``, the component ``labels (N)`` each came from, and the mixture: ``weights (K)``, ``means (K, D)`` and
    standard deviations ``scales (K, D)``."""

    points: FloatArray
    labels: NDArray[np.int64]
    weights: FloatArray
    means: FloatArray
    scales: FloatArray

    def log_density(self) -> FloatArray:
        """Of every point under the mixture it came from, ``(N)``: no model can do better on average."""
        z = (self.points[:, None] - self.means) / self.scales
        log_normal = -0.5 * (z**2).sum(-1) - np.log(self.scales).sum(-1) - 0.5 * z.shape[-1] * np.log(2 * np.pi)
        return np.logaddexp.reduce(log_normal + np.log(np.maximum(self.weights, 1e-30)), axis=-1)


class MixtureSets:
    r"""Sets that are made when asked for; set i is a pure function of (seed, i).

    .. math:: \pi \sim \mathrm{Dirichlet}(1, \dots, 1), \quad \mu_{kd} \sim U(-s, s), \quad \sigma_{kd} \sim U(a, b), \quad
              z_i \sim \pi, \quad x_i \sim N(\mu_{z_i}, \mathrm{diag}\, \sigma_{z_i}^2).

    Args:
        count: how many sets.
        size: points N of a set.
        components: K.
        dim: D.
        spread: s, means lie in a box of twice this side.
        scale: (a, b), the range of standard deviations: (0.1, 0.6) in the published code.
        seed: of everything.

    Raises:
        ValueError: for numbers below 1, a scale that is no positive range.

    Example:
        >>> sets = MixtureSets(1000, size=64)
        >>> sets.draw(7).points.shape, bool((sets.draw(7).points == sets.draw(7).points).all())
        ((64, 2), True)
    """

    def __init__(
        self,
        count: int,
        *,
        size: int = 1024,
        components: int = 4,
        dim: int = 2,
        spread: float = 4.0,
        scale: Sequence[float] = (0.1, 0.6),
        seed: int = 0,
    ) -> None:
        if min(count, size, components, dim) < 1:
            raise ValueError(
                f"count, size, components, dim: got {count}, {size}, {components}, {dim}, wanted at least 1 of each"
            )
        if not 0 < scale[0] <= scale[1] or not spread >= 0:
            raise ValueError(f"scale, spread: got {list(scale)} and {spread}, wanted 0 < from <= to and a box of 0 or more")
        self.count, self.size, self.components, self.dim = count, size, components, dim
        self.spread, self.scale, self.seed = spread, scale, seed

    def __len__(self) -> int:
        return self.count

    def draw(self, index: int) -> DrawnMixture:
        """Set ``index``."""
        if not 0 <= index < self.count:
            raise IndexError(f"index: got {index}, wanted 0 to {self.count - 1}")
        random = np.random.Generator(np.random.Philox(key=seed_for(self.seed, index)))
        shares = random.standard_exponential(self.components)  # normalised: Dirichlet(1, ..., 1)
        bounds = np.cumsum(shares) / shares.sum()
        labels = np.minimum(np.searchsorted(bounds, random.random(self.size), side="right"), self.components - 1)
        shape = (self.components, self.dim)
        means = random.uniform(-self.spread, self.spread, shape).astype(np.float32)
        scales = random.uniform(self.scale[0], self.scale[1], shape).astype(np.float32)
        noise = random.standard_normal((self.size, self.dim), dtype=np.float32)
        points = means[labels] + scales[labels] * noise
        return DrawnMixture(points, labels, (shares / shares.sum()).astype(np.float32), means, scales)
