r"""Shortest paths over terrain: from a picture of a map, the cheapest path across it.

A network gives each cell of the map a cost, and the loss compares the path of least cost with the true one; the costs
themselves are never shown to it. `draw_maps` makes maps in the manner of the Warcraft set: patches of terrain of five
kinds, pictures of 8 x 8 pixels a cell with texture, lighting and blending at the borders. `read_maps` reads the real files.

Many paths tie or nearly do: `cost_ratio`, the true cost of the found path over that of the best, is the figure to report.

Reference:
    Vlastelica et al. 2020, https://arxiv.org/abs/1912.02175 (section 4.1; data of Guyomarch 2017).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distset.seeds import generator_for
from distset.solve import Strategy, solve
from distset.solvers.base import Solver
from distset.solvers.shortest_path import ShortestPath

__all__ = ["CellCosts", "Maps", "cost_ratio", "draw_maps", "path_loss", "read_maps", "train"]

TILE = 8
COSTS = torch.tensor([0.8, 1.2, 5.3, 7.7, 9.2])  # path, grass, forest, mountain, water
COLOURS = torch.tensor([[0.70, 0.60, 0.35], [0.35, 0.60, 0.25], [0.10, 0.35, 0.12], [0.45, 0.42, 0.40], [0.15, 0.30, 0.60]])


class Maps(NamedTuple):
    """Pictures ``(B, 3, TILE H, TILE W)`` in 0..1, true costs ``(B, H, W)`` and true paths ``(B, H, W)``."""

    pictures: Tensor
    costs: Tensor
    paths: Tensor


def draw_maps(count: int, size: int = 12, seed: int = 0, solver: Solver | None = None) -> Maps:
    """Made maps, a pure function of ``(count, size, seed)``.

    Args:
        count: maps.
        size: cells a side, at least 4.
        seed: of everything random.
        solver: of the labels; `ShortestPath()` with 8 neighbours if None.
    """
    if size < 4:
        raise ValueError(f"size: got {size}, wanted at least 4 cells a side")
    generator = generator_for(seed, "maps", size)
    height = torch.zeros(count, size, size)
    for coarse in (3, 5, 9):  # patches of several sizes
        field = torch.randn(count, 1, coarse, coarse, generator=generator)
        height += nn.functional.interpolate(field, (size, size), mode="bicubic").squeeze(1) * 3 / coarse
    flat = height.flatten(1)
    borders = flat.quantile(torch.tensor([0.15, 0.45, 0.7, 0.88]), dim=1).T.contiguous()
    kind = torch.searchsorted(borders, flat).reshape(height.shape)
    costs = COSTS[kind]
    return Maps(_paint(kind, generator), costs, solve(costs, ShortestPath() if solver is None else solver))


def _paint(kind: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures of terrain: colour, blended at the borders, with lighting and grain."""
    count, size, _ = kind.shape
    picture = COLOURS[kind].permute(0, 3, 1, 2)
    sharp = nn.functional.interpolate(picture, scale_factor=TILE, mode="nearest")
    soft = nn.functional.interpolate(picture, scale_factor=TILE, mode="bilinear")
    light = 1 + 0.15 * torch.randn(count, 1, 1, 1, generator=generator)
    grain = 0.08 * torch.randn(count, 3, TILE * size, TILE * size, generator=generator)
    return ((0.7 * sharp + 0.3 * soft) * light + grain).clamp(0, 1)


def read_maps(folder: str | Path, split: str = "train") -> Maps:
    """The published Warcraft files: ``{split}_maps.npy``, ``{split}_vertex_weights.npy``, ``{split}_shortest_paths.npy``.

    Raises:
        ValueError: naming the file that is missing, or whose shape does not fit the others.
    """
    arrays = []
    for name in ("maps", "vertex_weights", "shortest_paths"):
        path = Path(folder) / f"{split}_{name}.npy"
        if not path.is_file():
            raise ValueError(f"folder: no file {path}, wanted the published maps, weights and paths as npy files")
        arrays.append(torch.from_numpy(np.load(path)))
    pictures, costs, paths = arrays
    if costs.shape != paths.shape or pictures.shape[1:3] != (TILE * costs.shape[1], TILE * costs.shape[2]):
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
        raise ValueError(f"folder: got maps, weights and paths of shapes {shapes}, wanted {TILE} pixels a cell")
    return Maps(pictures.permute(0, 3, 1, 2).float() / 255, costs.float(), paths.float())


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


def cost_ratio(found: Tensor, maps: Maps) -> float:
    """The true cost of the found paths over that of the best, averaged over maps; 1 where every path is as good."""
    return ((found * maps.costs).sum((1, 2)) / (maps.paths * maps.costs).sum((1, 2))).mean().item()


class Trained(NamedTuple):
    """The network and its cost ratio on unseen maps after each epoch."""

    model: CellCosts
    ratio: list[float]


def train(
    maps: Maps,
    unseen: Maps,
    grad: Strategy,
    *,
    epochs: int = 10,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    solver: Solver | None = None,
) -> Trained:
    """A plain training run: Adam on the difference between paths."""
    solver = ShortestPath() if solver is None else solver
    generator = generator_for(seed, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CellCosts()
    optimizer, ratio = torch.optim.Adam(model.parameters(), lr=lr), []
    for epoch in range(epochs):
        for rows in torch.randperm(len(maps.costs), generator=generator).split(batch):
            step = seed * 1_000_003 + epoch * len(maps.costs) + int(rows[0])
            found = solve(model(maps.pictures[rows]), solver, grad=grad, truth=maps.paths[rows], seed=step)
            optimizer.zero_grad()
            path_loss(found, maps.paths[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            ratio.append(cost_ratio(solve(model(unseen.pictures), solver), unseen))
    return Trained(model, ratio)
