"""The pictures of a run: curves over steps, ROC, confusion, folds. Each function writes one PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from distset.report.scores import Interval, auroc, quantiles, resampled

__all__ = ["new_axes", "new_figure", "plot_confusion", "plot_curves", "plot_roc", "plot_spread", "save"]

INK, GRID = "#222222", "#e6e6e6"
COLORS = ("#1f6fb4", "#d9792b", "#2f9160", "#b43a5c", "#7a5bb5", "#8a6d3b", "#4d9db8", "#7f7f7f")
SPLITS = {"train": "#8c8c8c", "val": "#1f6fb4", "valid": "#1f6fb4", "test": "#d9792b"}
FALSE_RATES = np.linspace(0, 1, 201)
NAMES = {"auroc": "AUROC", "f1": "F1", "loss": "loss"}


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path, *, metrics: Sequence[str] | None = None) -> None:
    """Metrics over steps, a panel each, a line for each split.

    Args:
        history: rows with ``step`` and figures named ``<split>/<metric>``, as ``metrics.jsonl`` has them; a row need not
            have all of them.
        path: of the PNG.
        metrics: the panels; every metric found except the loss if None.

    Raises:
        ValueError: where no row has any of the metrics.
    """
    series = _series(history)
    found = list(dict.fromkeys(name for name, _ in series))
    panels = [m for m in found if m != "loss"] if metrics is None else [m for m in metrics if m in found]
    if not panels:
        raise ValueError(
            f"history: has {', '.join(found) or 'no metric'}, wanted rows with <split>/<metric> for {metrics or 'any'}"
        )
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = new_figure(5.6 * columns, 3.6 * rows)
    for number, metric in enumerate(panels):
        axes = new_axes(figure, (rows, columns, number + 1))
        for position, split in enumerate(dict.fromkeys(s for m, s in series if m == metric)):
            steps, values = series[metric, split]
            color = SPLITS.get(split, COLORS[position % len(COLORS)])
            axes.plot(steps, values, color=color, label=split, lw=1.6, marker="o" if len(steps) < 25 else None, ms=3.5)
        axes.set_title(_name(metric), loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend()
    save(figure, path)


def plot_roc(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    path: Path,
    *,
    threshold: float | None = None,
    cases: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> None:
    """The ROC curve with its bootstrap 95 % band and operating point; of more than two classes, each against the rest.

    Args:
        labels: class numbers ``(N)``.
        probabilities: ``(N, C)``.
        classes: their names.
        path: of the PNG.
        threshold: marks the operating point of two classes.
        cases, resamples, seed: of the bootstrap, as in `bag_scores`; without resamples there is no band.
    """
    y, p = np.asarray(labels), np.asarray(probabilities, np.float64)
    shown = [1] if p.shape[1] == 2 else [c for c in range(p.shape[1]) if 0 < np.sum(y == c) < len(y)]
    figure = new_figure(5.2, 5.0)
    axes = new_axes(figure, (1, 1, 1))
    axes.plot([0, 1], [0, 1], color="#aaaaaa", lw=1, ls=(0, (4, 4)), zorder=1)
    for position, c in enumerate(shown):
        color, positive, scores = COLORS[position % len(COLORS)], y == c, p[:, c]
        areas, curves = [], []
        for weights in resampled(y, cases, resamples, seed):
            areas.append(auroc(positive, scores, weights))
            curves.append(_curves(positive, scores, weights))
        if curves and len(shown) == 1:
            low, high = np.quantile(np.concatenate(curves), [0.025, 0.975], axis=0)
            axes.fill_between(FALSE_RATES, low, high, color=color, alpha=0.15, lw=0)
        whole = np.ones((1, len(y)))
        area = Interval(float(auroc(positive, scores, whole)[0]), *quantiles(np.concatenate([np.empty(0), *areas])))
        false, true = _roc(positive, scores, whole)
        name = "AUROC" if len(shown) == 1 else str(classes[c])
        axes.plot(false[0], true[0], color=color, lw=1.8, label=f"{name} {area}")
    if threshold is not None and len(shown) == 1:
        called = p[:, 1] >= threshold
        point = np.mean(called[y != 1]), np.mean(called[y == 1])
        axes.plot(*point, "o", color=INK, ms=6, zorder=5, label=f"threshold {threshold:.3f}")
    axes.set(
        xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal"
    )
    title = (
        f"ROC: {classes[1]}, {np.sum(y == 1)} of {len(y)} sets" if len(shown) == 1 else "ROC: each class against the rest"
    )
    axes.set_title(title, loc="left", fontweight="bold")
    axes.legend(loc="lower right")
    save(figure, path)


def plot_confusion(labels: ArrayLike, predicted: ArrayLike, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix: counts, shaded by the share of the true class."""
    y, called = np.asarray(labels), np.asarray(predicted)
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (y, called), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.4 + 0.75 * len(classes)
    figure = new_figure(side + 0.6, side)
    axes = new_axes(figure, (1, 1, 1))
    axes.grid(False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        axes.text(
            column, row - 0.07, f"{count:,}", ha="center", va="center", color="w" if share > 0.55 else INK, fontsize=13
        )
        axes.text(
            column,
            row + 0.22,
            f"{share:.0%}",
            ha="center",
            va="center",
            color="w" if share > 0.55 else "#666666",
            fontsize=8.5,
        )
    names = [str(name) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 9 else 30)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"{len(y):,} sets", loc="left", fontweight="bold")
    save(figure, path)


