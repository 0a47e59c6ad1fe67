"""A search over settings on Ray Tune: which trial runs when and where, which is stopped, which takes over another's state.

What is known of a trial is in its folder (`distset.search.trial`), not in Ray Tune's: its snapshots are seconds old when a
driver dies and leave the scheduler's memory out, see docs/decisions.md. So a search that goes on is a new one of Ray Tune
over the trials that are not done, whose scheduler is told what the trials had told the last one.

A trial is an actor of ``cluster.cpus`` cores that trains in its own process, with a place beside it for each of
``cluster.actors``, or, where ``cluster.workers`` is 1 or more, the driver of a Ray Train run of so many workers, which needs
no core of its own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray import tune

from distset.build import build
from distset.checkpoints import read_state
from distset.cluster.config import Cluster, actor_bundle
from distset.cluster.leftovers import Tidy
from distset.cluster.resources import require_workers, runs_that_fit
from distset.cluster.schedulers import scheduler_for
from distset.cluster.search_progress import Progress
from distset.cluster.storage import StorageCheckpoints
from distset.cluster.train import start_ray
from distset.files import write_atomically
from distset.search.plan import PBT, Search
from distset.search.space import Space
from distset.search.trial import Lineage, Report, TrialFolder, train_trial, trial_config

__all__ = ["search_on_ray"]

QUIET = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a configuration are relative to where the user started
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails early has no metric, and is no reason to end the search
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
PATIENCE = 600.0
"""Seconds that a trial waits for its workers' resources, which a trial before it may still hold."""


MOST_AT_ONCE = 100
"""Trials with workers of their own: the driver of each is a process of this machine."""


class Job(NamedTuple):
    """What every trial of a search is given."""

    base: dict[str, Any]
    search: Search
    folder: Path


