"""How good a trained bag classifier is: on bags, with intervals, and on their elements, where those have labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distset.bags.explain import element_scores
from distset.bags.predict import Work, with_progress
from distset.report import Interval, bag_scores, plot_confusion, plot_roc, predicted_classes, write_json, write_table
from distset.report.scores import auroc, quantiles

__all__ = ["ElementScores", "evaluate", "find_elements"]


class ElementScores(NamedTuple):
    """AUROC of element scores against the elements' labels within a bag, averaged over bags, with intervals over bags.

    Attributes:
        bags: those with labelled elements of both kinds; the others say nothing.
        attention, contribution, alone: of the attention (mean over slots), of the contribution to the logit, of the
            probability of the element as a bag of its own.
    """

    bags: int
    attention: Interval
    contribution: Interval
    alone: Interval


def evaluate(work: Work, *, resamples: int = 2000, instances: bool = False) -> dict[str, Any]:
    """Predict, measure, and write ``predictions``, ``plots/`` and ``metrics.json`` into ``work.out``.

    Returns:
        What ``metrics.json`` holds: where it was measured, the threshold, `Interval` by score; with ``instances`` also
        `find_elements`.

    Raises:
        ValueError: for sets without a label, or of a class that the model does not know.
    """
    classes, records = work.trained.task.classes, [work.store.record(set_id) for set_id in work.ids]
    y = _targets(work)
    cases = [record.case_id for record in records]
    p = work.probabilities()
    work.out.mkdir(parents=True, exist_ok=True)
    write_table(work.table(p), work.out / "predictions")
    plot_confusion(y, predicted_classes(p, work.threshold), classes, work.out / "plots" / "confusion.png")
    if len(np.unique(y)) > 1:
        plot_roc(y, p, classes, work.out / "plots" / "roc.png", threshold=work.threshold, cases=cases, resamples=resamples)
    metrics: dict[str, Any] = {"store": str(work.store.path), "sets": len(work.ids), "threshold": work.threshold}
    metrics["scores"] = bag_scores(y, p, threshold=work.threshold, cases=cases, resamples=resamples)
    if instances:
        metrics["instances"] = find_elements(work, dict(zip(work.ids, y.tolist())), resamples=resamples)
    write_json(work.out / "metrics.json", metrics)
    return metrics


def find_elements(work: Work, targets: Mapping[str, int], *, resamples: int = 2000, seed: int = 0) -> ElementScores:
    """How well heat-maps find the elements whose label is above 0, in the bags that have elements of both kinds.

    Args:
        work: model and sets.
        targets: the class of each set, whose score is explained.

    Raises:
        ValueError: where no bag has elements of both kinds.
    """
    store, task = work.store, work.trained.task
    labelled = [set_id for set_id in work.ids if store.record(set_id).has_instance_labels]
    rows = []
    sweeps = len(getattr(task.model.encoder, "stages", [0])) + 2
    for bag in with_progress(store, labelled, work.chunk_size, "elements", sweeps):
        truth = bag.instance_labels().numpy() > 0
        if 0 < truth.sum() < len(truth):
            rows.append(_bag_row(task, bag, truth, targets[bag.name]))
    if not rows:
        raise ValueError("instances: none of these sets has elements labelled above 0 and others; set instances=false")
    found = np.array(rows)
    drawn = np.random.default_rng(seed).integers(0, len(found), (resamples, len(found)))
    means = found[drawn].mean(1)
    return ElementScores(len(found), *(Interval(float(found[:, c].mean()), *quantiles(means[:, c])) for c in range(3)))


def _bag_row(task: Any, bag: Any, truth: NDArray, target: int) -> list[float]:
    """AUROC of attention, contribution and probability alone within one bag."""
    columns: list[list[NDArray]] = [[], [], []]
    for part in element_scores(task, bag, alone=True):
        assert part.alone is not None
        columns[0].append(part.attention)
        columns[1].append(part.towards(target))
        columns[2].append(part.alone[:, target])
    whole = np.ones((1, len(truth)))
    return [float(auroc(truth, np.concatenate(column), whole)[0]) for column in columns]


def _targets(work: Work) -> NDArray[np.int64]:
    """Class numbers of the sets, in the model's order of classes."""
    classes = work.trained.task.classes
    labels = [work.store.record(set_id).label for set_id in work.ids]
    if missing := [set_id for set_id, label in zip(work.ids, labels) if label is None]:
        raise ValueError(
            f"labels: {len(missing)} sets have none, the first is {missing[0]!r}; evaluate needs them, predict does not"
        )
    if unknown := sorted({label for label in labels if label is not None and label not in classes}):
        raise ValueError(
            f"labels: {work.store.path} has {', '.join(unknown)}, the model knows {', '.join(classes)}; map its labels"
        )
    return np.array([classes.index(label) for label in labels if label is not None])
