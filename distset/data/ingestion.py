"""From a source to a store: everything that can be checked is checked before the first bag is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distset.data import schema
from distset.data.bag import Source
from distset.data.index import class_names
from distset.data.labels import Labelled, match_labels
from distset.data.schema import StoreInfo
from distset.data.split_tables import read_split_tables
from distset.data.splits import Split, SplitPlan, check_split, make_splits
from distset.data.store import Store
from distset.data.writer import StoreWriter

__all__ = ["Plan", "ingest", "is_finished", "made_splits", "plan_ingest"]


class Plan(NamedTuple):
    """What the store will hold, checked."""

    ids: list[str]
    labels: dict[str, Labelled] | None
    given: list[Split]  # by the user or the source
    told: dict[str, Any]
    about: dict[str, Any]


def ingest(
    source: Source,
    path: str | Path,
    *,
    labels: Mapping[str, Labelled] | None = None,
    missing: str = "error",
    classes: Sequence[str] | None = None,
    splits: SplitPlan = SplitPlan(),  # noqa: B008
    seed: int = 0,
    dtype: str | None = None,
    told: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Store:
    """Write the source's bags to a store, or go on where a killed ingest stopped; a finished store is returned as it is.

    Splits are made once: from the user's files, else those the source ships, else dealt from the labels (by case,
    stratified, seeded). With other labels or splits and the same source, only the index is written again.

    Args:
        source: where the bags come from.
        path: the store's folder.
        labels: a label table (`label_table`); what the bags say of themselves if None.
        missing: for sets without a label in the table: "error", "keep" or "drop".
        classes: names of the classes in order; those found, sorted, if None.
        splits: where the splits come from.
        seed: of the splits that are made, and of the permutation of rows.
        dtype: to store floating-point elements as; as they come if None.
        told: how the source was described, kept in ``store.json``: another description is another store.
        progress: called with (sets written, sets in all, elements of the last set).

    Raises:
        ValueError: as `StoreWriter`, `match_labels`, `read_split_tables`, `make_splits` do; for ids that come twice, a
            finished store of another source.

    Example:
        >>> import tempfile
        >>> from distset.data import DigitBags, ingest
        >>> with tempfile.TemporaryDirectory() as path:
        ...     store = ingest(DigitBags(bags=(4, 2, 2)), path)
        ...     print(store.split().test)
        ['test-0000', 'test-0001']
    """
    path = Path(path)
    plan = plan_ingest(source, labels, missing, classes, splits, {**(told or {}), "dtype": dtype}, seed)
    if is_finished(path, plan, seed):
        return Store(path)
    with StoreWriter(path, seed=seed, dtype=dtype, source=plan.told) as writer:
        _write(writer, source, plan.ids, progress)
        folds = plan.given or made_splits(plan.labels or writer.said(), splits, seed)
        return writer.finish(labels=plan.labels, classes=classes, splits=folds, about=plan.about)


def is_finished(path: Path, plan: Plan, seed: int, *, keep: bool = True) -> bool:
    """Whether the folder holds what is planned. Where labels or splits alone differ (or it is not to be kept), the store
    becomes an unfinished one whose shards stay.

    Raises:
        ValueError: for a finished store of another source or seed.
    """
    if not (path / schema.INFO).exists():
        return False
    info = StoreInfo.load(path / schema.INFO)
    if (info.source, info.seed) != (plan.told, seed):
        raise ValueError(f"path: {path} is a finished store of another source or seed; choose another path or delete it")
    if info.about == plan.about and keep:
        return True
    (path / schema.INFO).unlink()
    return False


def plan_ingest(
    source: Source,
    table: Mapping[str, Labelled] | None,
    missing: str,
    classes: Sequence[str] | None,
    splits: SplitPlan,
    told: Mapping[str, Any],
    seed: int,
) -> Plan:
    """Check all that can be checked before the first bag is read; see `ingest`."""
    ids, labels = _checked_ids(source), None
    if table is not None:
        labels = match_labels(table, ids, missing)
        ids = [set_id for set_id in ids if set_id in labels]
        class_names([labelled.label for labelled in labels.values()], classes)
    given = read_split_tables(splits.files, ids) if splits.files else list(source.splits)
    if labels is not None:
        for number, split in enumerate(given):
            check_split(split, {set_id: labelled.case_id for set_id, labelled in labels.items()}, f"splits, fold {number}")
        if not given:
            made_splits(labels, splits, seed)
    made = {"folds": splits.folds, "val": splits.val, "test": splits.test}
    about = {"labels": _digest(labels), "classes": classes, "splits": _digest(given) if given else made}
    return Plan(ids, labels, given, _plain({**told, "sets": _digest(ids)}), _plain(about))


def _checked_ids(source: Source) -> list[str]:
    ids = list(source.ids)
    if not ids:
        raise ValueError("source: holds no sets; check its path")
    if twice := [set_id for set_id, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"source: {len(twice)} set ids come twice, the first is {twice[0]!r}; give every set its own id")
    return ids


def _write(
    writer: StoreWriter, source: Source, ids: Sequence[str], progress: Callable[[int, int, int], None] | None
) -> None:
    """Add the bags that are not written yet, in order."""
    done = writer.done
    assert done == list(ids[: len(done)]), "the manifest holds a digest of the ids"
    report = progress or (lambda *_: None)
    report(len(done), len(ids), 0)
    for number in range(len(done), len(ids)):
        bag = source.read(ids[number])
        writer.add(bag)
        report(number + 1, len(ids), len(bag.elements))


def made_splits(labels: Mapping[str, Labelled], plan: SplitPlan, seed: int) -> list[Split]:
    """Splits from the labels; none where there are no labels, or none are wanted."""
    known = {set_id: labelled.label for set_id, labelled in labels.items() if labelled.label is not None}
    if not known or plan.folds == 0:
        return []
    class_names(known.values(), None)
    cases = {set_id: labels[set_id].case_id for set_id in known}
    return make_splits(known, cases, folds=plan.folds, val=plan.val, test=plan.test, seed=seed)


def _digest(value: Any) -> str | None:
    return None if value is None else hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
