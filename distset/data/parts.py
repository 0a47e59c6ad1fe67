"""From a source to a store, each set a file of its own: made by any number of workers, in any order, with the same bytes.

Where a set takes seconds or minutes to make (a slide), a killed ingest goes on set by set, a set that does not read is
reported and left out, and nothing but a set's record travels between a worker and the one process that writes the index.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from distset.data import schema
from distset.data.bag import Bag, NothingToStore, Source
from distset.data.columns import Layout
from distset.data.index import read_part, said, write_index, write_part
from distset.data.ingestion import is_finished, made_splits, plan_ingest
from distset.data.labels import Labelled
from distset.data.manifest import Outcome, read_outcome, write_manifest
from distset.data.shards import Shard, part_file
from distset.data.splits import Split, SplitPlan
from distset.data.store import Store
from distset.data.writer import check_bag, check_layout, pick_up
from distset.files import DiskFull, draft_for, naming_full_disk, sole_writer

__all__ = ["PartJob", "Runner", "in_process", "ingest_parts"]

log = logging.getLogger("distset")
GROUP_ROWS = 8192
MANIFEST = "manifest.csv"


class PartJob(NamedTuple):
    """What a worker does: ``job(number)`` reads set ``number`` and writes its file. Called again, it writes it again.

    Attributes:
        source, ids: where the sets come from.
        path, seed, dtype: as in `StoreWriter`.
    """

    source: Any
    ids: list[str]
    path: Path
    seed: int
    dtype: str | None

    def __call__(self, number: int) -> Outcome:
        """One set.

        Raises:
            Exception: for anything that is not the set's own fault, a full disk first of all.
        """
        began, set_id = time.perf_counter(), self.ids[number]
        try:
            bag = self.source.read(set_id)
            self._write(number, bag)
            outcome = Outcome.of(number, set_id, "written", began, elements=len(bag.elements), extra=bag.extra)
        except DiskFull:
            raise
        except NothingToStore as error:
            outcome = Outcome.of(number, set_id, "empty", began, reason=str(error))
        except ValueError as error:
            outcome = Outcome.of(number, set_id, "failed", began, reason=str(error))
        with naming_full_disk(self.path):
            outcome.save(_file(self.path, number, "json"))
        return outcome

    def _write(self, number: int, bag: Bag) -> None:
        check_bag(bag)
        layout = Layout.of(bag, self.dtype)
        with naming_full_disk(self.path):
            shard = Shard(draft_for(self.path / part_file(number)), layout, seed=self.seed, group_rows=GROUP_ROWS)
            try:
                shard.add(bag)
                part = shard.publish(self.path, number)
            except BaseException:
                shard.discard()
                raise
            write_part(_file(self.path, number, "parquet"), part, layout)


Runner = Callable[[PartJob, Sequence[int]], Iterable[Outcome]]
"""Does the job for the numbers, in any order; yields each outcome as soon as it is there."""


def in_process(job: PartJob, numbers: Sequence[int]) -> Iterator[Outcome]:
    """One after the other, in this process."""
    for number in numbers:
        yield job(number)


def ingest_parts(
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
    runner: Runner = in_process,
    on_error: str = "skip",
    retry: bool = False,
) -> Store:
    """As `ingest`, with a file a set: what a source with the attribute ``apart`` wants, such as slides.

    Sets that do not read, or hold nothing, are left out, of the splits as well. ``manifest.csv`` in the store's folder says
    what became of each set, and why. A start that goes on tries those that failed again.

    Args:
        source, path, labels, missing, classes, splits, seed, dtype, told, progress: as in `ingest`.
        runner: does the work; see `distset.cluster.ingestion.RayRunner`.
        on_error: "skip" a set that does not read, or "raise".
        retry: try the sets that failed again, also where the store is finished.

    Raises:
        ValueError: as `ingest` does; for an unknown ``on_error``; where no set could be written, or (on_error="raise") the
            first could not.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error: got {on_error!r}, wanted skip or raise")
    path = Path(path)
    plan = plan_ingest(source, labels, missing, classes, splits, {**(told or {}), "dtype": dtype}, seed)
    if is_finished(path, plan, seed, keep=not retry):
        return Store(path)
    job = PartJob(source, plan.ids, path.absolute(), seed, dtype)
    with sole_writer(path / schema.INGEST):
        pick_up(path, {"seed": seed, "dtype": dtype, "source": plan.told, "apart": True})
        outcomes = _run(job, runner, on_error, progress or (lambda *_: None))
        with naming_full_disk(path):
            write_manifest(path / MANIFEST, outcomes)
            records, layout = _records(path, outcomes)
            known = said(records)
            given = [Split(*([name for name in part if name in known] for part in split)) for split in plan.given]
            kept = None if plan.labels is None else {name: plan.labels[name] for name in known}
            folds = given or made_splits(kept or known, splits, seed)
            write_index(
                path, records, layout, seed=seed, source=plan.told, labels=kept, classes=classes, splits=folds,
                about=plan.about,
            )  # fmt: skip
    return Store(path)


def _run(job: PartJob, runner: Runner, on_error: str, progress: Callable[[int, int, int], None]) -> list[Outcome]:
    """Do what is not done yet; the outcomes of all sets."""
    found = {number: _earlier(job.path, number) for number in range(len(job.ids))}
    outcomes = [outcome for outcome in found.values() if outcome is not None]
    left = [number for number, outcome in found.items() if outcome is None]
    if hasattr(job.source, "size"):  # the largest first: one begun last would keep everybody waiting
        left.sort(key=lambda number: -job.source.size(job.ids[number]))
    progress(len(outcomes), len(job.ids), 0)
    for outcome in runner(job, left) if left else ():
        if outcome.status == "failed":
            if on_error == "raise":
                raise ValueError(f"set {outcome.set_id!r}: {outcome.reason}")
            log.warning("set %r is left out: %s", outcome.set_id, outcome.reason)
        outcomes.append(outcome)
        progress(len(outcomes), len(job.ids), outcome.elements)
    return outcomes


def _earlier(path: Path, number: int) -> Outcome | None:
    """What became of a set in an earlier start, unless it failed or was cut off."""
    outcome = read_outcome(_file(path, number, "json"))
    if outcome is None or outcome.status == "failed":
        return None
    return outcome if outcome.status == "empty" or _file(path, number, "parquet").exists() else None


def _records(path: Path, outcomes: Sequence[Outcome]) -> tuple[pa.Table, Layout]:
    """The records of the sets that were written, in the order of the source, and the layout of them all."""
    written = sorted(outcome for outcome in outcomes if outcome.status == "written")
    if not written:
        first = min(outcomes)
        raise ValueError(
            f"source: none of {len(outcomes)} sets could be written; {first.set_id!r} {first.status}: {first.reason} "
            f"({path / MANIFEST} has them all)"
        )
    parts = [read_part(_file(path, outcome.number, "parquet")) for outcome in written]
    for outcome, (_, layout) in zip(written, parts):
        check_layout(outcome.set_id, layout, parts[0][1])
    return pa.concat_tables([part for part, _ in parts]), parts[0][1]


def _file(path: Path, number: int, kind: str) -> Path:
    return path / schema.INGEST / f"part-{number:05d}.{kind}"
