r"""Shortest paths over terrain: from a picture of a map, the cheapest path across it.

A network gives each cell of the map a cost, and the loss compares the path of least cost with the true one; the costs
themselves are never shown to it. Many paths tie or nearly do: `cost_ratio`, the true cost of the found path over that of
the best, is the figure to report.

Reference:
    Vlastelica et al. 2020, https://arxiv.org/abs/1912.02175 (section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distset.collapse import CollapseAlarm
from distset.sets import ChunkedSet
from distset.solve import Identity, Strategy, solve
from distset.solvers.base import Solver
from distset.solvers.shortest_path import ShortestPath
from distset.tasks.fading import FadingMargin
from distset.train import Example, Parts

__all__ = ["TILE", "CellCosts", "TerrainTask", "cost_ratio", "path_loss", "terrain_task"]

TILE = 8
"""Pixels of a cell's side."""


class CellCosts(nn.Module):
    """Convolutions down to a positive cost a cell: ``(B, 3, TILE H, TILE W) -> (B, H, W)``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4),
            nn.ReLU(),
            nn.Conv2d(width, width, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return nn.functional.softplus(self.net(pictures).squeeze(1))


def path_loss(found: Tensor, truth: Tensor) -> Tensor:
    """Cells on one path and not on the other, a map on average. Its gradient is 0 where the paths agree."""
    return (found - truth).abs().sum((1, 2)).mean()


def cost_ratio(found: Tensor, costs: Tensor, paths: Tensor) -> float:
    """The true cost of the found paths over that of the best, averaged over maps; 1 where every path is as good."""
    return ((found * costs).sum((1, 2)) / (paths * costs).sum((1, 2))).mean().item()


class TerrainTask(FadingMargin):
    """Loss, prediction and metrics of paths over terrain.

    An example is one map, as a set of one picture ``(*, 1, 3, TILE H, TILE W)``, with target ``(costs, path)``, each
    ``(*, H, W)``.

    Args:
        model: pictures to costs.
        grad: the strategy of `solve`.
        solver: of paths.
        at_once: maps solved together.
    """

    def __init__(self, model: nn.Module, grad: Strategy, solver: Solver, *, at_once: int = 32) -> None:
        self.model, self.grad, self.solver, self.at_once = model, grad, solver, at_once
        self.alarm = model.alarm = CollapseAlarm(ndim=2)  # within the model: checkpoints keep its state

    def loss(self, example: Example, *, seed: int) -> Tensor:
        """`path_loss` of one map, or of a batch of them."""
        return self.batch_loss([example], seed=seed)

    def batch_loss(self, examples: Sequence[Example], *, seed: int) -> Tensor:
        """`path_loss` over all maps of the examples; the alarm rings where the costs collapse.

        Raises:
            ValueError: for true paths that the solver never finds, such as diagonal ones for 4 neighbours.
        """
        pictures = torch.cat([self._pictures(example.set) for example in examples])
        truth = torch.cat([example.target[1] for example in examples])
        self._check_paths(truth)
        truth = truth.to(pictures.device)
        costs = self.model(pictures)
        self.alarm(costs)
        return path_loss(solve(costs, self.solver, grad=self.grad, truth=truth, seed=seed), truth)

    def predict(self, set: ChunkedSet) -> Tensor:
        """The path and the costs it was found by, ``(2, *, H, W)``."""
        costs = self.model(self._pictures(set))
        return torch.stack([solve(costs, self.solver, grad=self.grad, seed=0), costs])

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        """`cost_ratio`, the share of paths that are the true ones cell by cell, the loss, and the alarm's figures."""
        found, predicted = (torch.cat([output[i] for output in outputs]) for i in (0, 1))
        costs, paths = (torch.cat([target[i] for target in targets]) for i in (0, 1))
        return {
            "cost_ratio": cost_ratio(found, costs, paths),
            "accuracy": (found == paths).flatten(1).all(1).double().mean().item(),
            "loss": path_loss(found, paths).item(),
            **self.alarm.figures(predicted),
        }

    def draw(self, folder: Path, parts: Parts) -> None:
        """Test maps with the true path and the one found."""
        from distset.report.structures import plot_paths

        example = parts.test[0]
        with torch.no_grad():
            found = self.predict(example.set)[0]
        plot_paths(self._pictures(example.set)[:6], example.target[1][:6], found[:6], folder / "paths.png")

    def _check_paths(self, paths: Tensor) -> None:
        feasible = self.solver.feasible(paths.cpu().numpy())
        if not feasible.all():
            raise ValueError(
                f"target: got a true path (number {feasible.argmin()} of {len(paths)}) that is none to {self.solver}, "
                "wanted paths with its neighbours, start and end; make them by the solver that the task has"
            )

    def _pictures(self, set: ChunkedSet) -> Tensor:
        return set.whole().elements.flatten(0, -4).to(next(self.model.parameters()).device)


def terrain_task(*, grad: Strategy | None = None, width: int = 32, neighbours: int = 8) -> TerrainTask:
    """A task with a network of ``width`` channels; ``grad`` is `Identity()` if None."""
    return TerrainTask(CellCosts(width), grad or Identity(), ShortestPath(neighbours))
