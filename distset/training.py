"""A training run from its plain configuration to its results, whatever is trained: what jobs, searches and tables call.

Example:
    >>> from distset.training import train_run
    >>> metrics = train_run(config, "runs/digits")  # doctest: +SKIP
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from distset.bags import results as bag_results
from distset.bags.runs import balance, check_run, train_bags
from distset.build import build
from distset.checkpoints import Checkpoints
from distset.cluster.config import Cluster, storage_below
from distset.cluster.world import open_world
from distset.data import Store
from distset.files import write_atomically
from distset.problems import runs as problems
from distset.report import plot_spread, write_json
from distset.run_log import RunLog, log
from distset.runs import RunFolder
from distset.train import Watch, Watches

__all__ = ["describe", "final_figures", "members", "summarise", "train_run"]

README = """# Several training runs of distset

`fold-0/`, `seed-1/`, ... are run folders, each with a README of its own. `summary.json` and `summary.csv` hold the test
figures of every run, with mean and standard deviation over them; `plots/spread.png` shows them.
"""

Config = dict[str, Any]


def train_run(config: Mapping[str, Any], folder: str | Path, *, watch: Watch | None = None) -> dict[str, Any]:
    """One run, from its last checkpoint to its results.

    Args:
        config: the resolved configuration of ``jobs.train``, of one fold and seed.
        folder: the run folder; a finished run is left as it is.
        watch: told of every step and record, beside the run folder's own log.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError: for everything that a check can find before training starts.
    """
    own = _bags if is_bags(config) else _problem
    return own(dict(config), Path(folder), watch)


def _bags(config: Config, folder: Path, watch: Watch | None) -> dict[str, Any]:
    config = balance(config)
    split = check_run(config)
    run = RunFolder.prepare(folder, config)
    if run.metrics is None:
        store = Store(config["data"]["path"])
        counts = ", ".join(f"{len(ids)} {part}" for part, ids in split._asdict().items())
        outcome = _train(train_bags, config, run, watch, f"{store}, {counts}")
        bag_results.write_results(run.path, outcome, store, split, plots=config["run"]["plots"])
    return _figures(run)


def _problem(config: Config, folder: Path, watch: Watch | None) -> dict[str, Any]:
    problems.check_problem(config)
    run = RunFolder.prepare(folder, config)
    if run.metrics is None:
        outcome = _train(problems.train_problem, config, run, watch, config["data"]["name"])
        problems.write_results(run, outcome, plots=config["run"]["plots"])
    return _figures(run)


def _figures(run: RunFolder) -> dict[str, Any]:
    metrics = run.metrics
    assert metrics is not None, "write_results ends with metrics.json"
    return metrics


def is_bags(config: Mapping[str, Any]) -> bool:
    """Whether the configuration is of bags in a store; else of a problem with examples of its own."""
    return "examples" not in config["data"]


def describe(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The figures of ``metrics.json`` as lines to read."""
    return bag_results.describe(metrics) if is_bags(config) else problems.describe(metrics)


def members(config: Config) -> Iterator[tuple[str, Config]]:
    """The runs that ``folds`` and ``seeds`` ask for, with the names of their folders; the one run ``""`` without.

    Raises:
        ValueError: for ``folds`` or ``seeds`` that are no list, empty, or hold a number twice.
    """
    folds, seeds = _folds(config), config["seeds"]
    for key, wanted in (("folds", folds), ("seeds", seeds)):
        if wanted is not None and not (isinstance(wanted, list | tuple) and wanted and len({*wanted}) == len(wanted)):
            raise ValueError(f"{key}: got {wanted!r}, wanted different numbers, such as [0,1,2], or null for one run")
    for fold, seed in itertools.product([None] if folds is None else folds, [None] if seeds is None else seeds):
        own = {**config, "folds": None, "seeds": None}
        names = []
        if fold is not None:
            names.append(f"fold-{fold}")
            own["data"] = _with_fold(config["data"], fold)
        if seed is not None:
            names.append(f"seed-{seed}")
            own["seed"] = seed
        name = "-".join(names)
        storage = config["cluster"]["storage"]
        if name and storage is not None:
            own["cluster"] = {**config["cluster"], "storage": storage_below(storage, name)}
        yield name, own


def summarise(folder: str | Path, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean and spread of the test figures over runs, as ``summary.json``, ``summary.csv``, a plot, and lines to read.

    Args:
        folder: of all the runs.
        runs: the ``metrics.json`` of each, by name.
    """
    folder = Path(folder)
    rows = {name: final_figures(metrics) for name, metrics in runs.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").astype(float)
    summary: dict[str, Any] = {"runs": len(rows)}
    lines = [f"test figures over {len(rows)} runs, mean and standard deviation:"]
    for name in table.columns:
        values = table[name].dropna().tolist()
        mean = statistics.fmean(values) if values else None
        spread = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": mean, "std": spread, "runs": len(values)}
        if mean is not None:
            lines.append(f"  {name:28} {mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
    table.rename_axis("run").to_csv(folder / "summary.csv")
    shown = [name for name in table.columns if name != "loss" and not table[name].isna().any()][:4]
    if shown:
        plot_spread(table[shown].to_dict("records"), folder / "plots" / "spread.png")
    write_json(folder / "summary.json", {**summary, "by_run": rows})
    write_atomically(folder / "README.md", README)
    return "\n".join(lines)


def final_figures(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of the test part (of validation where there is none), without their intervals."""
    part = metrics.get("test") or metrics.get("val") or {}
    return {name: figure["value"] if isinstance(figure, Mapping) else figure for name, figure in part.items()}


def _folds(config: Config) -> list[int] | None:
    if config["folds"] != "all":
        return config["folds"]
    data = config["data"]
    return list(range(len(Store(data["path"]).folds(data["split"])) if is_bags(config) else data["folds"]))


def _with_fold(data: Mapping[str, Any], fold: int) -> dict[str, Any]:
    if "examples" in data:
        return {**data, "examples": {**data["examples"], "fold": fold}}
    return {**data, "fold": fold}


def _train(process: Callable[..., Any], config: Config, run: RunFolder, watch: Watch | None, what: str) -> Any:
    """Train in this process or on Ray's workers, with checkpoints where all of them see them."""
    with RunLog(run.path, bar=config["run"]["bar"]) as own:
        log.info("training on %s", what)
        return _on_cluster(process, config, run, own if watch is None else Watches(own, watch))


def _in_this_process(process: Callable[[], Any], cluster: Cluster) -> Any:
    if cluster.actors:
        from distset.cluster.train import start_ray

        start_ray(cluster)
    with open_world(cluster):
        return process()


def _on_cluster(process: Callable[..., Any], config: Config, run: RunFolder, watch: Watch) -> Any:
    cluster = build(config["cluster"], "cluster")
    checkpoints = Checkpoints(run.checkpoints)
    if cluster.workers == 0:
        return _in_this_process(functools.partial(process, config, checkpoints, watch=watch), cluster)
    from distset.cluster.storage import StorageCheckpoints
    from distset.cluster.train import train_on_ray

    name = "/".join(run.path.parts[-2:])
    log.info("starting %d worker%s of Ray", cluster.workers, "s" * (cluster.workers > 1))
    if cluster.storage is None:
        return train_on_ray(functools.partial(process, config, checkpoints), cluster, watch=watch, name=name)
    remote = StorageCheckpoints(cluster.storage)
    remote.check()
    outcome = train_on_ray(functools.partial(process, config, remote), cluster, watch=watch, name=name)
    remote.fetch(run.checkpoints)
    return outcome
