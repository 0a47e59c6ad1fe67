"""How fast methods learn: a metric over steps, a line a method, with the spread over its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distset.report.plots import COLORS, new_axes, new_figure, save

__all__ = ["plot_convergence"]

DASHES: tuple[str, ...] = ("-", "--", ":")


def plot_convergence(histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], metric: str, path: Path) -> None:
    """The mean of ``val/<metric>`` over the runs of each method, with a band from the least to the greatest run.

    Args:
        histories: of each method, the records of its runs, as ``metrics.jsonl`` has them.
        metric: without its split.
        path: of the PNG.

    Raises:
        ValueError: where no run has a record of the metric.
    """
    found = {name: [_series(run, f"val/{metric}") for run in runs] for name, runs in histories.items()}
    found = {name: [run for run in runs if run] for name, runs in found.items()}
    if not any(found.values()):
        raise ValueError(f"histories: no record has val/{metric}, wanted one of the metrics of the runs")
    figure = new_figure(8.4, 0.9 + max(3.4, 0.26 * len(found)))
    axes = new_axes(figure, (1, 1, 1))
    for place, (name, runs) in enumerate((name, runs) for name, runs in found.items() if runs):
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        values = np.array([[run[step] for step in steps] for run in runs])
        color, dash = COLORS[place % len(COLORS)], DASHES[place // len(COLORS) % len(DASHES)]
        axes.plot(steps, values.mean(0), color=color, ls=dash, lw=1.6, label=name)
        if len(runs) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, lw=0)
    axes.set(xlabel="step", ylabel=f"validation {metric.replace('_', ' ')}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    save(figure, path)


def _series(history: Sequence[Mapping[str, float]], key: str) -> dict[int, float]:
    return {int(record["step"]): float(record[key]) for record in history if key in record}
