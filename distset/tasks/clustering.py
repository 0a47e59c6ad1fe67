r"""Amortized clustering: a set of points in, the mixture of Gaussians it came from out, in one pass.

The loss is the mean negative log-likelihood of a set's points under the predicted mixture,

.. math:: L = -\frac1N \sum_i \log \sum_k \pi_k\, N(x_i; \mu_k, \mathrm{diag}\, \sigma_k^2).

References:
    Willette et al.: Scalable Set Encoding with Universal Mini-Batch Consistency and Unbiased Full Set Gradient
    Approximation. ICML 2023, section 4.1 and appendix C. https://arxiv.org/abs/2208.12401
    Lee et al.: Set Transformer. ICML 2019. https://arxiv.org/abs/1810.00825
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.blocks import Mixture
from distset.encoders import ChunkEncoder
from distset.encoders.pooling import accumulable
from distset.seeds import seeded
from distset.sets import ChunkedSet, InMemory
from distset.task import Elements
from distset.tasks.set_models import SetModel
from distset.train import Example, Parts

__all__ = ["ClusteringTask", "Truth", "clustering_task", "negative_log_likelihood", "rand_index", "to_mixture"]

LEAST_VARIANCE = 1e-3
Maker = Callable[..., tuple[ChunkEncoder, nn.Module]]


class Truth(NamedTuple):
    """What a group of sets is measured against: ``points (B, N, D)`` and the components ``labels (B, N)`` they came from."""

    points: Tensor
    labels: Tensor


class ClusteringTask:
    """Loss, prediction and metrics of amortized clustering.

    Args:
        model: gives ``(*, K, 1 + 2 D)`` for a set.
        dim: D, of a point.
        at_once: sets of a step that are encoded as one batch.

    Example:
        >>> from functools import partial
        >>> from distset.tasks.clustering_models import umbc_set_transformer
        >>> task = clustering_task(dim=2, components=3, model=partial(umbc_set_transformer, width=8))
        >>> set = InMemory(torch.randn(50, 2), chunk_size=10)
        >>> task.loss(Example(set, None), seed=0).shape, task.predict(set).shape
        (torch.Size([]), torch.Size([3, 5]))
        >>> mixture = to_mixture(task.predict(set))
        >>> mixture.weight.shape, mixture.mean.shape, mixture.variance.shape
        (torch.Size([3]), torch.Size([3, 2]), torch.Size([3, 2]))
    """

    def __init__(self, model: SetModel, dim: int, at_once: int = 10) -> None:
        self.model, self.at_once = model, at_once
        self.elements = Elements((dim,))

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """The negative log-likelihood of the set's points, the mean over them."""
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """The same for sets of one size, encoded as a batch."""
        sets = _stacked([example.set for example in examples])
        mixture = to_mixture(self.model(sets, seed=seed))
        return negative_log_likelihood(mixture, sets.elements.to(mixture.mean)).mean()

    def predict(self, set: ChunkedSet) -> Tensor:
        """``(*, K, 1 + 2 D)``, see `to_mixture`."""
        return self.model(set, seed=0)

    def answer(self, encoding: Any) -> dict[str, Any]:
        """The mixture: ``weights (K)``, ``means (K, D)``, ``variances (K, D)``."""
        mixture = to_mixture(self.model.head(encoding))
        return dict(zip(("weights", "means", "variances"), (part.tolist() for part in mixture), strict=True))

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Truth]) -> dict[str, float]:
        """``loss``, the NLL per point, and ``rand_index``: the share of pairs of points that the likeliest components put
        together or apart as the true ones do."""
        losses, agreements = [], []
        for raw, truth in zip(outputs, targets):
            mixture = to_mixture(raw)
            losses.append(negative_log_likelihood(mixture, truth.points).flatten())
            found = mixture.log_joint(truth.points).argmax(-1)
            agreements.append(rand_index(found, truth.labels, raw.shape[-2]).flatten())
        return {"loss": float(torch.cat(losses).mean()), "rand_index": float(torch.cat(agreements).mean())}

    def draw(self, folder: Path, parts: Parts) -> None:
        """Clusterings of test sets, and one set in the four streaming settings."""
        from distset.tasks.clustering_pictures import draw_clusterings, draw_streams  # matplotlib: not needed to train

        self.model.eval()
        if len(parts.test) and parts.test[0].target.points.shape[-1] == 2:
            draw_clusterings(self.model, parts.test[0], folder / "clusterings.png")
            draw_streams(self.model, parts.test[0], folder)


