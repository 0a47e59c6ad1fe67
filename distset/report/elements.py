"""The elements that say most: found in one stream, picked out of the set, shown on a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from distset.report.heatmaps import _rgb
from distset.report.plots import save
from distset.sets import Chunk, ChunkedSet

__all__ = ["Extremes", "contact_sheet", "pick_elements"]


class Ranked(NamedTuple):
    """Elements in order: their positions in the set and their values."""

    positions: NDArray[np.int64]
    values: NDArray[np.float64]


class Extremes:
    """The ``k`` highest and lowest values of a stream, and where they are; of equal ones the first.

    Example:
        >>> import numpy as np
        >>> from distset.report import Extremes
        >>> extremes = Extremes(2)
        >>> extremes.add(0, np.array([0.3, -1.0, 2.0]))
        >>> extremes.add(3, np.array([5.0, 0.0]))
        >>> extremes.top.positions.tolist(), extremes.bottom.positions.tolist()
        ([3, 2], [1, 4])
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k: got {k}, wanted at least 1 element")
        self.k = k
        nothing = Ranked(np.zeros(0, np.int64), np.zeros(0))
        self.top, self.bottom = nothing, nothing

    def add(self, start: int, values: NDArray) -> None:
        """The values of the elements from position ``start`` on."""
        positions = np.arange(start, start + len(values))
        self.top = self._best(self.top, positions, values, -1)
        self.bottom = self._best(self.bottom, positions, values, 1)

    def _best(self, so_far: Ranked, positions: NDArray, values: NDArray, sign: int) -> Ranked:
        positions = np.concatenate([so_far.positions, positions])
        values = np.concatenate([so_far.values, np.asarray(values, np.float64)])
        order = np.argsort(sign * values, kind="stable")[: self.k]
        return Ranked(positions[order], values[order])


def pick_elements(set: ChunkedSet, positions: Sequence[int]) -> Tensor:
    """The elements at ``positions`` of a set without batch dimensions, in that order; only their chunks are read."""
    ends = np.cumsum(set.sizes)
    wanted = np.asarray(positions, np.int64)
    if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= ends[-1]:
        raise ValueError(f"positions: got {wanted.tolist()[:5]}, wanted some from 0 to {ends[-1] - 1}")
    ids = sorted({int(chunk) for chunk in np.searchsorted(ends, wanted, side="right")})
    found: dict[int, Tensor] = {}
    for part in set.map(_take, wanted.tolist(), ids=ids):
        found |= part
    return torch.stack([found[position] for position in wanted.tolist()])


def contact_sheet(path: Path, rows: Sequence[tuple[str, NDArray, Sequence[str]]], *, title: str, columns: int = 8) -> None:
    """Patches with captions, in groups.

    Args:
        path: of the PNG.
        rows: ``(name of the group, patches (N, C, H, W) of uint8, N captions)``.
        title: above all.
        columns: patches a line.
    """
    lines = [-(-len(patches) // columns) for _, patches, _ in rows]
    figure = Figure(figsize=(1.25 * columns + 0.3, 1.42 * sum(lines) + 0.4 * len(rows) + 0.4), dpi=140, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    groups = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=[1.42 * n + 0.4 for n in lines]).ravel()
    for group, (name, patches, captions), count in zip(groups, rows, lines, strict=True):
        group.suptitle(name, x=0.01, ha="left", fontsize=9.5, color="#444444")
        grid = group.subplots(count, columns, squeeze=False).ravel()
        for place, axis in enumerate(grid):
            axis.set_axis_off()
            if place < len(patches):
                axis.imshow(_rgb(patches[place]), interpolation="nearest")
                axis.set_title(captions[place], fontsize=7.5, pad=2)
    save(figure, path)


def _take(chunk: Chunk, positions: Sequence[int]) -> dict[int, Tensor]:
    inside = [p for p in positions if chunk.start <= p < chunk.start + chunk.size]
    return {p: chunk.elements[p - chunk.start].clone() for p in inside}
