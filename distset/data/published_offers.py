"""The very offers of the published experiments on Gaussian and Moons, number by number.

A test part of 1,000 offers has a standard error of .003 (Gaussian) to .004 (Moons) in the Jaccard index, as much as lies
between methods: a published figure can be compared on the published test part alone. Other draws of the same laws are in
`distset.data.synthetic_offers`.

References:
    Ou et al.: Learning Neural Set Functions Under the Optimal Subset Oracle. NeurIPS 2022. arXiv:2203.01693; code
    https://github.com/SubsetSelection/EquiVSet (``data_loader/gaussian.py``, ``moons.py``), whose draws are followed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distset.data.schema import need
from distset.offers import Offers

__all__ = ["published_gaussian_offers", "published_moons_offers"]

PART, SIZE, CHOSEN = 1000, 100, 10
Points = tuple[np.ndarray, np.ndarray]
"""Coordinates ``(points, 2)`` and which of the two clusters each is of."""


def published_gaussian_offers(sets: int = PART) -> list[Offers]:
    """Training, validation and test offers, 100 points with 10 chosen; the first ``sets`` of the 1,000 of each part.

    Example:
        >>> from distset.data.published_offers import published_gaussian_offers
        >>> [offers.elements.shape for offers in published_gaussian_offers(2)]
        [torch.Size([2, 100, 2]), torch.Size([2, 100, 2]), torch.Size([2, 100, 2])]
    """
    centres = np.array([[1, 1], [-1, -1]]) / np.sqrt(2)

    def draw(random: np.random.RandomState, number: int) -> Points:
        points, kinds = np.empty((4 * SIZE, 2)), np.empty(4 * SIZE, dtype=np.int64)
        for i in range(4 * SIZE):
            noise = random.randn(2)
            kinds[i] = random.randint(2)
            points[i] = 0.5 * noise + centres[kinds[i]]
        return points, kinds

    return _parts(draw, sets, "gaussian, as published")


def published_moons_offers(sets: int = PART) -> list[Offers]:
    """The same for Moons; needs scikit-learn."""
    make_moons = need("sklearn.datasets").make_moons

    def draw(random: np.random.RandomState, number: int) -> Points:
        points, kinds = make_moons(n_samples=2 * SIZE, noise=0.1, random_state=number)
        return 2 * points.astype(np.float32) + np.array([-1, -0.2]), kinds

    return _parts(draw, sets, "moons, as published")


def _parts(draw: Callable[[np.random.RandomState, int], Points], sets: int, rule: str) -> list[Offers]:
    """All three parts from one stream, so that whatever is kept, the stream is the published one."""
    if not 1 <= sets <= PART:
        raise ValueError(f"sets: got {sets}, wanted 1 to {PART}, the offers of a published part")
    random = np.random.RandomState(1)
    elements, chosen = np.empty((3 * PART, SIZE, 2), np.float32), np.zeros((3 * PART, SIZE), bool)
    for number in range(3 * PART):
        points, kinds = draw(random, number)
        odd = random.randint(2)
        places = random.choice(SIZE, CHOSEN, replace=False)
        elements[number] = points[kinds != odd][:SIZE]
        elements[number, places] = points[kinds == odd][:CHOSEN]
        chosen[number, places] = True
    starts = range(0, 3 * PART, PART)
    return [Offers(torch.tensor(elements[i : i + sets]), torch.tensor(chosen[i : i + sets]), rule=rule) for i in starts]
