"""Figures of a gathered table: a metric over the steps, a figure over a setting, a dot a row; pictures that its runs drew.

What a table wants drawn is plain configuration, any of::

    curve: loss                                     # this validation metric over the steps, a line a row
    lines: {figure: micro_f1, over: words, log: true, rows: {sampled: {25: "BERT, sampled 25", 100: "BERT, sampled 100"}}}
    dots: loss                                      # this figure, a dot a row
    pictures: {"UMBC": [clusterings, streams]}      # of the first run of a row, from its plots/
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distset.report.convergence import plot_convergence
from distset.report.set_figures import Curve, plot_dots, plot_lines

__all__ = ["draw_table"]

KINDS = ("curve", "lines", "dots", "pictures")


def draw_table(wanted: Mapping[str, Any], gathered: Mapping[str, Any], runs: Mapping[str, Path], path: Path) -> None:
    """Draw what is wanted and known: ``<path>-<kind>.png``, and ``<path>-<picture>.png``.

    Args:
        wanted: see above.
        gathered: the table, as `distset.reproduce.collect` writes it.
        runs: the folder of each row's runs.
        path: of the PNGs, without what follows.

    Raises:
        ValueError: for a kind that there is not, a row or a figure that the table has not.
    """
    if unknown := set(wanted) - set(KINDS):
        raise ValueError(f"draw: got {', '.join(sorted(unknown))}, wanted some of {', '.join(KINDS)}")
    values = {
        row["name"]: {key: [value for value in own if value is not None] for key, own in row["values"].items()}
        for row in gathered["rows"]
    }
    named = {name for line in wanted.get("lines", {}).get("rows", {}).values() for name in line.values()}
    if unknown := (named | set(wanted.get("pictures", {}))) - set(values):
        raise ValueError(f"draw: the table has no row {', '.join(sorted(unknown))}")
    shown = {wanted.get("dots"), wanted.get("lines", {}).get("figure")} - {None}
    if unknown := shown - set(gathered["figures"]):
        raise ValueError(
            f"draw: the table has no figure {', '.join(sorted(unknown))}, it has {', '.join(gathered['figures'])}"
        )
    if "curve" in wanted:
        histories = {name: found for name, folder in runs.items() if (found := _histories(folder))}
        if histories:
            plot_convergence(histories, wanted["curve"], _beside(path, "curve"))
    if "lines" in wanted:
        _lines(wanted["lines"], gathered, values, _beside(path, "lines"))
    if "dots" in wanted:
        known = {name: own[wanted["dots"]] for name, own in values.items() if own.get(wanted["dots"])}
        if known:
            plot_dots(known, _beside(path, "dots"), x=gathered["figures"][wanted["dots"]], title=gathered["title"])
    for row, pictures in wanted.get("pictures", {}).items():
        for picture in pictures:
            drawn = sorted(runs[row].rglob(f"plots/{picture}.png"))
            if drawn:
                shutil.copyfile(drawn[0], _beside(path, picture))


def _lines(wanted: Mapping[str, Any], gathered: Mapping[str, Any], values: Mapping[str, Any], path: Path) -> None:
    curves = []
    for name, rows in wanted["rows"].items():
        known = [(float(x), values[row][wanted["figure"]]) for x, row in rows.items() if values[row].get(wanted["figure"])]
        if known:
            spreads = [statistics.stdev(own) if len(own) > 1 else 0.0 for _, own in known]
            curves.append(Curve(name, [x for x, _ in known], [statistics.fmean(own) for _, own in known], spreads))
    if any(len(curve.x) > 1 for curve in curves):
        y = gathered["figures"][wanted["figure"]]
        plot_lines(curves, path, x=wanted["over"], y=y, title=gathered["title"], log_x=wanted.get("log", False))


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}-{what}.png")


def _histories(folder: Path) -> list[Sequence[Mapping[str, float]]]:
    """The records of all runs of a row."""
    files = sorted(folder.rglob("metrics.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
