"""The pictures of a search: a line a trial through its settings to its figure; the figure over each setting."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Line
from numpy.typing import NDArray

from distset.report.plots import COLORS, GRID, INK, save

__all__ = ["plot_parallel", "plot_slices"]

MAP = "viridis"


class _Scale(NamedTuple):
    """Where the values of a setting lie between 0 and 1, and what stands beside the axis."""

    places: NDArray
    ticks: list[float]
    labels: list[str]


def plot_parallel(
    settings: Sequence[Mapping[str, Any]],
    figures: Sequence[float],
    path: Path,
    *,
    name: str,
    minimise: bool,
    log: Collection[str] = (),
) -> None:
    """Parallel coordinates: an axis a setting, the figure on the last one; the best trial is drawn in ink.

    Args:
        settings: of each trial, by name.
        figures: of each trial.
        path: of the PNG.
        name: of the figure.
        minimise: whether a low one is good.
        log: settings on a logarithmic axis.
    """
    names = list(settings[0])
    scales = [_scale([own[key] for own in settings], key in log) for key in names]
    scales.append(_scale(list(figures), False))
    figure = Figure(figsize=(2.2 + 1.9 * len(names), 4.4), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(-0.25, len(names) + 0.45), ylim=(-0.06, 1.14))
    for place, (key, scale) in enumerate(zip([*names, name], scales)):
        axes.plot([place, place], [0, 1], color="#999999", lw=0.9, zorder=3)
        axes.text(place, 1.07, key, ha="center", va="bottom", fontsize=9, fontweight="bold", color=INK)
        for tick, label in zip(scale.ticks, scale.labels):
            text = axes.text(place + 0.03, tick, label, va="center", fontsize=7.5, color="#555555", zorder=4)
            text.set_bbox({"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.8})
    colors = _colors(figures, minimise)
    order = np.argsort(figures)[:: -1 if minimise else 1]
    for trial in order:
        heights = [scale.places[trial] for scale in scales]
        best = trial == order[-1]
        line = PathPatch(_curve(heights), fill=False, lw=2.4 if best else 1.3, alpha=1 if best else 0.75)
        line.set_edgecolor(INK if best else colors[trial])
        axes.add_patch(line)
    save(figure, path)


def plot_slices(
    settings: Sequence[Mapping[str, Any]],
    figures: Sequence[float],
    path: Path,
    *,
    name: str,
    minimise: bool,
    log: Collection[str] = (),
) -> None:
    """The figure over each setting, a dot a trial; the best one is ringed. Arguments as of `plot_parallel`."""
    names = list(settings[0])
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.1 * rows), dpi=150, layout="constrained", facecolor="white")
    values = np.asarray(figures, np.float64)
    best = int(np.argmin(values) if minimise else np.argmax(values))
    for number, key in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors="#555555", labelsize=8.5)
        own = [setting[key] for setting in settings]
        if _numeric(own):
            xs = np.asarray(own, np.float64)
            if key in log:
                axes.set_xscale("log")
        else:
            scale = _scale(own, False)
            xs = scale.places
            axes.set_xticks(scale.ticks, scale.labels)
            axes.set_xlim(-0.15, 1.15)
        axes.scatter(xs, values, s=24, color=COLORS[0], alpha=0.75, lw=0)
        axes.scatter(xs[best], values[best], s=90, facecolor="none", edgecolor=INK, lw=1.6)
        axes.set_xlabel(key)
        if number % columns == 0:
            axes.set_ylabel(name)
    save(figure, path)


def _scale(values: Sequence[Any], log: bool) -> _Scale:
    """Numbers between their least and largest; anything else by name, at even distances."""
    if not _numeric(values):
        names = sorted({str(value) for value in values})
        where = {label: (place + 0.5) / len(names) for place, label in enumerate(names)}
        return _Scale(np.array([where[str(value)] for value in values]), list(where.values()), names)
    numbers = np.asarray(values, np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    if low == high:
        return _Scale(np.full(len(numbers), 0.5), [0.5], [f"{low:.3g}"])
    ends = np.log([low, high]) if log else np.array([low, high])
    placed = ((np.log(numbers) if log else numbers) - ends[0]) / (ends[1] - ends[0])
    ticks = np.unique(placed) if len(np.unique(placed)) < 6 else np.linspace(0, 1, 5)
    told = ends[0] + ticks * (ends[1] - ends[0])
    return _Scale(placed, ticks.tolist(), [f"{value:.3g}" for value in (np.exp(told) if log else told)])


def _curve(heights: Sequence[float]) -> Line:
    """A line that leaves and meets every axis level, so that trials which cross there can be told apart."""
    points, codes = [(0.0, float(heights[0]))], [Line.MOVETO]
    for place in range(1, len(heights)):
        before, here = float(heights[place - 1]), float(heights[place])
        points += [(place - 0.6, before), (place - 0.4, here), (float(place), here)]
        codes += [Line.CURVE4] * 3
    return Line(points, codes)


def _colors(figures: Sequence[float], minimise: bool) -> NDArray:
    """From dark for the best to light for the worst."""
    values = np.asarray(figures, np.float64) * (1 if minimise else -1)
    spread = Normalize(values.min(), values.max() + 1e-12)
    return ScalarMappable(spread, MAP).to_rgba(values)


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
