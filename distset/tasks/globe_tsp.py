r"""The globe tour: from pictures of k flags, the shortest round trip through the k capitals.

A network puts each flag on the unit sphere, the chords between the points are the costs of a `Tour`, and the loss compares
tours: no coordinate is ever shown to it. A test set holds other combinations of the same countries.

The label solver and the training solver are the same, over the same kind of distance (chords), so that a network which
knows the globe up to a rotation or a reflection makes no mistake.

References:
    Vlastelica, Paulus, Musil, Martius, Rolínek 2020, https://arxiv.org/abs/1912.02175 (section 4.2: 100 countries, 10,000
    and 1,000 combinations, batches of 50, Adam).
    Sahoo et al. 2023, https://arxiv.org/abs/2205.15213 (section 4.4).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distset.seeds import generator_for
from distset.solve import CollapseAlarm, Strategy, solve
from distset.solvers.base import Solver
from distset.solvers.tour import Tour

__all__ = ["FlagLocator", "Globe", "GlobeTour", "chords", "hamming", "perfect", "train"]


class Globe(NamedTuple):
    """Flags float ``(C, 3, H, W)`` in 0..1 and where their capitals lie on the unit sphere, ``(C, 3)``."""

    flags: Tensor
    points: Tensor

    @staticmethod
    def read(path: str | Path, countries: int | None = 100, seed: int = 0) -> Globe:
        """From an ``npz`` with ``flags`` uint8 ``(N, H, W, 3)`` and ``lonlat`` in degrees ``(N, 2)``; ``countries`` of
        them, drawn by ``seed``.

        Raises:
            ValueError: for a file without these arrays, or with fewer countries.
        """
        with np.load(path) as file:
            missing = {"flags", "lonlat"} - set(file.files)
            if missing:
                raise ValueError(f"path: {path} has no array {sorted(missing)}, wanted flags (N, H, W, 3) and lonlat (N, 2)")
            flags, lonlat = torch.from_numpy(file["flags"]), torch.from_numpy(file["lonlat"]).double()
        if countries is not None and countries > len(flags):
            raise ValueError(f"countries: got {countries}, wanted at most {len(flags)}, the flags in {path}")
        picked = torch.randperm(len(flags), generator=generator_for(seed, "countries"))[:countries]
        longitude, latitude = lonlat[picked].deg2rad().T
        points = [latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()]
        return Globe(flags[picked].permute(0, 3, 1, 2).float() / 255, torch.stack(points, -1).float())

    def combinations(self, count: int, k: int, seed: int) -> Tensor:
        """``count`` draws of ``k`` different countries, ``(count, k)``."""
        keys = torch.rand(count, len(self.flags), generator=generator_for(seed, "combinations", k))
        return keys.argsort(-1)[:, :k]

    def tours(self, countries: Tensor, solver: Solver | None = None) -> Tensor:
        """The true tours ``(B, k, k)`` of combinations ``(B, k)``."""
        return solve(chords(self.points[countries]), Tour() if solver is None else solver)


class FlagLocator(nn.Module):
    """Two convolutions and a layer of 500, as published, and a point on the unit sphere: ``(B, 3, H, W) -> (B, 3)``."""

    def __init__(self, height: int = 20, width: int = 40) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 20, 4, stride=2), nn.ReLU(), nn.Conv2d(20, 50, 4, stride=2), nn.ReLU(), nn.Flatten()
        )
        with torch.no_grad():
            size = self.features(torch.zeros(1, 3, height, width)).shape[1]
        self.head = nn.Sequential(nn.Linear(size, 500), nn.ReLU(), nn.Linear(500, 3))

    def forward(self, flags: Tensor) -> Tensor:
        return nn.functional.normalize(self.head(self.features(flags)), dim=-1)


class GlobeTour(nn.Module):
    """Flags up to tours.

    Args:
        locator: ``(B, 3, H, W) -> (B, 3)``.
        grad: the strategy of `solve`.
        solver: of tours; a pool for many cities.
    """

    def __init__(self, locator: nn.Module, grad: Strategy, solver: Solver | None = None) -> None:
        super().__init__()
        self.locator, self.grad = locator, grad
        self.solver = Tour() if solver is None else solver

    def costs(self, flags: Tensor, countries: Tensor) -> Tensor:
        """Chords ``(B, k, k)`` between the countries ``(B, k)`` whose flags are rows of ``flags``; each is seen once."""
        seen, where = countries.unique(return_inverse=True)
        return chords(self.locator(flags[seen])[where])

    def forward(self, flags: Tensor, countries: Tensor, truth: Tensor | None = None, seed: int | None = None) -> Tensor:
        return solve(self.costs(flags, countries), self.solver, grad=self.grad, truth=truth, seed=seed)


def chords(points: Tensor) -> Tensor:
    """Distances ``(*, k, k)`` between points ``(*, k, 3)``, straight through the ball; differentiable at 0."""
    square = (points.unsqueeze(-2) - points.unsqueeze(-3)).square().sum(-1)
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


def hamming(found: Tensor, truth: Tensor) -> Tensor:
    """Entries that differ, a tour on average; as published, its gradient is 1 - 2 truth, right or wrong."""
    return (found * (1 - truth) + (1 - found) * truth).sum((1, 2)).mean()


def perfect(found: Tensor, truth: Tensor) -> float:
    """The share of tours without a mistake: the papers' accuracy."""
    return (found == truth).flatten(1).all(1).double().mean().item()


