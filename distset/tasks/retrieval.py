"""Retrieval: embeddings whose neighbours are of their class, trained on recall itself.

In a batch every example is a query against all others; `distset.losses.recall_loss` ranks them by a solver.

References:
    Rolínek et al. 2020, https://arxiv.org/abs/1912.03500. Sahoo et al. 2023, https://arxiv.org/abs/2205.15213 (eq. 20).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.collapse import CollapseAlarm
from distset.losses import recall_at, recall_loss
from distset.projections import project_mean
from distset.sets import ChunkedSet
from distset.solve import Identity, Strategy
from distset.tasks.fading import FadingMargin
from distset.train import Example

__all__ = ["Embedding", "RetrievalTask", "retrieval_task"]


class Embedding(nn.Module):
    """Elements ``(B, *shape)`` on the unit sphere ``(B, D)``: convolutions for images, layers for vectors."""

    def __init__(self, shape: tuple[int, ...], dim: int = 64, width: int = 32) -> None:
        super().__init__()
        if len(shape) == 3:
            body = nn.Sequential(
                nn.Conv2d(shape[0], width, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
            )
        else:
            body = nn.Sequential(nn.Linear(shape[0], 8 * width), nn.ReLU())
        with torch.no_grad():
            size = body(torch.zeros(1, *shape)).shape[1]
        self.net = nn.Sequential(body, nn.Linear(size, dim))

    def forward(self, elements: Tensor) -> Tensor:
        return F.normalize(self.net(elements), dim=-1)


class RetrievalTask(FadingMargin):
    """Loss, prediction and metrics of retrieval.

    An example is a set of elements ``(N, *shape)`` with their classes ``(N,)``; those of a step are pooled, so that single
    elements do as well.

    Args:
        model: elements to unit vectors.
        grad: the strategy of the ranking.
        margin: how much higher relevant elements must score, see `recall_loss`.
        at_once: examples ranked against each other.
    """

    def __init__(self, model: nn.Module, grad: Strategy, *, margin: float = 0.0, at_once: int = 128) -> None:
        self.model, self.grad, self.margin, self.at_once = model, grad, margin, at_once
        self.alarm = model.alarm = CollapseAlarm(ndim=1)  # within the model: checkpoints keep its state

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """`recall_loss` within one set."""
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """`recall_loss` over all elements of the examples, each a query against the others; the alarm rings where the scores
        become one."""
        elements = torch.cat([example.set.whole().elements for example in examples])
        embedded = self.model(elements.to(next(self.model.parameters()).device))
        scores, relevant = _against_others(embedded, torch.cat([example.target for example in examples]))
        self.alarm(project_mean(scores))
        return recall_loss(scores, relevant, grad=self.grad, margin=self.margin)

    def predict(self, set: ChunkedSet) -> Tensor:
        """Unit vectors ``(N, D)``."""
        return self.model(set.whole().elements.to(next(self.model.parameters()).device))

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """Recall@1, @4, @16 of every element against all others, the recall loss, and the alarm's figures.

        Ranking sees differences alone, so that the norm is that of the scores without their mean: unit vectors that have
        become one have scores of 1.
        """
        scores, relevant = _against_others(torch.cat(list(outputs)), torch.cat(list(targets)))
        found = {f"recall@{k}": recall_at(scores, relevant, k).item() for k in (1, 4, 16) if k <= scores.shape[-1]}
        return {**found, "loss": recall_loss(scores, relevant).item(), **self.alarm.figures(project_mean(scores))}


def retrieval_task(
    *, shape: tuple[int, ...], grad: Strategy | None = None, dim: int = 64, width: int = 32, margin: float = 0.0
) -> RetrievalTask:
    """A task for elements of ``shape``; ``grad`` is `Identity()` if None."""
    return RetrievalTask(Embedding(tuple(shape), dim, width), grad or Identity(), margin=margin)


def _against_others(embedded: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and relevance ``(B, B - 1)`` of every element to the others."""
    count = len(embedded)
    others = ~torch.eye(count, dtype=torch.bool, device=embedded.device)
    classes = classes.to(embedded.device)
    same = classes.unsqueeze(1) == classes
    return (embedded @ embedded.T)[others].reshape(count, -1), same[others].reshape(count, -1)
