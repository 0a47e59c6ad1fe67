"""Ingestion on Ray Data: one execution over the numbers of the sets; each is made and written where it is read.

No pixel and no feature travels: a worker reads a slide, writes its file, and sends its outcome. So CPUs of any number of
machines need a folder that all of them see, and nothing else. A worker that dies has left a draft at most; its set is made
again, with the same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from distset.cluster.config import Cluster
from distset.cluster.train import start_ray
from distset.data.manifest import Outcome
from distset.data.parts import PartJob
from distset.files import DiskFull

__all__ = ["RayRunner"]


class RayRunner:
    """Does a `PartJob` on a cluster's workers: a `distset.data.parts.Runner`.

    Light sources (patches as JPEG) run as tasks; those that hold something heavy, such as an encoder, as a pool of actors
    that keep it from one set to the next.

    Args:
        cluster: ``workers`` of ``cpus`` cores each; with ``gpu``, one GPU for each.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def __call__(self, job: PartJob, numbers: Sequence[int]) -> Iterator[Outcome]:
        start_ray(self.cluster)
        for row in self._plan(job, numbers).iter_rows():
            if row["full"] is not None:
                raise DiskFull(row["full"])
            if row["error"] is not None:
                raise RuntimeError(row["error"])
            yield Outcome(**{name: row[name] for name in Outcome._fields})

    def _plan(self, job: PartJob, numbers: Sequence[int]) -> Any:
        _be_quiet()
        rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        cluster, gpus = self.cluster, 1 if self.cluster.gpu else None
        threads = max(1, int(cluster.cpus))
        if not (getattr(job.source, "heavy", False) or cluster.gpu):
            return rows.map(_Worker(job, threads), num_cpus=cluster.cpus, concurrency=cluster.workers)
        pool = ActorPoolStrategy(size=cluster.workers)
        arguments = (job, threads)
        return rows.map(_Actor, fn_constructor_args=arguments, compute=pool, num_cpus=cluster.cpus, num_gpus=gpus)  # type: ignore[arg-type]


class _Worker:
    """A row of a number to a row of an outcome. What is no fault of a set's is told to the driver, which stops: Ray would
    try it again and again."""

    def __init__(self, job: PartJob, threads: int) -> None:
        self.job, self.threads = job, threads

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(self.threads)
        nothing = Outcome(row["number"], "", "", 0, 0.0)
        try:
            return {**self.job(row["number"])._asdict(), "full": None, "error": None}
        except DiskFull as error:
            return {**nothing._asdict(), "full": str(error), "error": None}
        except Exception as error:
            text = f"set {self.job.ids[row['number']]!r}: {type(error).__name__}: {error}"
            return {**nothing._asdict(), "full": None, "error": text}


class _Actor:
    """A `_Worker` that lives as long as the run, and its job with it."""

    def __init__(self, job: PartJob, threads: int) -> None:
        self.work = _Worker(job, threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.work(row)


def _be_quiet() -> None:
    """Ray Data's bars and its account of the plan are for those who develop it."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
