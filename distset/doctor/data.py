"""The store and what is to be learned from it: whole, labelled, split without leaks."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping

from distset.data import Split, Store, check_split
from distset.doctor.findings import Finding, fail, ok, warn

__all__ = ["check_checksums", "check_labels", "check_splits"]

FEW = 5
"""Training sets of a class below which it can hardly be learned."""


def check_checksums(store: Store, seconds: float, seed: int = 0) -> Iterator[Finding]:
    """Read sets in random order and compare checksums, for as long as there is time."""
    end, read = time.monotonic() + seconds, 0
    for set_id in random.Random(seed).sample(store.ids, len(store)):
        if time.monotonic() > end:
            break
        list(store.verify([set_id]))
        read += 1
    if read == len(store):
        yield ok(f"{store} is whole: every checksum is right")
    else:
        yield ok(f"{store}: {read:,} of its sets were read in {seconds:g} s, and their checksums are right")


def check_labels(store: Store, folds: Mapping[int, Split]) -> Iterator[Finding]:
    """Every set that is used has a label, every part what it needs of each class."""
    used = dict.fromkeys(set_id for split in folds.values() for part in split for set_id in part)
    missing = [set_id for set_id in used if store.record(set_id).label is None]
    if missing:
        yield fail(
            f"{len(missing):,} of {len(used):,} sets have no label, the first is {missing[0]!r}",
            "add them to the label table, or leave them out (jobs.ingest missing=drop)",
        )
        return
    for fold, split in folds.items():
        where = f"fold {fold}: " if len(folds) > 1 else ""
        yield from (finding._replace(message=where + finding.message) for finding in _balance(store, split))


def check_splits(store: Store, folds: Mapping[int, Split], monitor: str | None) -> Iterator[Finding]:
    """No set and no case (patient) in two parts; something to choose on and to report on."""
    cases = {set_id: store.record(set_id).case_id for set_id in store.ids}
    for fold, split in folds.items():
        try:
            check_split(split, cases, f"fold {fold}")
        except ValueError as error:
            yield fail(str(error), "correct the split file, or let jobs.ingest deal the sets (splits.files=[])")
            continue
        sizes = ", ".join(f"{len(ids)} {part}" for part, ids in split._asdict().items())
        unused = len(store) - sum(map(len, split))
        yield ok(f"fold {fold}: {sizes}; no case in two parts" + (f"; {unused} sets in none" if unused else ""))
        if not split.val and monitor is not None:
            yield warn(
                f"fold {fold}: no validation sets", "the last weights are kept; set plan.monitor=null if that is meant"
            )
        if not split.test:
            yield warn(f"fold {fold}: no test sets", "there will be no figures to report")


def _balance(store: Store, split: Split) -> Iterator[Finding]:
    counts = {part: Counter(store.record(set_id).label for set_id in ids) for part, ids in split._asdict().items() if ids}
    for part, found in counts.items():
        absent = [name for name in store.classes if not found[name]]
        level = fail if part == "train" or (len(found) < 2 and part == "val") else warn
        if absent:
            yield level(f"no {part} set is of class {', '.join(absent)}", "check labels and split")
    rare = {name: n for name in store.classes if 0 < (n := counts.get("train", Counter())[name]) < FEW}
    if rare:
        yield warn(
            f"few training sets of some classes: {rare}", "expect little of them; task.class_weights=balanced may help"
        )
    shares = "; ".join(f"{part} {', '.join(f'{n} {name}' for name, n in found.items())}" for part, found in counts.items())
    yield ok(shares)
