"""Offers with a chosen subset, made up: Gaussian and Moons as published, and the odd ones out of labelled elements.

References:
    Ou et al.: Learning Neural Set Functions Under the Optimal Subset Oracle. NeurIPS 2022. arXiv:2203.01693, appendix F.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distset.offers import Offers
from distset.seeds import seed_for

__all__ = ["anomaly_offers", "gaussian_offers", "gaussian_ratio", "moons_offers", "moons_ratio"]


def gaussian_offers(sets: int = 1000, *, size: int = 100, chosen: int = 10, seed: int = 0) -> Offers:
    """Two Gaussians of spread 0.5 at +-(1, 1) / sqrt(2): most elements from one, the chosen ones from the other.

    Which one is drawn for each set. The true likelihood ratio reaches a Jaccard index of about .910 at N = 100, |S*| = 10.

    Args:
        sets: B; 1,000 each for training, validation and test as published, with different seeds.
        size: N.
        chosen: |S*|.
        seed: of everything.

    Example:
        >>> from distset.data.synthetic_offers import gaussian_offers
        >>> offers = gaussian_offers(3)
        >>> offers.elements.shape, offers.chosen.sum(-1).tolist()
        (torch.Size([3, 100, 2]), [10, 10, 10])
    """
    _check_sizes(sets, size, chosen)
    rng = np.random.default_rng(seed_for(seed, "gaussian offers"))
    side = rng.choice([-1.0, 1.0], (sets, 1, 1))
    centre = side * np.full(2, 1 / np.sqrt(2))
    picked = _places(rng, sets, size, chosen)
    points = np.where(picked[..., None], -centre, centre) + 0.5 * rng.standard_normal((sets, size, 2))
    return Offers(torch.tensor(points, dtype=torch.float32), torch.tensor(picked), rule="gaussian")


def moons_offers(sets: int = 1000, *, size: int = 100, chosen: int = 10, seed: int = 0) -> Offers:
    """Two interleaved half circles with noise 0.1: most elements from one, the chosen ones from the other.

    Each set has the moon of its majority at evenly spaced angles, scaled by 2 and moved by (-1, -0.2), as published;
    arguments as in `gaussian_offers`. The true densities reach a Jaccard index of .9995.
    """
    _check_sizes(sets, size, chosen)
    rng = np.random.default_rng(seed_for(seed, "moons offers"))
    upper = rng.integers(0, 2, (sets, 1)).astype(bool)
    picked = _places(rng, sets, size, chosen)
    angles = np.linspace(0, np.pi, size)
    angle = np.where(picked, _shuffled(rng, angles, sets), _shuffled(rng, angles, sets))
    first = np.stack([np.cos(angle), np.sin(angle)], -1)
    second = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], -1)
    points = np.where((upper ^ picked)[..., None], first, second) + 0.1 * rng.standard_normal((sets, size, 2))
    points = 2 * points + np.array([-1, -0.2])
    return Offers(torch.tensor(points, dtype=torch.float32), torch.tensor(picked), rule="moons")


def gaussian_ratio(elements: Tensor) -> Tensor:
    """The log-likelihood ratio of "chosen" to "not chosen" by the true densities of `gaussian_offers`, ``(*, N)``.

    Up to a factor; which Gaussian is the majority's is told by the likelihood of the offer ``(*, N, 2)``.
    """
    along = elements.sum(-1)
    return -along * along.mean(-1, keepdim=True).sign()


def moons_ratio(elements: Tensor, angles: int = 400) -> Tensor:
    """The same for `moons_offers`: a moon is the mixture of its noise over evenly spaced angles."""
    t = torch.linspace(0, torch.pi, angles, dtype=torch.float64)
    arcs = torch.stack([torch.stack([t.cos(), t.sin()], -1), torch.stack([1 - t.cos(), 0.5 - t.sin()], -1)])
    points = (elements.double() - torch.tensor([-1, -0.2])) / 2
    squared = (points.unsqueeze(-2).unsqueeze(-2) - arcs).square().sum(-1)  # (*, N, moons, angles)
    log_density = (-squared / (2 * 0.1**2)).logsumexp(-1)
    ratio = log_density[..., 1] - log_density[..., 0]
    return -ratio * ratio.mean(-1, keepdim=True).sign()


def anomaly_offers(
    elements: Tensor, labels: Tensor, *, sets: int, size: int, chosen: tuple[int, int], seed: int = 0
) -> Offers:
    """The odd ones out: each offer holds elements of one class, and the chosen ones are of any other.

    For vectors or images with labels: cells by type, digits, clothes, faces by attribute.

    Args:
        elements: ``(M, *element)``, the pool.
        labels: int ``(M)``; a class takes part as majority if it has enough elements.
        sets: B.
        size: N.
        chosen: the smallest and the largest |S*|.
        seed: of everything.

    Raises:
        ValueError: for a pool and labels of different lengths, sizes out of range, no class that fills an offer.
    """
    low, high = chosen
    if sets < 1:
        raise ValueError(f"sets: got {sets}, wanted at least 1 offer")
    if len(elements) != len(labels):
        raise ValueError(f"labels: got {len(labels)} for {len(elements)} elements, wanted one each")
    if not 1 <= low <= high < size:
        raise ValueError(f"chosen: got {low} to {high} of {size}, wanted 1 <= from <= to < the size of an offer")
    kinds = labels.cpu().numpy()
    members = {kind: np.flatnonzero(kinds == kind) for kind in np.unique(kinds)}
    majorities = [kind for kind, own in members.items() if len(own) >= size - low and len(kinds) - len(own) >= high]
    if not majorities:
        raise ValueError(f"labels: no class has {size - low} elements, and {high} others, to fill an offer of {size}")
    rows, picked = [], np.zeros((sets, size), dtype=bool)
    for b in range(sets):
        rng = np.random.default_rng(seed_for(seed, "anomalies", b))
        kind, count = majorities[rng.integers(len(majorities))], int(rng.integers(low, high + 1))
        picked[b, rng.choice(size, count, replace=False)] = True
        row = np.empty(size, dtype=np.int64)
        row[picked[b]] = rng.choice(np.flatnonzero(kinds != kind), count, replace=False)
        row[~picked[b]] = rng.choice(members[kind], size - count, replace=False)
        rows.append(row)
    return Offers(elements[torch.tensor(np.stack(rows))], torch.tensor(picked), rule="odd ones out of one class")


def _places(rng: np.random.Generator, sets: int, size: int, chosen: int) -> np.ndarray:
    return rng.random((sets, size)).argsort(-1).argsort(-1) < chosen


def _shuffled(rng: np.random.Generator, values: np.ndarray, sets: int) -> np.ndarray:
    return values[rng.random((sets, len(values))).argsort(-1)]


def _check_sizes(sets: int, size: int, chosen: int) -> None:
    if sets < 1 or not 0 < chosen < size:
        raise ValueError(f"sets, size, chosen: got {sets}, {size}, {chosen}, wanted sets >= 1 and 0 < chosen < size")
