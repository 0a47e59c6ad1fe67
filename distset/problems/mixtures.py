"""Amortized clustering: sets from Gaussian mixtures as the parts of a problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distset.data.synthetic_mixtures import MixtureSets
from distset.seeds import seed_for
from distset.sets import InMemory
from distset.task import LazyExamples
from distset.tasks.clustering import Truth
from distset.train import Example, Parts

__all__ = ["mixtures"]

GROUP = 50
"""Validation and test sets encoded at once."""


def mixtures(
    sets: Sequence[int] = (500_000, 200, 1000),
    *,
    size: int = 1024,
    train_size: int | None = None,
    chunk_size: int | None = 8,
    components: int = 4,
    dim: int = 2,
    spread: float = 4.0,
    scale: Sequence[float] = (0.1, 0.6),
    seed: int = 0,
) -> Parts:
    """`MixtureSets`, drawn when they are needed.

    A training example is one set, without a target: a set is its own. Validation and test examples are groups of sets
    ``(B, N, D)`` with a `distset.tasks.clustering.Truth` as target.

    Args:
        sets: how many to train, validate and test.
        size: points of a set.
        train_size: points of a training set, if fewer: what training on subsets sees.
        chunk_size: points a chunk, of which `Sampled` and `Subset` draw; None for whole sets.
        components, dim, spread, scale: as in `MixtureSets`.
        seed: of everything.

    Raises:
        ValueError: for sets of one point, which have no pairs to compare labellings by.
    """
    if size < 2:
        raise ValueError(f"size: got {size}, wanted at least 2 points a set: the Rand index is a share of pairs")
    drawn = [
        MixtureSets(
            count, size=points, components=components, dim=dim, spread=spread, scale=scale, seed=seed_for(seed, part)
        )
        for count, points, part in zip(sets, (train_size or size, size, size), ("train", "val", "test"), strict=True)
    ]
    train = _Single(drawn[0], chunk_size)
    val, test = (_groups(part, chunk_size) for part in drawn[1:])
    truth = [drawn[2].draw(index).log_density().mean() for index in range(len(drawn[2]))]
    return Parts(train, val, test, {"dim": dim, "components": components}, {"true_mixture": -float(np.mean(truth))})


class _Single(LazyExamples):
    """One set an example, made when it is asked for."""

    def __init__(self, sets: MixtureSets, chunk_size: int | None) -> None:
        self.sets, self.chunk_size = sets, chunk_size

    def __len__(self) -> int:
        return len(self.sets)

    def example(self, index: int) -> Example:
        points = torch.from_numpy(self.sets.draw(index).points)
        return Example(InMemory(points, self.chunk_size, name=f"mixture-{index}"), None)


def _groups(sets: MixtureSets, chunk_size: int | None) -> list[Example]:
    found = []
    for start in range(0, len(sets), GROUP):
        drawn = [sets.draw(index) for index in range(start, min(start + GROUP, len(sets)))]
        points = torch.from_numpy(np.stack([one.points for one in drawn]))
        labels = torch.from_numpy(np.stack([one.labels for one in drawn]))
        found.append(Example(InMemory(points, chunk_size, name=f"mixtures-{start}"), Truth(points, labels)))
    return found