class Trained(NamedTuple):
    """The model, its accuracy on unseen combinations after each epoch, and the mean cost norm over its first."""

    model: GlobeTour
    accuracy: list[float]
    cost_norm: float
    collapsed: bool


def train(
    globe: Globe,
    grad: Strategy,
    *,
    k: int = 5,
    examples: int = 10_000,
    epochs: int = 10,
    batch: int = 50,
    lr: float = 1e-3,
    gradient_noise: float = 0.0,
    corrupted: float = 0.0,
    seed: int = 0,
) -> Trained:
    """A plain training run: Adam on the Hamming loss.

    Args:
        gradient_noise: standard deviation of noise on the loss gradient at the tours, as a multiple of its norm.
        corrupted: the share of training labels that are the tour of another order of the cities.
    """
    generator = generator_for(seed, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GlobeTour(FlagLocator(*globe.flags.shape[2:]), grad)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    countries, unseen = globe.combinations(examples, k, seed), globe.combinations(1000, k, seed + 1)
    truth, unseen_truth = globe.tours(countries), globe.tours(unseen)
    shuffled = torch.rand(examples, generator=generator) < corrupted
    order = torch.rand(examples, k, generator=generator).argsort(-1)
    wrong = truth.gather(1, order.unsqueeze(-1).expand_as(truth)).gather(2, order.unsqueeze(1).expand_as(truth))
    labels = torch.where(shuffled[:, None, None], wrong, truth)
    alarm, accuracy, norm = CollapseAlarm(ndim=2), [], 0.0
    for epoch in range(epochs):
        for rows in torch.randperm(examples, generator=generator).split(batch):
            costs = model.costs(globe.flags, countries[rows])
            norm = alarm(costs)
            step = seed * 1_000_003 + epoch * examples + int(rows[0])
            found = solve(costs, model.solver, grad=grad, truth=labels[rows], seed=step)
            if gradient_noise and found.requires_grad:
                found.register_hook(lambda g: g + gradient_noise * _noise(g, generator))
            optimizer.zero_grad()
            hamming(found, labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append(perfect(model(globe.flags, unseen), unseen_truth))
    return Trained(model, accuracy, norm / (alarm.first or 1.0), alarm.rung)


def _noise(g: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise, as long as each instance's gradient on average."""
    norm = g.flatten(1).norm(dim=1) / g[0].numel() ** 0.5
    return torch.randn(g.shape, generator=generator) * norm.reshape(-1, 1, 1)
