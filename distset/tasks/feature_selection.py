r"""Feature selection: which k of n pixels let a network paint the rest.

.. math:: \min_{\theta, w}\ E_{z \sim p_\theta}\ \mathrm{BCE}\big(x, g_w(z \odot x)\big), \qquad \textstyle\sum_i z_i = k

with one mask for all images. The logits get their gradient from `distset.expect`, the network its own.

References:
    Wijk, Vinuesa, Azizpour 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR, section 4.2:
    n = 784, k = 30 or 50, 32 samples, hidden layers of 200, on MNIST and Fashion-MNIST.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.expect import Estimator, expect
from distset.seeds import generator_for, seed_for
from distset.subsets import KSubset

__all__ = ["FeatureSelection", "Selected", "select_features"]


class FeatureSelection(nn.Module):
    """Logits of the pixels, and the network that reconstructs an image from the chosen ones.

    Args:
        n, k: pixels, and how many are chosen.
        hidden: width of the two hidden layers.
        num_samples: masks a step.
        grad: as in `distset.expect.expect`.
        seed: of the first logits, standard normal as published.
    """

    def __init__(
        self, n: int, k: int, *, hidden: int = 200, num_samples: int = 32, grad: Estimator | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.k, self.num_samples, self.grad = k, num_samples, grad
        self.logits = nn.Parameter(torch.randn(n, generator=generator_for(seed, "logits")))
        self.reconstruct = nn.Sequential(
            nn.Linear(n, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n)
        )

    @property
    def subset(self) -> KSubset:
        return KSubset(self.logits, self.k)

    def loss(self, images: Tensor, *, seed: int) -> Tensor:
        """The mean binary cross-entropy over masks, images ``(B, n)`` in [0, 1] and pixels."""
        return expect(
            lambda masks: self.cross_entropy(images, masks), self.subset, self.num_samples, grad=self.grad, seed=seed
        )

    def cross_entropy(self, images: Tensor, masks: Tensor) -> Tensor:
        """Of reconstructions from ``masks (S, n)``, ``(S,)``."""
        painted = self.reconstruct(masks.unsqueeze(-2) * images)
        wanted = images.expand_as(painted)
        return F.binary_cross_entropy_with_logits(painted, wanted, reduction="none").mean((-2, -1))

    @torch.no_grad()
    def evaluate(self, images: Tensor, batch: int = 1000) -> float:
        """The binary cross-entropy with the k most probable pixels, as published."""
        mask = self.subset.mode.unsqueeze(0)
        total = sum(float(self.cross_entropy(part, mask)) * len(part) for part in images.split(batch))
        return total / len(images)


class Selected(NamedTuple):
    """A training step: its number and loss."""

    step: int
    loss: float


def select_features(
    model: FeatureSelection, images: Tensor, *, steps: int, batch: int = 128, rate: float = 1e-3, seed: int = 0
) -> Iterator[Selected]:
    """Train with Adam on minibatches of ``images (N, n)``; yields after every step.

    Which images a step sees and which masks it draws is a function of (seed, step).

    Raises:
        ValueError: for images that are not of the model's n pixels in [0, 1].
    """
    n = len(model.logits)
    if images.dim() != 2 or images.shape[1] != n or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"images: got shape {tuple(images.shape)}, wanted (N, {n}) with values in [0, 1]")
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        picked = torch.randint(len(images), (batch,), generator=generator_for(seed, "batch", step))
        loss = model.loss(images[picked], seed=seed_for(seed, "masks", step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield Selected(step, float(loss.detach()))
