r"""Stochastic nearest neighbours: an embedding in which k random neighbours share a query's class.

The k neighbours of a query are a k-subset of candidates with logits :math:`-\|e(q) - e(c_i)\|`; the loss is the share of
them that have another class, up to a constant:

.. math:: \ell = -\frac1k\, E_{z \sim p} \sum_i z_i\, [y_i = y_q].

It is linear in z, so that SIMPLE and a linear control variate have nothing to lose here.

References:
    Grover, Wang, Zweig, Ermon 2019, "Stochastic Optimization of Sorting Networks via Continuous Relaxations",
    https://arxiv.org/abs/1903.08850 (differentiable nearest neighbours).
    Wijk, Vinuesa, Azizpour 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR, section 4.4: 128
    candidates and 128 queries a step, k = 10, an embedding of 2 dimensions; the class of a query is that of most of its 10
    nearest of all training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distset.expect import Estimator, expect
from distset.report.plots import new_axes, new_figure, save
from distset.sets import ChunkedSet
from distset.subsets import KSubset
from distset.tasks.flat_images import perceptron, pixels, stacked
from distset.train import Example, Parts

__all__ = ["Labelled", "SubsetKNN", "SubsetKNNTask", "subset_knn_task"]


class Labelled(NamedTuple):
    """Class numbers ``(B)`` of a group of images, and whether they are asked for; else they are neighbours to find."""

    labels: Tensor
    query: bool


class SubsetKNN(nn.Module):
    """The embedding.

    Args:
        n: pixels of an image.
        dim: of the embedding.
        hidden: widths of the layers.
    """

    def __init__(self, n: int, *, dim: int = 2, hidden: tuple[int, ...] = (512, 256)) -> None:
        super().__init__()
        self.embed = perceptron(n, *hidden, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images)


class SubsetKNNTask:
    """The loss above; half of a step's images are queries, the other half their candidates.

    Args:
        model: the embedding.
        k: neighbours.
        grad: as in `distset.expect.expect`.
        num_samples: subsets a query.
        at_once: images in a group, queries and candidates.

    Raises:
        ValueError: for k below 1, or more than the candidates of a group.
    """

    def __init__(
        self, model: SubsetKNN, k: int = 10, grad: Estimator | None = None, *, num_samples: int = 32, at_once: int = 256
    ) -> None:
        if not 1 <= k <= at_once // 2:
            raise ValueError(f"k: got {k}, wanted 1 to {at_once // 2}, half of at_once={at_once}, the candidates of a query")
        self.model, self.k, self.grad, self.num_samples, self.at_once = model, k, grad, num_samples, at_once
        if grad is not None:
            model.learned = grad.learned()

    def loss(self, example: Example, *, seed: int) -> Tensor:
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        embedded = self.model(stacked(examples, self.model))
        labels = torch.stack([torch.as_tensor(example.target) for example in examples]).reshape(-1).to(embedded.device)
        half = len(labels) // 2
        if half < self.k:
            raise ValueError(
                f"plan.batch: a group has {len(labels)} images, half of them candidates for k = {self.k} neighbours; wanted "
                f"a batch, and a remainder of the training images by it, of at least {2 * self.k}"
            )
        same = (labels[:half].unsqueeze(-1) == labels[half:]).to(embedded.dtype)
        subset = KSubset(-torch.cdist(embedded[:half], embedded[half:]), self.k)
        mean = expect(lambda z: -(z * same).sum(-1) / self.k, subset, self.num_samples, grad=self.grad, seed=seed)
        return mean.mean()

    def predict(self, set: ChunkedSet) -> Tensor:
        """Embeddings ``(*, dim)`` of an image or a group."""
        return self.model(pixels(set, self.model))

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Labelled]) -> dict[str, float]:
        """``accuracy`` of the queries by most of their k nearest of the other images; ties go to the lower class."""
        known, asked = _split(outputs, targets)
        found = nearest_labels(asked[0], known[0], known[1], self.k)
        return {"accuracy": float((found.mode(-1).values == asked[1]).double().mean())}

    @torch.no_grad()
    def draw(self, folder: Path, parts: Parts) -> None:
        """``embedding.png``: the queries of the test part, coloured by class (the first two dimensions)."""
        groups = [example for example in parts.test if example.target.query][:10]
        embedded = torch.cat([self.predict(example.set) for example in groups])[:, :2].cpu().numpy()
        labels = torch.cat([example.target.labels for example in groups]).numpy()
        if embedded.shape[1] < 2:
            embedded = np.pad(embedded, ((0, 0), (0, 1)))
        figure = new_figure(6.4, 6.0)
        axes = new_axes(figure, (1, 1, 1))
        dots = axes.scatter(embedded[:, 0], embedded[:, 1], c=labels, cmap="tab10", s=4, lw=0)
        axes.legend(*dots.legend_elements(), title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.set_aspect("equal")
        axes.set_title(f"{len(labels):,} test images", loc="left", fontweight="bold")
        save(figure, folder / "embedding.png")


def nearest_labels(queries: Tensor, points: Tensor, labels: Tensor, k: int) -> Tensor:
    """The labels ``(Q, k)`` of the k nearest of ``points (P, dim)`` for each of ``queries (Q, dim)``.

    Raises:
        ValueError: for fewer points than k.
    """
    from scipy.spatial import KDTree

    if len(points) < k:
        raise ValueError(f"references: got {len(points)} images among which to find k = {k} neighbours, wanted at least k")
    _, rows = KDTree(points.double().numpy()).query(queries.double().numpy(), k=k)
    return labels[torch.from_numpy(np.asarray(rows).reshape(len(queries), k))]


def _split(outputs: Sequence[Tensor], targets: Sequence[Labelled]) -> list[tuple[Tensor, Tensor]]:
    """Embeddings and labels of the images to find, and of those asked for."""
    pairs = []
    for query in (False, True):
        mine = [(output, target.labels) for output, target in zip(outputs, targets) if target.query == query]
        if not mine:
            raise ValueError("targets: wanted images to find and images to ask for; see distset.problems.pixels.neighbours")
        pairs.append((torch.cat([output for output, _ in mine]), torch.cat([labels for _, labels in mine])))
    return pairs


def subset_knn_task(
    n: int, *, k: int = 10, dim: int = 2, num_samples: int = 32, grad: Estimator | None = None, at_once: int = 256
) -> SubsetKNNTask:
    """The published task on images of n pixels; arguments as in the classes."""
    return SubsetKNNTask(SubsetKNN(n, dim=dim), k, grad, num_samples=num_samples, at_once=at_once)
