"""Ingestion on Ray Data: one execution over the numbers of the sets; each is made and written where it is read.

No pixel and no feature travels: a worker reads a slide, writes its file, and sends its outcome. So CPUs of any number of
machines need a folder that all of them see, and nothing else. A worker that dies has left a draft at most; its set is made
again, with the same bytes. A set that ends every process which reads it (a decoder that crashes, too little memory) is left
out in the end: Ray Data would try it for ever, so a mark beside the store counts its starts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from distset.cluster.config import Cluster
from distset.cluster.resources import require_workers
from distset.cluster.train import check_versions, start_ray
from distset.data.manifest import Outcome
from distset.data.parts import PartJob
from distset.data.schema import INGEST
from distset.files import DiskFull
from distset.versions import installed

__all__ = ["RayRunner"]


class RayRunner:
    """Does a `PartJob` on a cluster's workers: a `distset.data.parts.Runner`.

    Light sources (patches as JPEG) run as tasks; those that hold something heavy, such as an encoder, as a pool of actors
    that keep it from one set to the next.

    Args:
        cluster: ``workers`` of ``cpus`` cores each; with ``gpu``, one GPU or a share of one for each. A set that ended its
            process ``max_failures + 1`` times counts as failed.

    Raises:
        ValueError: where the cluster has no room for the workers; where one runs other versions than the driver.
        RuntimeError: for what is no fault of a set's.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def __call__(self, job: PartJob, numbers: Sequence[int]) -> Iterator[Outcome]:
        start_ray(self.cluster)
        require_workers(self.cluster._replace(actors=0))
        for number in numbers:
            _mark(job, number).unlink(missing_ok=True)  # an earlier start may have been killed in the middle of the set
        for row in self._plan(job, numbers).iter_rows():
            if row["error"] is not None:
                kinds = {"DiskFull": DiskFull, "ValueError": ValueError}
                raise kinds.get(row["kind"], RuntimeError)(row["error"])
            yield Outcome(**{name: row[name] for name in Outcome._fields})

    def _plan(self, job: PartJob, numbers: Sequence[int]) -> Any:
        _be_quiet()
        rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        cluster, gpus = self.cluster, float(self.cluster.gpu) or None
        arguments = (job, max(1, int(cluster.cpus)), cluster.max_failures + 1, installed())
        if not (getattr(job.source, "heavy", False) or cluster.gpu):
            return rows.map(_Worker(*arguments), num_cpus=cluster.cpus, concurrency=cluster.workers)
        pool = ActorPoolStrategy(size=cluster.workers)
        return rows.map(_Actor, fn_constructor_args=arguments, compute=pool, num_cpus=cluster.cpus, num_gpus=gpus)  # type: ignore[arg-type]


class _Worker:
    """A row of a number to a row of an outcome. What is no fault of a set's is told to the driver, which stops: Ray would
    try it again and again.

    Args:
        job: what to do.
        threads: of torch.
        starts: so many of a set that do not come to an end are enough.
        versions: the driver's.
    """

    def __init__(self, job: PartJob, threads: int, starts: int, versions: dict[str, str]) -> None:
        self.job, self.threads, self.starts, self.versions = job, threads, starts, versions

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        kind = error = None
        outcome = Outcome(number, self.job.ids[number], "failed", 0, 0.0)
        torch.set_num_threads(self.threads)
        try:
            check_versions(self.versions)
            outcome = self._outcome(outcome)
        except (DiskFull, ValueError) as raised:  # not the job's: it makes an outcome of a set's own ValueError
            kind, error = type(raised).__name__, str(raised)
        except Exception as raised:
            kind, error = "RuntimeError", f"set {outcome.set_id!r}: {type(raised).__name__}: {raised}"
        return {**outcome._asdict(), "kind": kind, "error": error}

    def _outcome(self, failed: Outcome) -> Outcome:
        mark = _mark(self.job, failed.number)
        begun = mark.stat().st_size if mark.exists() else 0
        if begun >= self.starts:
            text = f"its process ended without a word {begun} times: its reader crashes, or wants more memory than there is"
            return failed._replace(reason=text)
        with mark.open("ab") as file:
            file.write(b"+")
        outcome = self.job(failed.number)
        mark.unlink(missing_ok=True)  # where another has done the same set, its node being thought dead
        return outcome


class _Actor:
    """A `_Worker` that lives as long as the run, and its job with it."""

    def __init__(self, *arguments: Any) -> None:
        self.work = _Worker(*arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.work(row)


def _mark(job: PartJob, number: int) -> Path:
    """A file with a byte for each start of a set that did not come to its end."""
    return job.path / INGEST / f"begun-{number:05d}"


def _be_quiet() -> None:
    """Ray Data's bars and its account of the plan are for those who develop it."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
