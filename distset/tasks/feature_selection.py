r"""Feature selection: which k of n pixels let a network paint the rest.

.. math:: \min_{\theta, w}\ E_{z \sim p_\theta}\ \mathrm{BCE}\big(x, g_w(z \odot x)\big), \qquad \textstyle\sum_i z_i = k

with one subset for all images. The logits get their gradient from `distset.expect`, the network its own.

References:
    Wijk, Vinuesa, Azizpour 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR, section 4.2:
    n = 784, k = 30 or 50, 32 samples, hidden layers of 200, on MNIST and Fashion-MNIST. Grey values are the targets as
    they are, one draw of masks serves all images of a step, and what is measured is the reconstruction from the k most
    probable pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distset.expect import Estimator, expect
from distset.report.pictures import plot_image_rows
from distset.sets import ChunkedSet
from distset.subsets import KSubset
from distset.subsets.distribution import check_k
from distset.tasks.flat_images import negative_log_likelihood, perceptron, pixels, stacked
from distset.train import Example, Parts

__all__ = ["FeatureSelection", "FeatureSelectionTask", "feature_selection_task"]


class FeatureSelection(nn.Module):
    """Logits of the pixels, and the network that reconstructs an image from the chosen ones.

    Args:
        n, k: pixels, and how many are chosen.
        hidden: width of the two hidden layers.

    Raises:
        ValueError: for k outside of 0..n.
    """

    def __init__(self, n: int, k: int, *, hidden: int = 200) -> None:
        super().__init__()
        check_k(k, n, torch.Size())
        self.k = k
        self.logits = nn.Parameter(torch.randn(n))
        self.network = perceptron(n, hidden, hidden, n)

    @property
    def subset(self) -> KSubset:
        return KSubset(self.logits, self.k)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Logits of the reconstructions ``(S, B, n)`` of ``images (B, n)`` from ``masks (S, n)``."""
        return self.network(masks.unsqueeze(-2) * images)


class FeatureSelectionTask:
    """The mean binary cross-entropy over masks, images and pixels.

    Args:
        model: logits and network.
        grad: as in `distset.expect.expect`.
        num_samples: masks a group of images is seen through.
        at_once: images in such a group.
        width: columns of an image, for pictures.
    """

    def __init__(
        self, model: FeatureSelection, grad: Estimator | None = None, *, num_samples: int = 32, at_once: int = 128,
        width: int = 28,
    ) -> None:  # fmt: skip
        self.model, self.grad, self.num_samples, self.at_once, self.width = model, grad, num_samples, at_once, width
        if grad is not None:
            model.learned = grad.learned()

    def loss(self, example: Example, *, seed: int) -> Tensor:
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        images = stacked(examples, self.model)
        return expect(
            lambda masks: self.cross_entropy(images, masks).mean(-1), self.model.subset, self.num_samples, grad=self.grad,
            seed=seed,
        )  # fmt: skip

    def cross_entropy(self, images: Tensor, masks: Tensor) -> Tensor:
        """Of every image ``(B, n)`` from every mask ``(S, n)``, a mean over pixels: ``(S, B)``."""
        return negative_log_likelihood(self.model(images, masks), images).mean(-1)

    def predict(self, set: ChunkedSet) -> Tensor:
        """The cross-entropy of an image or a group, ``(*)``, from the k most probable pixels, as published."""
        images = pixels(set, self.model)
        mask = self.model.subset.mode.unsqueeze(0)
        return self.cross_entropy(images.reshape(-1, images.shape[-1]), mask).reshape(images.shape[:-1])

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """``loss``: the binary cross-entropy of a pixel."""
        return {"loss": float(torch.cat([output.reshape(-1) for output in outputs]).double().mean())}

    @torch.no_grad()
    def draw(self, folder: Path, parts: Parts) -> None:
        """``chosen.png``: the logits, the chosen pixels on images, and what the network makes of them."""
        images = pixels(parts.test[0].set, self.model)
        images = images.reshape(-1, images.shape[-1])[:10]
        mask = self.model.subset.mode
        shape = (-1, self.width)
        rows = {
            "logits": self.model.logits.unflatten(0, shape).unsqueeze(0),
            "image": images.unflatten(-1, shape),
            "chosen": images.unflatten(-1, shape),
            "painted": torch.sigmoid(self.model(images, mask.unsqueeze(0))[0]).unflatten(-1, shape),
        }
        plot_image_rows(rows, folder / "chosen.png", marks={"chosen": mask.reshape(shape)})


def feature_selection_task(
    n: int, width: int, *, k: int, hidden: int = 200, num_samples: int = 32, grad: Estimator | None = None,
    at_once: int = 128,
) -> FeatureSelectionTask:  # fmt: skip
    """The published task on images of n pixels, ``width`` a row; arguments as in the classes."""
    model = FeatureSelection(n, k, hidden=hidden)
    return FeatureSelectionTask(model, grad, num_samples=num_samples, at_once=at_once, width=width)