def plot_spread(runs: Sequence[Mapping[str, float]], path: Path) -> None:
    """Scores over folds or seeds: a dot for each run, mean and standard deviation beside them.

    Args:
        runs: ``{metric: value}`` of each run.
        path: of the PNG.
    """
    metrics = list(runs[0])
    figure = new_figure(1.6 + 1.5 * len(metrics), 4.0)
    axes = new_axes(figure, (1, 1, 1))
    spread = np.linspace(-0.14, 0.06, len(runs)) if len(runs) > 1 else np.zeros(1)
    for place, metric in enumerate(metrics):
        values, color = np.array([run[metric] for run in runs], np.float64), COLORS[place % len(COLORS)]
        mean, deviation = np.nanmean(values), np.nanstd(values, ddof=1) if len(values) > 1 else 0.0
        axes.scatter(place + spread, values, s=26, color=color, alpha=0.55, lw=0)
        axes.errorbar(place + 0.2, mean, deviation, fmt="o", color=color, ms=6, capsize=4, lw=1.8)
        axes.annotate(f"{mean:.3f}\n±{deviation:.3f}", (place + 0.27, mean), fontsize=8.5, va="center", color=INK)
    axes.set_xticks(range(len(metrics)), [_name(m) for m in metrics])
    axes.set_xlim(-0.45, len(metrics) - 0.3)
    axes.grid(False, axis="x")
    axes.set_title(f"{len(runs)} runs: each, and mean ± standard deviation", loc="left", fontweight="bold")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(str(path), bbox_inches="tight", pad_inches=0.12)


def new_figure(width: float, height: float) -> Figure:
    """A figure in the house's style, inches wide and high."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def new_axes(figure: Figure, place: tuple[int, int, int]) -> Axes:
    """Axes at ``(rows, columns, number)`` in the house's style."""
    axes = figure.add_subplot(*place)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=9)
    return axes


def _series(history: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """``(metric, split) -> (steps, values)``."""
    series: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for row in history:
        for key, value in row.items():
            split, slash, metric = key.partition("/")
            if slash and isinstance(value, int | float) and math.isfinite(value):
                steps, values = series.setdefault((metric, split), ([], []))
                steps.append(float(row["step"]))
                values.append(float(value))
    return series


def _roc(positive: NDArray, scores: NDArray, weights: NDArray) -> tuple[NDArray, NDArray]:
    """False and true positive rates ``(B, T + 1)`` at every distinct score, from the highest down, for many weightings."""
    _, rank = np.unique(-scores, return_inverse=True)
    order = np.argsort(rank, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(rank[order])) + 1])
    rates = []
    for chosen in (~positive, positive):
        counts = np.cumsum(np.add.reduceat((weights * chosen)[:, order], starts, axis=1), 1)
        rates.append(np.pad(counts / counts[:, -1:], ((0, 0), (1, 0))))
    return rates[0], rates[1]


def _curves(positive: NDArray, scores: NDArray, weights: NDArray) -> NDArray:
    """The true positive rate that is reached at each of `FALSE_RATES`, ``(B, 201)``, for many weightings."""
    return np.stack([t[np.searchsorted(f, FALSE_RATES, side="right") - 1] for f, t in zip(*_roc(positive, scores, weights))])


def _name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))