def to_mixture(raw: Tensor) -> Mixture:
    """``(*, K, 1 + 2 D)`` to weights by softmax, means, and variances by softplus, at least 0.001; in float32 or wider.

    Example:
        >>> mixture = to_mixture(torch.zeros(2, 5))
        >>> mixture.weight.tolist(), mixture.mean.tolist()
        ([0.5, 0.5], [[0.0, 0.0], [0.0, 0.0]])
    """
    dim = raw.shape[-1] // 2
    weight, mean, variance = accumulable(raw).split([1, dim, dim], -1)
    return Mixture(weight.squeeze(-1).softmax(-1), mean, F.softplus(variance) + LEAST_VARIANCE)


def negative_log_likelihood(mixture: Mixture, points: Tensor) -> Tensor:
    """Of each set, the mean over its ``points (*, N, D)``: ``(*)``.

    Example:
        >>> standard = Mixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2))
        >>> negative_log_likelihood(standard, torch.zeros(4, 2))  # log 2 pi
        tensor(1.8379)
    """
    with torch.autocast(points.device.type, enabled=False):  # it takes differences of squares
        return -mixture.log_joint(points).logsumexp(-1).mean(-1)


def rand_index(found: Tensor, true: Tensor, classes: int) -> Tensor:
    """The share of pairs of elements on which two labellings ``(*, N)`` agree, ``(*)``.

    Args:
        found, true: int ``(*, N)``, N at least 2.
        classes: number of labels that ``found`` may have.

    Raises:
        ValueError: for fewer than two elements, which make no pair.

    Example:
        >>> found, true = torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0])
        >>> rand_index(found, true, 2)
        tensor(0.3333, dtype=torch.float64)
    """
    if found.shape[-1] < 2:
        raise ValueError(f"found: got {found.shape[-1]} elements, wanted at least 2: the index is a share of pairs")
    a, b = F.one_hot(found, classes).double(), F.one_hot(true).double()
    table = a.mT @ b
    size = found.shape[-1]

    def pairs(counts: Tensor) -> Tensor:
        return (counts * (counts - 1)).flatten(counts.dim() - 1).sum(-1) / 2

    together = (table * (table - 1)).sum((-2, -1)) / 2
    rows, columns = pairs(table.sum(-1)), pairs(table.sum(-2))
    whole = size * (size - 1) / 2
    return (whole + 2 * together - rows - columns) / whole


def clustering_task(
    dim: int, components: int, *, model: Maker, grad: Any = None, at_once: int = 10, seed: int = 0
) -> ClusteringTask:
    """A task from plain configuration.

    Args:
        dim, components: of the mixtures; they follow from the data.
        model: ``model(dim=..., components=...)`` gives an encoder and a head.
        grad: the gradient strategy.
        at_once: sets encoded as one batch.
        seed: of the initial weights.
    """
    with seeded(seed, torch.device("cpu")):
        encoder, head = model(dim=dim, components=components)
    return ClusteringTask(SetModel(encoder, head, grad), dim, at_once)


def _stacked(sets: Sequence[ChunkedSet]) -> InMemory:
    """Sets of one size and one partition as a batch."""
    first, alike = sets[0], [set for set in sets if isinstance(set, InMemory)]
    if len(alike) < len(sets) or any(set.bounds != alike[0].bounds for set in alike):
        raise ValueError(f"examples: got sets of other sizes than {first!r}, wanted sets in memory, alike, for one batch")
    return InMemory(torch.stack([set.elements for set in alike]), bounds=alike[0].bounds, name=first.name)
