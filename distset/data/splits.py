"""Splits into train, val and test: made once, by patient, stratified and seeded; or read from the user's files.

A split file is a CSV of ``fold,split,set_id``. A set may be in none of the three parts; a case (patient) is never in two.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distset.files import write_atomically
from distset.seeds import seed_for

__all__ = ["Split", "SplitPlan", "check_split", "hold_out", "load_splits", "make_splits", "save_splits"]

PARTS = ("train", "val", "test")


class Split(NamedTuple):
    """Ids of the sets to train on, to choose on (early stopping, threshold) and to report on."""

    train: list[str]
    val: list[str]
    test: list[str]


class SplitPlan(NamedTuple):
    """How a store gets its splits.

    Attributes:
        files: the user's split tables, one a fold (or a folder of them); see `read_split_tables`.
        folds: without files: 1 split, a k-fold cross-validation, or none (0).
        val, test: shares, as in `make_splits`.
    """

    files: Sequence[str | Path] = ()
    folds: int = 1
    val: float = 0.15
    test: float = 0.25


def make_splits(
    labels: Mapping[str, str | None],
    cases: Mapping[str, str] | None = None,
    *,
    folds: int = 1,
    val: float = 0.15,
    test: float = 0.25,
    seed: int = 0,
) -> list[Split]:
    """Deal sets to parts: no case in two parts, classes in proportion, the same for the same seed.

    Cases are dealt class by class (a case counts as its most frequent label), largest first, each to the part that is
    furthest below its share of the class.

    Args:
        labels: ``{set_id: label}``.
        cases: ``{set_id: case_id}``; each set its own case if None.
        folds: 1 for one split; k for a k-fold cross-validation, whose k test parts cover all sets once.
        val: share of the sets to choose on; of those that are not in test.
        test: share of the sets to test on; used where ``folds`` is 1.
        seed: of the dealing.

    Raises:
        ValueError: for shares or folds out of range, or fewer cases of a class than parts that need one.

    Example:
        >>> from distset.data import make_splits
        >>> labels = {f"slide-{i}": "ab"[i % 2] for i in range(20)}
        >>> [len(part) for part in make_splits(labels, val=0.2, test=0.5)[0]]
        [8, 2, 10]
    """
    if folds < 1 or not 0 < val < 1 or (folds == 1 and not 0 < test < 1):
        raise ValueError(f"folds, val, test: got {folds}, {val}, {test}, wanted at least 1 fold and shares between 0 and 1")
    cases = {set_id: set_id for set_id in labels} if cases is None else cases
    # What is not in a fold's test must hold two cases of a class: one to train on, one to choose on.
    shares, least = ([1.0 - test, test], [2, 1]) if folds == 1 else ([1.0 / folds] * folds, [2 if folds == 2 else 1] * folds)
    _check_enough(labels, cases, sum(least))
    dealt = _deal(labels, cases, shares, least, seed_for(seed, "test"))
    tests = dealt if folds > 1 else dealt[1:]
    splits = []
    for fold, tested in enumerate(tests):
        held = set(tested)
        rest = {set_id: label for set_id, label in labels.items() if set_id not in held}
        train, chosen = hold_out(rest, cases, share=val, seed=seed_for(seed, "val", fold))
        splits.append(Split(train, chosen, tested))
    for split in splits:
        check_split(split, cases)
    return splits


def hold_out(
    labels: Mapping[str, str | None], cases: Mapping[str, str] | None = None, *, share: float, seed: int
) -> tuple[list[str], list[str]]:
    """Deal sets to two parts as `make_splits` does: the rest, and a ``share`` held out."""
    rest, held = _deal(labels, cases or {set_id: set_id for set_id in labels}, [1.0 - share, share], [1, 1], seed)
    return rest, held


def check_split(split: Split, cases: Mapping[str, str], where: str = "split") -> None:
    """Refuse a split that leaks.

    Raises:
        ValueError: for a set or a case in two parts, a set twice in one, a set that is not in ``cases``, no training sets.
    """
    if not split.train:
        raise ValueError(f"{where}: has no training sets")
    seen: dict[str, str] = {}
    seen_case: dict[str, tuple[str, str]] = {}
    for part, ids in zip(PARTS, split):
        for set_id in ids:
            if set_id not in cases:
                raise ValueError(f"{where}: {part} names the set {set_id!r}, which the store does not hold; check the ids")
            if set_id in seen:
                raise ValueError(f"{where}: the set {set_id!r} is in {seen[set_id]} and in {part}; keep it in one")
            seen[set_id] = part
            other, other_part = seen_case.setdefault(cases[set_id], (set_id, part))
            if other_part != part:
                raise ValueError(
                    f"{where}: case {cases[set_id]!r} is in {other_part} (set {other!r}) and in {part} (set {set_id!r}); "
                    f"sets of one patient must stay together"
                )


def save_splits(path: Path, folds: Sequence[Split], cases: Mapping[str, str]) -> None:
    """Check the folds and write them to one file.

    Raises:
        ValueError: for no folds, or a split that leaks; see `check_split`.
    """
    if not folds:
        raise ValueError("splits: got no fold, wanted at least one")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["fold", "split", "set_id"])
    for number, split in enumerate(folds):
        check_split(split, cases, f"splits, fold {number}")
        for part, ids in zip(PARTS, split):
            writer.writerows((number, part, set_id) for set_id in ids)
    write_atomically(path, text.getvalue())


def load_splits(path: Path) -> list[Split]:
    """The folds in a file that `save_splits` wrote."""
    folds: dict[int, dict[str, list[str]]] = defaultdict(lambda: {part: [] for part in PARTS})
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            try:
                folds[int(row["fold"])][row["split"]].append(row["set_id"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: got the line {row}, wanted fold, split (one of {PARTS}), set_id") from error
    return [Split(**folds[number]) for number in sorted(folds)]


def _deal(
    labels: Mapping[str, str | None], cases: Mapping[str, str], shares: Sequence[float], least: Sequence[int], seed: int
) -> list[list[str]]:
    """Deal whole cases to parts of the given shares, each class in proportion, to each part at least so many of its cases;
    ids keep their order within a part."""
    part_of: dict[str, int] = {}
    members = _members(labels, cases)
    strata: dict[str, list[str]] = defaultdict(list)
    for case, ids in members.items():
        strata[_label_of(ids, labels)].append(case)
    generator = np.random.default_rng(seed)
    for label in sorted(strata):
        shuffled = [strata[label][i] for i in generator.permutation(len(strata[label]))]
        wanted = np.array(shares) * sum(len(members[case]) for case in shuffled)
        lacking = np.array(least)
        for left, case in zip(range(len(shuffled), 0, -1), sorted(shuffled, key=lambda case: -len(members[case]))):
            must = lacking > 0
            part = int(np.where(must, wanted, -np.inf).argmax() if left <= lacking[must].sum() else wanted.argmax())
            wanted[part] -= len(members[case])
            lacking[part] -= 1
            part_of[case] = part
    parts: list[list[str]] = [[] for _ in shares]
    for set_id in labels:
        parts[part_of[cases[set_id]]].append(set_id)
    return parts


def _members(labels: Mapping[str, str | None], cases: Mapping[str, str]) -> dict[str, list[str]]:
    """The sets of each case."""
    members: dict[str, list[str]] = defaultdict(list)
    for set_id in labels:
        members[cases[set_id]].append(set_id)
    return members


def _label_of(ids: Sequence[str], labels: Mapping[str, str | None]) -> str:
    """The most frequent label of a case, the first in the alphabet among equals; '' without labels."""
    counts = Counter(labels[set_id] or "" for set_id in ids)
    return min(counts, key=lambda label: (-counts[label], label))


def _check_enough(labels: Mapping[str, str | None], cases: Mapping[str, str], wanted: int) -> None:
    """Train, val and test each need a case of every class."""
    counts = Counter(_label_of(ids, labels) for ids in _members(labels, cases).values())
    if few := {label: n for label, n in counts.items() if n < wanted}:
        raise ValueError(
            f"labels: got too few cases of some classes ({few}), wanted at least {wanted} of each to split them"
        )
