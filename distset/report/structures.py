"""Pictures of what solvers found: tours over the world, paths over terrain, matches of keypoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from distset.report.plots import new_axes, new_figure, save

__all__ = ["plot_matches", "plot_paths", "plot_tours"]

TRUE, FOUND = "#2171b5", "#cb181d"


def plot_tours(lonlat: Tensor, truth: Tensor, found: Tensor, path: Path) -> None:
    """True tours in blue, found ones in red over them where they differ.

    Args:
        lonlat: degrees ``(B, k, 2)``.
        truth, found: adjacency ``(B, k, k)``.
        path: of the PNG.
    """
    figure, panels = _panels(len(truth), 4.4, 2.6)
    for index, axes in enumerate(panels):
        places = lonlat[index].numpy()
        for tour, color, style, width in ((truth, TRUE, "-", 3.0), (found, FOUND, "--", 1.4)):
            for a, b in np.argwhere(np.triu(tour[index].numpy() + tour[index].numpy().T) > 0):
                axes.plot(*places[[a, b]].T, color=color, ls=style, lw=width, alpha=0.8)
        axes.scatter(places[:, 0], places[:, 1], s=18, color="black", zorder=3)
        same = bool((truth[index] == found[index]).all())
        axes.set_title("the true tour" if same else "another tour", loc="left", fontsize=9)
        axes.set_xlim(-180, 180)
        axes.set_ylim(-65, 80)
        axes.set_xlabel("longitude")
        axes.set_ylabel("latitude")
    save(figure, path)


def plot_paths(pictures: Tensor, truth: Tensor, found: Tensor, path: Path) -> None:
    """Maps with the true path (blue) and the one found (red, narrower).

    Args:
        pictures: ``(B, 3, H', W')`` in 0..1.
        truth, found: paths over cells, ``(B, H, W)``.
        path: of the PNG.
    """
    figure, panels = _panels(len(truth), 3.0, 3.1)
    for index, axes in enumerate(panels):
        axes.imshow(pictures[index].permute(1, 2, 0).cpu().numpy())
        cell = pictures.shape[-1] / truth.shape[-1]
        for cells, color, size in ((truth, TRUE, 60), (found, FOUND, 16)):
            where = np.argwhere(cells[index].cpu().numpy() > 0) * cell + cell / 2
            axes.scatter(where[:, 1], where[:, 0], s=size, color=color, lw=0)
        axes.set_axis_off()
    figure.suptitle("blue: the best path, red: the one found", fontsize=10)
    save(figure, path)


def plot_matches(first: Tensor, second: Tensor, truth: Tensor, found: Tensor, path: Path) -> None:
    """Pairs of clouds side by side with the matches found: right ones blue, wrong ones red.

    Args:
        first, second: ``(B, n, 2)`` and ``(B, m, 2)``.
        truth, found: ``(B, n, m)``.
        path: of the PNG.
    """
    figure, panels = _panels(len(first), 4.2, 2.4)
    for index, axes in enumerate(panels):
        left, right = first[index].numpy(), second[index].numpy() + np.array([3.5, 0])
        axes.scatter(left[:, 0], left[:, 1], s=14, color="black")
        axes.scatter(right[:, 0], right[:, 1], s=14, color="black")
        for a, b in np.argwhere(found[index].numpy() > 0):
            color = TRUE if truth[index, a, b] > 0 else FOUND
            axes.plot(*np.stack([left[a], right[b]]).T, color=color, lw=1.2, alpha=0.8)
        axes.set_axis_off()
    save(figure, path)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels of so many inches, up to three in a row."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows)
    return figure, [new_axes(figure, (rows, columns, index + 1)) for index in range(count)]
