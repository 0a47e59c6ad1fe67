"""Train a bag classifier: ``python -m jobs.train [GROUP=CHOICE ...] [KEY=VALUE ...]``.

The run folder (``run.dir``) explains itself; the same command goes on where a killed run stopped, and says so when it is
finished. ``folds=all`` trains one run a fold and summarises them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from distset.bags.results import describe, summarise, write_results
from distset.bags.runs import balance, check_run, train_bags
from distset.build import build
from distset.checkpoints import Checkpoints
from distset.data import Store
from distset.run_log import RunLog, log
from distset.runs import RunFolder
from jobs._common import ensure_store, job


@job("train")
def main(config: dict[str, Any]) -> None:
    folder = Path(config["run"]["dir"]).resolve()
    config["data"]["path"] = str(Path(config["data"]["path"]).resolve())
    ensure_store(config["data"])
    if config["folds"] is None:
        train(config, folder)
        return
    available = len(Store(config["data"]["path"]).folds(config["data"]["split"]))
    folds = range(available) if config["folds"] == "all" else config["folds"]
    finished = {}
    for number, fold in enumerate(folds, 1):
        print(f"fold {fold} ({number} of {len(folds)})")
        finished[fold] = train(_of_fold(config, fold), folder / f"fold-{fold}")
    print(summarise(folder, finished))


def train(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run, from its last checkpoint to its results; returns the final figures."""
    config = balance(config)
    split = check_run(config)
    run = RunFolder.prepare(folder, config)
    if run.metrics is not None:
        print("this run is finished; for another one choose another run.dir")
    else:
        store = Store(config["data"]["path"])
        with RunLog(run.path, bar=config["run"]["bar"]) as watch:
            log.info("training on %s: %s", store, ", ".join(f"{len(ids)} {part}" for part, ids in split._asdict().items()))
            outcome = on_cluster(config, run, watch)
        write_results(run.path, outcome, store, split, plots=config["run"]["plots"])
    metrics = run.metrics
    assert metrics is not None, "write_results ends with metrics.json"
    print(f"{describe(metrics)}\neverything is in {run.path} (see README.md there)")
    return metrics


def on_cluster(config: dict[str, Any], run: RunFolder, watch: RunLog) -> Any:
    """Train in this process or on Ray's workers, with checkpoints where all of them see them."""
    cluster = build(config["cluster"], "cluster")
    checkpoints = Checkpoints(run.checkpoints)
    if cluster.workers == 0:
        return train_bags(config, checkpoints, watch=watch)
    from distset.cluster.storage import StorageCheckpoints
    from distset.cluster.train import train_on_ray

    log.info("starting %d worker%s of Ray", cluster.workers, "s" * (cluster.workers > 1))
    if cluster.storage is None:
        return train_on_ray(functools.partial(train_bags, config, checkpoints), cluster, watch=watch)
    remote = StorageCheckpoints(cluster.storage)
    outcome = train_on_ray(functools.partial(train_bags, config, remote), cluster, watch=watch)
    remote.fetch(run.checkpoints)
    return outcome


def _of_fold(config: dict[str, Any], fold: int) -> dict[str, Any]:
    cluster, storage = config["cluster"], config["cluster"]["storage"]
    storage = None if storage is None else f"{storage.rstrip('/')}/fold-{fold}"
    return {**config, "folds": None, "data": {**config["data"], "fold": fold}, "cluster": {**cluster, "storage": storage}}


if __name__ == "__main__":
    main()
