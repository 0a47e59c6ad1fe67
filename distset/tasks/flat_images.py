"""Images as sets of pixels: what the image tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.sets import ChunkedSet
from distset.train import Example

__all__ = ["negative_log_likelihood", "perceptron", "pixels", "stacked"]


def pixels(images: ChunkedSet, model: nn.Module) -> Tensor:
    """The grey values ``(*, n)`` of an image or a group of them, where and as ``model`` keeps its parameters."""
    first = next(model.parameters())
    return images.whole().elements.squeeze(-1).to(first.device, first.dtype)


def stacked(examples: Sequence[Example], model: nn.Module) -> Tensor:
    """Images ``(B, n)`` of examples, one or a group each."""
    rows = [example.set.whole().elements.squeeze(-1) for example in examples]
    first = next(model.parameters())
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).to(first.device, first.dtype)


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def negative_log_likelihood(logits: Tensor, images: Tensor) -> Tensor:
    """The binary cross-entropy of ``images (*, n)`` in [0, 1], pixel by pixel; grey values are targets as they are."""
    return F.binary_cross_entropy_with_logits(logits, images.expand_as(logits), reduction="none")