def search_on_ray(
    base: Mapping[str, Any], search: Search, space: Space, drawn: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Train a trial for each of the settings, except those that have ended; trials that failed are tried again.

    Args:
        base: the configuration of the trials.
        search, space: see `distset.search.plan.read_search`.
        drawn: the settings of each trial.
        folder: of the search; where trials train in more than one machine, one that all of them see.

    Raises:
        ValueError: where the cluster has no room for a trial.
        KeyboardInterrupt: where the user interrupted it.
    """
    trials = [TrialFolder(folder / "trials" / f"{number:04d}") for number in range(len(drawn))]
    done = [trial for trial in trials if (trial.record or {}).get("status") in ("finished", "stopped")]
    left = [trial for trial in trials if trial not in done]
    if not left:
        return
    cluster: Cluster = build(base["cluster"], "cluster")
    start_ray(cluster)
    require_workers(cluster._replace(workers=max(cluster.workers, 1)))
    first = {trial.number: trial.lineage or Lineage(dict(drawn[trial.number])) for trial in left}
    for trial in left:
        trial.write("waiting", first[trial.number])
    os.environ.update(QUIET)
    scratch = folder / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    progress = Progress(search, trials, bar=base["run"]["bar"])
    tuner = tune.Tuner(
        tune.with_resources(_trainable(Job(dict(base), search, folder)), _resources(search, cluster, len(left))),
        param_space={"trial": tune.grid_search([{"number": n, "settings": own.current} for n, own in first.items()])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler_for(search, space, done, left),
            max_concurrent_trials=search.concurrency if cluster.workers == 0 else None,
            reuse_actors=cluster.workers == 0,  # a stopped trial's workers end with its actor
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(scratch),
            stop={"progress": 100},
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4),  # others may be about to take one over
            callbacks=[progress],
            verbose=0,
        ),
    )
    with progress, Tidy(enabled=cluster.workers > 0):
        tuner.fit()
    shutil.rmtree(scratch, ignore_errors=True)
    if progress.left:
        raise KeyboardInterrupt


def _trainable(job: Job) -> Callable[[dict[str, Any]], None]:
    """What Ray Tune calls with ``{"trial": {"number": ..., "settings": ...}}``."""

    def trial(config: dict[str, Any]) -> None:
        # A trial that took over another's state has its configuration too, number included; its name is its own.
        folder = TrialFolder(job.folder / "trials" / tune.get_context().get_trial_name())
        _train(job, folder, config["trial"]["settings"])

    return trial


def _train(job: Job, folder: TrialFolder, settings: Mapping[str, Any]) -> None:
    """Train a trial, and write down how it ended; an error is its end, not that of the search."""
    try:
        lineage = _lineage(job, folder, settings)
        folder.write("running", lineage)
        config = trial_config(job.base, job.search, folder, lineage)
        if config["cluster"]["workers"]:
            config["cluster"]["wait_seconds"] = max(config["cluster"]["wait_seconds"], PATIENCE)
        else:
            torch.set_num_threads(max(1, int(config["cluster"]["cpus"])))
        figures = train_trial(config, job.search, folder, _reporter(job, folder, lineage))
    except Exception as error:
        write_atomically(folder.path / "error.txt", traceback.format_exc())
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        folder.end("failed", error=what.strip())
        return
    folder.end("finished", **figures)
    tune.report({"progress": 100.0, "value": figures["value"], "now": figures["value"]})


def _lineage(job: Job, folder: TrialFolder, settings: Mapping[str, Any]) -> Lineage:
    """What the trial trains with from here; where that is from another trial's checkpoint, its folder becomes that."""
    own, checkpoint = folder.lineage, tune.get_checkpoint()
    assert own is not None, "the search wrote it down"
    if checkpoint is None:
        return own
    with checkpoint.as_directory() as path:
        note = json.loads((Path(path) / "lineage.json").read_text())
        state = read_state(Path(path) / "state.pt")
    if note["number"] == folder.number and settings == own.current:
        return own  # it was paused, or its process lost: its folder is where it was, or further
    lineage = Lineage(note["settings"], note["changes"]).changed(settings, state["progress"]["step"])
    folder.adopt(state, lineage, note["reports"], _storage(job, folder, lineage))
    return lineage


def _reporter(job: Job, folder: TrialFolder, lineage: Lineage) -> Callable[[Report], None]:
    """Tells Ray Tune; of a population's trials with the checkpoint for others to take over."""
    if not isinstance(job.search.scheduler, PBT):
        return tune.report
    storage, last = _storage(job, folder, lineage), folder.run / "checkpoints" / "last" / "state.pt"
    remote = None if storage is None else StorageCheckpoints(storage)

    def state_now() -> dict[str, Any] | None:
        if remote is not None:
            return remote.load()
        return read_state(last) if last.exists() else None  # Checkpoints.load() is for writers: it clears drafts away

    def report(figures: Report) -> None:
        state = state_now()
        if state is None:
            tune.report(figures)
            return
        note = {"number": folder.number, **lineage._asdict(), "reports": folder.reports}
        with tempfile.TemporaryDirectory() as path:
            torch.save(state, Path(path) / "state.pt")
            (Path(path) / "lineage.json").write_text(json.dumps(note))
            tune.report(figures, checkpoint=tune.Checkpoint.from_directory(path))

    return report


def _storage(job: Job, folder: TrialFolder, lineage: Lineage) -> str | None:
    """URI of the trial's checkpoints, where they are not in its run folder."""
    cluster = trial_config(job.base, job.search, folder, lineage)["cluster"]
    return cluster["storage"] if cluster["workers"] else None


def _resources(search: Search, cluster: Cluster, trials: int) -> Any:
    """Of a trial's actor: the cores that it trains on, and those of its set actors; of the driver of a Ray Train run, a
    place on this machine.

    The run folders are on this machine. Its resource, of which there is one, also keeps the number of such trials to
    ``search.concurrency``, or else to those whose workers find room now: the others would wait for them.
    """
    if cluster.workers == 0:
        places = [actor_bundle(cluster)] * cluster.actors if actor_bundle(cluster) else []
        return tune.PlacementGroupFactory([{"CPU": float(cluster.cpus)}, *places])
    at_once = search.concurrency or max(runs_that_fit(cluster, min(trials, MOST_AT_ONCE)), 1)
    return tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": math.floor(900 / at_once) / 1000}])


def _name(trial: Any) -> str:
    return f"{trial.config['trial']['number']:04d}"
