"""Scores of a classifier of sets with bootstrap intervals, and the threshold they are taken at.

The figures are those of scikit-learn; they are written here for many weightings of the sets at once, because a bootstrap
asks for thousands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "auroc", "bag_scores", "choose_threshold", "predicted_classes", "quantiles", "resampled"]

BLOCK = 2**24
"""Numbers held at once while resampling."""


class Interval(NamedTuple):
    """A figure with its interval; nan where it is undefined (AUROC of one class)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bag_scores(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    threshold: float | None = None,
    cases: Sequence[str] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """AUROC, balanced accuracy, F1 and accuracy of a classifier of sets, each with its bootstrap interval.

    Two classes: AUROC and F1 of class 1; all but AUROC at ``threshold``. More: the likeliest class is predicted, AUROC is
    one-versus-rest, and AUROC and F1 are averaged over the classes that occur.

    The interval is the percentile one over resamples drawn class by class (so that none loses a class), of whole cases:
    the slides of a patient come and go together.

    Args:
        labels: class numbers ``(N)``.
        probabilities: ``(N, C)``.
        threshold: on the probability of class 1, chosen on *other* sets (see `choose_threshold`); 0.5 if None. Two classes
            only.
        cases: the patient (or other group) of each set; each set its own if None.
        resamples, level, seed: of the bootstrap; without resamples the interval is nan.

    Returns:
        ``{"auroc": Interval, "balanced_accuracy": ..., "f1": ..., "accuracy": ...}``.

    Raises:
        ValueError: for shapes that do not fit, probabilities that are not finite, labels outside of 0..C-1, a threshold
            with more than two classes.

    Example:
        >>> from distset.report import bag_scores
        >>> scores = bag_scores([0, 0, 1, 1], [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]], threshold=0.65)
        >>> scores["auroc"].value, scores["accuracy"].value
        (1.0, 1.0)
    """
    y, p = _checked(labels, probabilities)
    if threshold is not None and p.shape[1] > 2:
        raise ValueError(
            f"threshold: got {threshold} with {p.shape[1]} classes, wanted None; the likeliest class is predicted"
        )
    predicted = predicted_classes(p, threshold)
    points = _figures(y, p, predicted, np.ones((1, len(y))))
    blocks = [_figures(y, p, predicted, weights) for weights in resampled(y, cases, resamples, seed)]
    drawn = {name: np.concatenate([np.empty(0), *(block[name] for block in blocks)]) for name in points}
    return {name: Interval(float(point[0]), *quantiles(drawn[name], level)) for name, point in points.items()}


def choose_threshold(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """The threshold on the probability of class 1 of highest balanced accuracy; call it on the validation sets.

    Candidates lie half-way between neighbouring probabilities; of several best ones, that nearest to 0.5.

    Args:
        labels: class numbers ``(N)``, both 0 and 1 among them.
        probabilities: ``(N, 2)``.

    Raises:
        ValueError: for labels of one class only, or anything but two classes.
    """
    y, p = _checked(labels, probabilities)
    if p.shape[1] != 2:
        raise ValueError(f"probabilities: got {p.shape[1]} classes, wanted 2; a threshold belongs to two classes")
    if len(np.unique(y)) < 2:
        raise ValueError(f"labels: all {len(y)} sets are of class {y[0]}, wanted both; a threshold needs sets of each class")
    scores = np.unique(p[:, 1])
    candidates = np.concatenate([[scores[0]], (scores[:-1] + scores[1:]) / 2, [np.nextafter(scores[-1], np.inf)]])
    positives, negatives = np.sort(p[y == 1, 1]), np.sort(p[y == 0, 1])
    sensitivity = 1 - np.searchsorted(positives, candidates) / len(positives)
    specificity = np.searchsorted(negatives, candidates) / len(negatives)
    balanced = (sensitivity + specificity) / 2
    best = candidates[balanced >= balanced.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def predicted_classes(probabilities: ArrayLike, threshold: float | None = None) -> NDArray[np.int64]:
    """Class 1 from ``threshold`` on (0.5 if None) where there are two classes, else the likeliest class: ``(N)``."""
    p = np.asarray(probabilities, np.float64)
    if p.shape[1] == 2:
        return (p[:, 1] >= (0.5 if threshold is None else threshold)).astype(np.int64)
    return p.argmax(1)


def auroc(positive: NDArray, scores: NDArray, weights: NDArray) -> NDArray:
    """The area under the ROC curve for many weightings ``(B, N)`` of the sets: ``(B)``; ties count one half."""
    _, tied = np.unique(scores, return_inverse=True)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(np.sort(tied))) + 1])
    order = np.argsort(tied, kind="stable")
    hits = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    misses = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    below = np.cumsum(misses, 1) - misses / 2
    with np.errstate(invalid="ignore"):
        return (hits * below).sum(1) / (hits.sum(1) * misses.sum(1))


