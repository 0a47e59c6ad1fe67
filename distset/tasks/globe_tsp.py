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

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distset.collapse import CollapseAlarm
from distset.seeds import generator_for
from distset.sets import ChunkedSet
from distset.solve import Identity, Strategy, solve
from distset.solvers.base import Solver
from distset.solvers.tour import Tour
from distset.tasks.fading import FadingMargin
from distset.train import Example, Parts

__all__ = ["FlagLocator", "GlobeTask", "GlobeTour", "chords", "globe_task", "hamming", "perfect", "squared"]


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

    def costs(self, flags: Tensor, countries: Tensor | None = None) -> Tensor:
        """Chords ``(*, k, k)`` between flags ``(*, k, 3, H, W)``; with their ``countries (*, k)`` each is seen once."""
        flat = flags.flatten(0, -4)
        if countries is None:
            points = self.locator(flat)
        else:
            seen, where = countries.reshape(-1).unique(return_inverse=True)
            first = torch.zeros_like(seen).scatter_(0, where, torch.arange(len(where), device=where.device))
            points = self.locator(flat[first])[where]
        return chords(points.reshape(*flags.shape[:-3], 3))

    def forward(self, flags: Tensor, countries: Tensor | None = None) -> Tensor:
        """Tours ``(*, k, k)``."""
        return solve(self.costs(flags, countries), self.solver, grad=self.grad)


class GlobeTask(FadingMargin):
    """Loss, prediction and metrics of globe tours.

    An example is k flags ``(*, k, 3, H, W)`` with target ``(countries (*, k), tour (*, k, k))``.

    Args:
        model: flags up to tours.
        loss: "squared" or "hamming"; they are one number on tours, but only the gradient of `squared` vanishes where a tour
            is right. By that of `hamming`, `Identity` moves costs of right tours for ever: to 0 where nothing is
            projected, else to a globe out of shape.
        gradient_noise: of the loss gradient at the tours, as a multiple of its norm (the robustness study).
        at_once: combinations solved together, as many as a step has for the papers' batches.
    """

    def __init__(self, model: GlobeTour, *, loss: str = "squared", gradient_noise: float = 0.0, at_once: int = 50) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss: got {loss!r}, wanted one of {', '.join(LOSSES)}")
        self.distance = LOSSES[loss]
        self.model, self.grad, self.gradient_noise, self.at_once = model, model.grad, gradient_noise, at_once
        self.alarm = model.alarm = CollapseAlarm(ndim=2)  # within the model: checkpoints keep its state

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """The loss of one combination, or of a batch of them."""
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """The mean loss over all combinations of the examples; the alarm rings where the costs collapse."""
        device = next(self.model.parameters()).device
        flags = torch.cat([_elements(example.set).flatten(0, -5) for example in examples]).to(device)
        countries, truth = (torch.cat([example.target[i].to(device) for example in examples]) for i in (0, 1))
        costs = self.model.costs(flags, countries)
        self.alarm(costs)
        found = solve(costs, self.model.solver, grad=self.model.grad, truth=truth, seed=seed)
        if self.gradient_noise and found.requires_grad:
            generator = generator_for(seed, "gradient noise")
            found.register_hook(lambda g: g + self.gradient_noise * _noise(g, generator))
        return self.distance(found, truth)

    def predict(self, set: ChunkedSet) -> Tensor:
        """The tour and the costs it was found by, ``(2, *, k, k)``."""
        costs = self.model.costs(_elements(set).to(next(self.model.parameters()).device))
        return torch.stack([solve(costs, self.model.solver, grad=self.model.grad, seed=0), costs])

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """The share of tours without a mistake (the papers' accuracy), the loss, and the alarm's figures."""
        found, costs = (torch.cat([output[i].flatten(0, -3) for output in outputs]) for i in (0, 1))
        truth = torch.cat([tour.flatten(0, -3) for _, tour in targets])
        alarm = self.alarm.figures(costs)
        return {"accuracy": perfect(found, truth), "loss": hamming(found, truth).item(), **alarm}

    def draw(self, folder: Path, parts: Parts) -> None:
        """Test tours on a map of the world: true and found."""
        from distset.report.structures import plot_tours

        example = parts.test[0]
        countries, truth = example.target
        with torch.no_grad():
            found = self.predict(example.set)[0]
        plot_tours(parts.test.globe.lonlat[countries[:6]], truth[:6], found[:6], folder / "tours.png")  # type: ignore[attr-defined]


def globe_task(
    *,
    size: tuple[int, int],
    grad: Strategy | None = None,
    loss: str = "squared",
    gradient_noise: float = 0.0,
    solver: Solver | None = None,
    at_once: int = 50,
) -> GlobeTask:
    """A task for flags of ``size`` (height, width); ``grad`` is `Identity()` if None."""
    model = GlobeTour(FlagLocator(*size), grad or Identity(), solver)
    return GlobeTask(model, loss=loss, gradient_noise=gradient_noise, at_once=at_once)


def chords(points: Tensor) -> Tensor:
    """Distances ``(*, k, k)`` between points ``(*, k, 3)``, straight through the ball; differentiable at 0. NaN stays."""
    square = (points.unsqueeze(-2) - points.unsqueeze(-3)).square().sum(-1)
    same = square == 0
    return torch.where(same, 1.0, square).sqrt().masked_fill(same, 0.0)


def hamming(found: Tensor, truth: Tensor) -> Tensor:
    """Entries that differ, a tour on average; as published, its gradient is 1 - 2 truth, right or wrong."""
    return (found * (1 - truth) + (1 - found) * truth).sum((1, 2)).mean()


def squared(found: Tensor, truth: Tensor) -> Tensor:
    """Entries that differ, a tour on average; its gradient is 2 (found - truth), 0 where a tour is right."""
    return (found - truth).square().sum((1, 2)).mean()


LOSSES = {"squared": squared, "hamming": hamming}


def perfect(found: Tensor, truth: Tensor) -> float:
    """The share of tours without a mistake: the papers' accuracy."""
    return (found == truth).flatten(1).all(1).double().mean().item()


def _elements(set: ChunkedSet) -> Tensor:
    """The flags, with a batch dimension."""
    elements = set.whole().elements
    return elements if set.batch_shape else elements.unsqueeze(0)


def _noise(g: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise, as long as each instance's gradient on average."""
    norm = g.flatten(1).norm(dim=1) / g[0].numel() ** 0.5
    return torch.randn(g.shape, generator=generator).to(g.device) * norm.reshape(-1, 1, 1)
