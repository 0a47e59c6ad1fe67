"""Which patches to cut: a grid at a wanted resolution, where there is enough tissue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distset.data.slides.reading import Level

__all__ = ["Cut", "plan_grid", "tissue_share"]

ALIKE = 0.05  # resolutions this close count as equal: 0.499 for 0.5 is not resampled


class Cut(NamedTuple):
    """How patches of one size at one resolution come out of a slide.

    Attributes:
        level: to read from, the coarsest that is not coarser than wanted.
        side: edge of the square to read, in pixels of that level; resampled to ``size``.
        step: from one patch to the next, in pixels of that level.
        size: edge of a patch, in its own pixels.
        downsample: of the level.
        mpp: micrometres a pixel of a patch.
    """

    level: int
    side: int
    step: int
    size: int
    downsample: float
    mpp: float

    @property
    def extent(self) -> float:
        """Edge of a patch in pixels of level 0."""
        return self.side * self.downsample

    @staticmethod
    def of(levels: Sequence[Level], slide_mpp: float, *, mpp: float, size: int, overlap: float) -> Cut:
        """The cut for a slide.

        Raises:
            ValueError: for a slide whose finest level is coarser than wanted.
        """
        if slide_mpp > mpp * (1 + ALIKE):
            raise ValueError(
                f"its finest pixels are {slide_mpp:g} micrometres, wanted {mpp:g}; a higher mpp keeps it, at less detail"
            )
        fitting = [i for i, at in enumerate(levels) if at.downsample * slide_mpp <= mpp * (1 + ALIKE)]
        level = max(fitting, key=lambda i: levels[i].downsample)
        downsample = levels[level].downsample
        ratio = mpp / (downsample * slide_mpp)
        side = size if abs(ratio - 1) <= ALIKE else round(size * ratio)
        step = max(1, round(side * (1 - overlap)))
        return Cut(level, side, step, size, downsample, downsample * slide_mpp * side / size)


def plan_grid(cut: Cut, level: Level, mask: np.ndarray, scale: float, least: float) -> np.ndarray:
    """The corners ``(N, 2)`` of the patches to cut, x and y in pixels of the cut's level, row by row.

    Patches lie on a grid from the slide's upper left corner, wholly inside of it.

    Args:
        cut, level: how to cut, and the level's size.
        mask: where there is tissue.
        scale: pixels of level 0 that a pixel of the mask spans.
        least: the smallest share of a patch that is tissue, above 0 to 1.
    """
    xs = np.arange(0, level.width - cut.side + 1, cut.step)
    ys = np.arange(0, level.height - cut.side + 1, cut.step)
    if not len(xs) or not len(ys):
        return np.empty((0, 2), np.int64)
    share = tissue_share(mask, xs * cut.downsample / scale, ys * cut.downsample / scale, cut.extent / scale)
    rows, columns = np.nonzero(share >= least - 1e-9)  # sums of ones are not quite ones
    return np.stack([xs[columns], ys[rows]], -1)


def tissue_share(mask: np.ndarray, xs: np.ndarray, ys: np.ndarray, side: float) -> np.ndarray:
    """The share of tissue ``(len(ys), len(xs))`` in squares of edge ``side`` with corners at ``xs, ys``, in pixels of the
    mask and not rounded to them: a pixel that is cut counts by the part that is inside."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    sums[1:, 1:] = mask.cumsum(0).cumsum(1)

    def along(axis: int, table: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Between two pixels, sums grow in proportion."""
        at = np.clip(at, 0, table.shape[axis] - 1)
        first = np.minimum(at.astype(int), table.shape[axis] - 2)
        part = (at - first).reshape((-1, 1) if axis == 0 else (1, -1))
        return table.take(first, axis) * (1 - part) + table.take(first + 1, axis) * part

    above, below = along(0, sums, ys), along(0, sums, ys + side)
    inside = along(1, below - above, xs + side) - along(1, below - above, xs)
    return inside / side**2