def resampled(labels: NDArray, cases: Sequence[str] | None, resamples: int, seed: int) -> Iterator[NDArray]:
    """How often each set is in each bootstrap sample, ``(B, N)`` at a time: whole cases, drawn class by class."""
    if resamples < 0:
        raise ValueError(f"resamples: got {resamples}, wanted at least 0 (no interval)")
    names = np.arange(len(labels)) if cases is None else np.asarray(cases)
    if len(names) != len(labels):
        raise ValueError(f"cases: got {len(names)}, wanted {len(labels)}, one for each set")
    _, case = np.unique(names, return_inverse=True)
    kinds: dict[int, set[int]] = {}
    for number, label in zip(case.tolist(), labels.tolist()):
        kinds.setdefault(number, set()).add(label)
    strata: dict[frozenset[int], list[int]] = {}
    for number, kind in sorted(kinds.items()):
        strata.setdefault(frozenset(kind), []).append(number)
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // len(labels))
    for start in range(0, resamples, block):
        counts = np.zeros((min(block, resamples - start), len(kinds)))
        for members in strata.values():
            even = np.full(len(members), 1 / len(members))
            counts[:, members] = rng.multinomial(len(members), even, size=len(counts))
        yield counts[:, case]


def quantiles(drawn: NDArray, level: float = 0.95) -> tuple[float, float]:
    """The ends of the percentile interval; nan where nothing was drawn."""
    if len(drawn) == 0:
        return np.nan, np.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _figures(y: NDArray, p: NDArray, predicted: NDArray, weights: NDArray) -> dict[str, NDArray]:
    """Every score for many weightings ``(B, N)`` of the sets: ``(B)`` each."""
    classes = p.shape[1]
    pairs = np.zeros((len(y), classes * classes))
    pairs[np.arange(len(y)), y * classes + predicted] = 1
    confusion = (weights @ pairs).reshape(-1, classes, classes)
    right, of_class, called = confusion.diagonal(axis1=1, axis2=2), confusion.sum(2), confusion.sum(1)
    occurs = np.unique(y)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = right / of_class
        f1 = np.nan_to_num(2 * right / (of_class + called))  # 0 where a class neither occurs nor is called
    if classes == 2:
        area, f1 = auroc(y == 1, p[:, 1], weights), f1[:, 1]
    else:
        area = np.mean([auroc(y == c, p[:, c], weights) for c in occurs], axis=0)
        f1 = f1[:, np.union1d(occurs, predicted)].mean(1)
    accuracy = right.sum(1) / confusion.sum((1, 2))
    return {"auroc": area, "balanced_accuracy": recall[:, occurs].mean(1), "f1": f1, "accuracy": accuracy}


def _checked(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    y, p = np.asarray(labels), np.asarray(probabilities, np.float64)
    if p.ndim != 2 or p.shape[1] < 2 or y.shape != p.shape[:1] or len(y) == 0:
        raise ValueError(
            f"labels, probabilities: got shapes {y.shape} and {p.shape}, wanted (N) and (N, C) of at least 2 classes"
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels: got {np.unique(y)[:5]} ({y.dtype}), wanted class numbers from 0 to {p.shape[1] - 1}")
    if not np.isfinite(p).all():
        raise ValueError(f"probabilities: {int((~np.isfinite(p)).any(1).sum())} sets have values that are not finite")
    return y.astype(np.int64), p
