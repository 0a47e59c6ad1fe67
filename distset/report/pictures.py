"""Grids of small pictures: images beside what a model made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from numpy.typing import ArrayLike

from distset.report.plots import INK, new_figure, save

__all__ = ["plot_image_rows"]

MARK = ListedColormap([(0, 0, 0, 0), (0.84, 0.15, 0.16, 0.85)])


def plot_image_rows(
    rows: Mapping[str, ArrayLike], path: Path, *, marks: Mapping[str, ArrayLike] | None = None, columns: int = 10
) -> None:
    """Rows of images side by side, each with its name at the left.

    Args:
        rows: by name, images ``(count, H, W)``; the darkest and brightest value of a row are black and white.
        path: of the PNG.
        marks: by name of a row, 1 where a pixel of its images is painted red, ``(count, H, W)`` or one for all, ``(H, W)``.
        columns: images shown of a row.

    Raises:
        ValueError: for no rows, rows that are not stacks of images, marks of a row that is not there.
    """
    marks = marks or {}
    arrays = {name: np.asarray(images, np.float64) for name, images in rows.items()}
    bad = [name for name, images in arrays.items() if images.ndim != 3 or not len(images)]
    if not arrays or bad or set(marks) - set(arrays):
        raise ValueError(f"rows: got {', '.join(bad) or 'none'} (marks: {', '.join(marks) or 'none'}), wanted (count, H, W)")
    columns = min(columns, max(len(images) for images in arrays.values()))
    figure = new_figure(1.3 + 0.9 * columns, 0.95 * len(arrays))
    grid = figure.subplots(len(arrays), columns, squeeze=False)
    for line, (name, images) in zip(grid, arrays.items()):
        low, high = images.min(), images.max()
        for place, axes in enumerate(line):
            axes.set_axis_off()
            if place < len(images):
                axes.imshow(images[place], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
                if name in marks:
                    painted = np.broadcast_to(np.asarray(marks[name]), images.shape)[place]
                    axes.imshow(painted, cmap=MARK, vmin=0, vmax=1, interpolation="nearest")
        line[0].text(-0.08, 0.5, name, transform=line[0].transAxes, ha="right", va="center", color=INK, fontsize=9)
    save(figure, path)
