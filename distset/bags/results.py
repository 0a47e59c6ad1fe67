"""What is written when a bag classifier is trained: predictions, figures with intervals, plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distset.bags.runs import Outcome
from distset.data import Split, Store
from distset.report import (
    bag_scores,
    choose_threshold,
    plot_confusion,
    plot_curves,
    plot_roc,
    predicted_classes,
    prediction_table,
    write_json,
    write_table,
)

__all__ = ["describe", "write_results"]

SCORES = ("auroc", "balanced_accuracy", "f1", "accuracy")


def write_results(folder: Path, outcome: Outcome, store: Store, split: Split, *, plots: bool = True) -> None:
    """Predictions, plots and, as the last thing, ``metrics.json``: where that is, a run is finished.

    The threshold of two classes is chosen on the validation sets; without any it is 1/2.
    """
    parts = {part: ids for part, ids in (("val", split.val), ("test", split.test)) if ids}
    labels = {part: store.labels(ids).numpy() for part, ids in parts.items()}
    p = {part: np.array(outcome.probabilities[part]) for part in parts}
    cases = {part: [store.record(set_id).case_id for set_id in ids] for part, ids in parts.items()}
    threshold = choose_threshold(labels["val"], p["val"]) if "val" in parts and len(store.classes) == 2 else None
    tables = [
        prediction_table(
            p[part],
            store.classes,
            set_ids=ids,
            case_ids=cases[part],
            labels=[store.record(set_id).label for set_id in ids],
            split=part,
            threshold=threshold,
        )
        for part, ids in parts.items()
    ]
    if tables:
        write_table(pd.concat(tables), folder / "predictions")
    if plots:
        plot_curves(outcome.history, folder / "plots" / "loss.png", metrics=["loss"])
        if split.val:
            plot_curves(outcome.history, folder / "plots" / "metrics.png", metrics=SCORES)
        if split.test:
            _plot_test(folder / "plots", labels["test"], p["test"], store.classes, threshold, cases["test"])
    figures = {
        "steps": outcome.step,
        "best_step": outcome.best_step,
        "stopped_early": outcome.stopped,
        "sets": {part: len(ids) for part, ids in zip(Split._fields, split)},
        "threshold": threshold,
    }
    scores = {part: bag_scores(labels[part], p[part], threshold=threshold, cases=cases[part]) for part in parts}
    write_json(folder / "metrics.json", {**figures, **scores})


def _plot_test(
    folder: Path, y: np.ndarray, p: np.ndarray, classes: Sequence[str], threshold: float | None, cases: Sequence[str]
) -> None:
    plot_confusion(y, predicted_classes(p, threshold), classes, folder / "confusion.png")
    if len(set(y.tolist())) > 1:
        plot_roc(y, p, classes, folder / "roc.png", threshold=threshold, cases=cases)


def describe(metrics: Mapping[str, Any]) -> str:
    """The figures of ``metrics.json`` as lines to read: of the test sets, or of the validation sets where there are none."""
    part = next((part for part in ("test", "val") if part in metrics), None)
    if part is None:
        return f"trained for {metrics['steps']} steps; no validation or test sets to measure on"
    lines = [f"{part} sets ({metrics['sets'][part]}), best weights of step {metrics['best_step']}, 95 % intervals:"]
    for name, score in metrics[part].items():
        if score["value"] is None:
            lines.append(f"  {name:18} undefined, the {part} sets are of one class")
        else:
            interval = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
            lines.append(f"  {name:18} {score['value']:.3f}{interval}")
    return "\n".join(lines)
