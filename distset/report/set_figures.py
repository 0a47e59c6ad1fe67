"""The pictures of the set-encoder experiments, in the form of the paper's figures; each function writes one PNG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from numpy.typing import ArrayLike

from distset.report.plots import COLORS, INK, new_axes, new_figure, save

__all__ = ["Curve", "MixturePanel", "plot_completions", "plot_dots", "plot_lines", "plot_mixtures", "plot_variances"]


class MixturePanel(NamedTuple):
    """A set of points with a mixture over it.

    Attributes:
        points, labels: ``(N, 2)`` and the component ``(N)`` that each came from.
        weights, means, variances: of the predicted mixture, ``(K)``, ``(K, 2)``, ``(K, 2)``.
        title: above the panel.
        seen: bool ``(N)``, the points that the model has been shown; all of them if None.
    """

    points: ArrayLike
    labels: ArrayLike
    weights: ArrayLike
    means: ArrayLike
    variances: ArrayLike
    title: str
    seen: ArrayLike | None = None


class Curve(NamedTuple):
    """A line with a spread: ``y`` over ``x``."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


def plot_mixtures(panels: Sequence[MixturePanel], path: Path, *, columns: int = 4) -> None:
    """Sets coloured by their true components, with ellipses at one and two standard deviations of the predicted ones."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(2.7 * columns, 2.8 * rows)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        _draw_mixture(axes, panel)
    save(figure, path)


def _draw_mixture(axes: Axes, panel: MixturePanel) -> None:
    points, labels = np.asarray(panel.points), np.asarray(panel.labels)
    seen = np.ones(len(points), bool) if panel.seen is None else np.asarray(panel.seen)
    axes.scatter(points[~seen, 0], points[~seen, 1], s=2, color="#dddddd", lw=0)
    for label in np.unique(labels[seen]):
        own = points[seen & (labels == label)]
        axes.scatter(own[:, 0], own[:, 1], s=4, color=COLORS[int(label) % len(COLORS)], alpha=0.6, lw=0)
    for weight, mean, variance in zip(*map(np.asarray, (panel.weights, panel.means, panel.variances))):
        for radius in (1, 2):
            size = 2 * radius * np.sqrt(variance)
            alpha = float(0.25 + 0.75 * min(1.0, 2 * weight))
            axes.add_patch(Ellipse(tuple(mean), *size, fill=False, color=INK, lw=1.4 / radius, alpha=alpha))
    axes.set(xlim=(-6, 6), ylim=(-6, 6), xticks=[], yticks=[], aspect="equal")
    axes.set_title(panel.title, fontsize=8.5, loc="left")


def plot_variances(variances: Mapping[str, float], path: Path, *, floor: float = 1e-34) -> None:
    """The variance of encodings over partitions, a bar for each model, on a logarithmic scale (figure 3)."""
    names = list(variances)
    figure = new_figure(6.4, 0.9 + 0.36 * len(names))
    axes = new_axes(figure, (1, 1, 1))
    values = np.maximum([variances[name] for name in names], floor)
    colors = [COLORS[0] if variances[name] < 1e-12 else COLORS[1] for name in names]
    axes.barh(range(len(names)), np.log10(values) - np.log10(floor), left=np.log10(floor), color=colors, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("log10 of the variance over partitions (float64)")
    axes.set_title("the same set in other partitions", loc="left", fontweight="bold")
    save(figure, path)


def plot_lines(
    curves: Sequence[Curve], path: Path, *, x: str, y: str, title: str = "", log_x: bool = False, top: float | None = None
) -> None:
    """Lines with bands of one standard deviation, shown up to ``top``."""
    figure = new_figure(5.6, 3.8)
    axes = new_axes(figure, (1, 1, 1))
    for place, curve in enumerate(curves):
        color, values = COLORS[place % len(COLORS)], np.asarray(curve.y, np.float64)
        axes.plot(
            curve.x, values, color=color, label=curve.name, lw=1.7, ms=4, marker="o" if len(values) < 25 else None,
            ls=("-", "--")[place % 2], zorder=3 + len(curves) - place,  # lines that coincide are all seen
        )  # fmt: skip
        if curve.spread is not None:
            spread = np.asarray(curve.spread)
            axes.fill_between(curve.x, values - spread, values + spread, color=color, alpha=0.15, lw=0)
    if top is not None:
        axes.set_ylim(top=top)
    if log_x:
        axes.set_xscale("log")
        places = sorted({value for curve in curves for value in curve.x})
        if len(places) < 10:
            axes.set_xticks(places, [f"{value:g}" for value in places])
            axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.legend(fontsize=8)
    save(figure, path)


def plot_completions(rows: Sequence[Sequence[ArrayLike]], columns: Sequence[str], path: Path) -> None:
    """Images side by side, a row for each one completed: ``columns`` names what stands in them.

    Args:
        rows: images ``(H, W)`` or ``(H, W, 3)`` in [0, 1]; pixels that are nan are shown as not given.
        columns: a title for each image of a row.
        path: of the PNG.
    """
    figure = new_figure(1.25 * len(columns), 1.3 * len(rows) + 0.2)
    for number, row in enumerate(rows):
        for place, (image, name) in enumerate(zip(row, columns, strict=True)):
            axes = figure.add_subplot(len(rows), len(columns), number * len(columns) + place + 1)
            pixels = np.asarray(image, np.float64)
            shown = np.repeat(pixels[..., None], 3, -1) if pixels.ndim == 2 else pixels.copy()
            shown[np.isnan(shown).any(-1)] = (0.35, 0.45, 0.6)
            axes.imshow(shown.clip(0, 1), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if number == 0:
                axes.set_title(name, fontsize=8)
    save(figure, path)


def plot_dots(values: Mapping[str, Sequence[float]], path: Path, *, x: str, title: str) -> None:
    """A line for each name: its mean as a dot, one standard deviation as a bar."""
    figure = new_figure(5.6, 0.9 + 0.34 * len(values))
    axes = new_axes(figure, (1, 1, 1))
    means = [statistics.fmean(own) for own in values.values()]
    spreads = [statistics.stdev(own) if len(own) > 1 else 0.0 for own in values.values()]
    axes.errorbar(means, range(len(values)), xerr=spreads, fmt="o", color=COLORS[0], capsize=3)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(x)
    axes.set_title(title, loc="left", fontweight="bold")
    save(figure, path)
