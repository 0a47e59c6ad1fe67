r"""A variational autoencoder whose latent is d subsets of k out of n elements.

.. math:: -\mathrm{ELBO}(x) = E_{z \sim q(z | x)}[-\log p(x | z)] + \sum_{r=1}^{d} \mathrm{KL}(q_r \| \text{uniform}), \qquad
          \mathrm{KL}(q_r \| \text{uniform}) = \log \tbinom{n}{k} - H(q_r)

with the *exact* divergence of the k-subset distribution: :math:`H = \log e_k(e^\theta) - \theta \cdot \pi`. The published
code takes the divergence of n-way categoricals with the same logits, which is another one, and measures the
reconstruction from the most probable subsets. Both are reported: ``loss`` is the bound, ``mode_loss`` what was published.

References:
    Wijk, Vinuesa, Azizpour 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR, section 4.3:
    d = n = 10, k = 5 and d = n = 20, k = 10; layers of 512 and 256; grey values are the targets as they are.
    Niepert, Minervini, Franceschi 2021, "Implicit MLE", https://arxiv.org/abs/2106.01798 (20 x 20, k = 10).
    Sahoo et al. 2023, https://arxiv.org/abs/2205.15213 (the same, with `distset.perturb_and_map.PerturbAndMap`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent

from distset.expect import Estimator, expect
from distset.report.pictures import plot_image_rows
from distset.sets import ChunkedSet
from distset.subsets import KSubset
from distset.subsets.distribution import check_k
from distset.tasks.fading import FadingMargin
from distset.tasks.flat_images import negative_log_likelihood, perceptron, pixels, stacked
from distset.train import Example, Parts

__all__ = ["SubsetVAE", "SubsetVAETask", "subset_vae_task"]


class SubsetVAE(nn.Module):
    """Encoder and decoder.

    Args:
        pixels: of an image.
        d, n, k: subsets of a latent, elements of each, and how many of these are chosen.
        hidden: widths of the layers, from the image to the latent.

    Raises:
        ValueError: for k outside of 0..n.
    """

    def __init__(self, pixels: int, *, d: int = 20, n: int = 20, k: int = 10, hidden: tuple[int, ...] = (512, 256)) -> None:
        super().__init__()
        check_k(k, n, torch.Size())
        self.d, self.n, self.k = d, n, k
        self.encoder = perceptron(pixels, *hidden, d * n)
        self.decoder = perceptron(d * n, *reversed(hidden), pixels)

    def posterior(self, images: Tensor) -> KSubset:
        """Of ``images (B, pixels)``: subsets with batch shape ``(B, d)``."""
        return KSubset(self.encoder(images).unflatten(-1, (self.d, self.n)), self.k)

    def decode(self, z: Tensor) -> Tensor:
        """Logits of the pixels ``(*, pixels)`` for latents ``(*, d, n)``.

        The decoder gets them with mean 0 and variance 1 (0 where there is nothing to choose): the same functions as of
        zeros and ones, sooner learned.
        """
        share = self.k / self.n
        scale = math.sqrt(share * (1 - share)) or 1.0
        return self.decoder(((z - share) / scale).flatten(-2))


class SubsetVAETask(FadingMargin):
    """The negative evidence lower bound in nats an image.

    Args:
        model: encoder and decoder.
        grad: as in `distset.expect.expect`.
        num_samples: latents an image.
        at_once: images of a step that are worked on together.
        width: columns of an image, for pictures.
        measured: latents an image in the bound that is reported.
    """

    def __init__(
        self, model: SubsetVAE, grad: Estimator | None = None, *, num_samples: int = 32, at_once: int = 128, width: int = 28,
        measured: int = 4,
    ) -> None:  # fmt: skip
        self.model, self.grad, self.num_samples, self.at_once = model, grad, num_samples, at_once
        self.width, self.measured = width, measured
        if grad is not None:
            model.learned = grad.learned()

    def loss(self, example: Example, *, seed: int) -> Tensor:
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        images = stacked(examples, self.model)
        latent = self.model.posterior(images)
        reconstruction = expect(
            lambda z: self._surprise(images, z), Independent(latent, 1), self.num_samples, grad=self.grad, seed=seed
        )
        return (reconstruction + divergence(latent)).mean()

    def predict(self, set: ChunkedSet) -> Tensor:
        """Three figures in nats of an image or a group, ``(*, 3)``: bound, reconstruction in it, what was published."""
        images = pixels(set, self.model)
        latent = self.model.posterior(images)
        reconstruction = self._surprise(images, latent.sample((self.measured,), seed=0)).mean(0)
        published = self._surprise(images, latent.mode) + categorical_divergence(latent.logits)
        return torch.stack([reconstruction + divergence(latent), reconstruction, published], -1)

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """Nats an image: ``loss`` is the negative bound, ``reconstruction`` and ``divergence`` its two terms.

        ``mode_loss``: the published figure, reconstruction from the mode plus the divergence of categoricals; no bound.
        """
        bound, reconstruction, published = torch.cat([o.reshape(-1, 3) for o in outputs]).double().mean(0).tolist()
        return {
            "loss": bound,
            "reconstruction": reconstruction,
            "divergence": bound - reconstruction,
            "mode_loss": published,
        }

    @torch.no_grad()
    def draw(self, folder: Path, parts: Parts) -> None:
        """``reconstructions.png``: images, a latent of each, what it decodes to, and what latents of the prior do."""
        images = pixels(parts.test[0].set, self.model)
        images = images.reshape(-1, images.shape[-1])[:10]
        latent = self.model.posterior(images)
        z = latent.sample(seed=0)
        prior = KSubset(torch.zeros_like(z), self.model.k).sample(seed=1)
        shape = (-1, self.width)
        rows = {
            "image": images.unflatten(-1, shape),
            "latent": z,
            "decoded": torch.sigmoid(self.model.decode(z)).unflatten(-1, shape),
            "prior": torch.sigmoid(self.model.decode(prior)).unflatten(-1, shape),
        }
        plot_image_rows(rows, folder / "reconstructions.png")

    def _surprise(self, images: Tensor, z: Tensor) -> Tensor:
        return negative_log_likelihood(self.model.decode(z), images).sum(-1)


def divergence(latent: KSubset) -> Tensor:
    """``sum_r KL(q_r || uniform)`` in nats, exact, ``(*)`` of a latent with batch shape ``(*, d)``."""
    n, k = latent.n, int(latent.k.flatten()[0])
    uniform = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return (uniform - latent.entropy()).sum(-1)


def categorical_divergence(logits: Tensor) -> Tensor:
    """The published one: of n-way categoricals with these ``logits (*, d, n)`` from uniform ones, ``(*)``."""
    return (math.log(logits.shape[-1]) - Categorical(logits=logits).entropy()).sum(-1)


def subset_vae_task(
    n: int, width: int, *, subsets: int = 20, size: int = 20, k: int = 10, num_samples: int = 32,
    grad: Estimator | None = None, at_once: int = 128, measured: int = 4,
) -> SubsetVAETask:  # fmt: skip
    """The published task on images of n pixels, ``width`` a row: ``subsets`` of k out of ``size`` elements."""
    model = SubsetVAE(n, d=subsets, n=size, k=k)
    return SubsetVAETask(model, grad, num_samples=num_samples, at_once=at_once, width=width, measured=measured)
