"""Maps of terrain: made ones in the manner of the Warcraft set, and the real files.

`draw_maps` makes patches of terrain of five kinds, pictures of 8 x 8 pixels a cell with texture, lighting and blending at
the borders. `read_maps` reads the published files (Vlastelica et al. 2020, https://arxiv.org/abs/1912.02175, section 4.1;
data of Guyomarch 2017).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distset.seeds import generator_for, seed_for
from distset.sets import InMemory
from distset.solve import solve
from distset.solvers.base import Solver
from distset.solvers.shortest_path import ShortestPath
from distset.tasks.terrain import TILE
from distset.train import Example, Parts

__all__ = ["Maps", "draw_maps", "drawn", "files", "read_maps"]

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
        ValueError: naming the file that is missing; for shapes that do not fit each other.
    """
    arrays = []
    for name in ("maps", "vertex_weights", "shortest_paths"):
        path = Path(folder) / f"{split}_{name}.npy"
        if not path.is_file():
            raise ValueError(f"folder: no file {path}, wanted the published maps, weights and paths as npy files")
        arrays.append(torch.from_numpy(np.load(path)))
    pictures, costs, paths = arrays
    shapes = [tuple(array.shape) for array in arrays]
    count, *sides = shapes[1]
    if len(sides) != 2 or shapes[2] != shapes[1] or shapes[0] != (count, *(TILE * side for side in sides), 3):
        raise ValueError(
            f"folder: {folder} has {split} maps, weights and paths of shapes {', '.join(map(str, shapes))}, wanted "
            f"(B, {TILE} H, {TILE} W, 3), (B, H, W) and (B, H, W): {TILE} pixels a cell, as many maps, weights and paths"
        )
    return Maps(pictures.permute(0, 3, 1, 2).float() / 255, costs.float(), paths.float())


def drawn(maps: tuple[int, int, int] = (1000, 200, 200), *, size: int = 12, neighbours: int = 8, seed: int = 0) -> Parts:
    """Made maps to train, validate and test on, ``size`` cells a side; their paths step to 4 or 8 ``neighbours``."""
    solver = ShortestPath(neighbours)
    return _parts([draw_maps(count, size, seed_for(seed, "terrain", part), solver) for part, count in enumerate(maps)])


def files(path: str) -> Parts:
    """The published files of a folder: ``train_*.npy``, ``val_*.npy``, ``test_*.npy``."""
    return _parts([read_maps(path, split) for split in ("train", "val", "test")])


def _parts(made: list[Maps]) -> Parts:
    train, val, test = ([_example(maps, slice(i, i + group)) for i in range(0, len(maps.costs), group)]
                        for maps, group in zip(made, (1, 50, 50)))  # fmt: skip
    return Parts(train, val, test, {})


def _example(maps: Maps, own: slice) -> Example:
    picture = InMemory(maps.pictures[own].unsqueeze(1), element_ndim=3, name=f"maps-{own.start}")
    return Example(picture, (maps.costs[own], maps.paths[own]))
