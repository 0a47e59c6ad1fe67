"""The whole examination of a configuration of ``jobs.train``, in seconds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from distset.bags.runs import balance, check_run
from distset.build import build
from distset.cluster.config import Cluster
from distset.data import Split, Store
from distset.doctor import data as on_data
from distset.doctor import machine
from distset.doctor.findings import Finding, fail, findings_of, ok, warn, worst
from distset.doctor.footprint import measure, measure_problem
from distset.problems import runs as problems
from distset.runs import RunFolder
from distset.training import is_bags, members

__all__ = ["examine"]

Config = Mapping[str, Any]


def examine(config: Config, *, seconds: float = 5.0) -> list[Finding]:
    """Look for everything that would end a run later, or spoil it.

    Args:
        config: the resolved configuration of ``jobs.train``.
        seconds: for reading sets and comparing their checksums.

    Returns:
        Findings, the checks in the order of the run; a check whose grounds are missing is left out.
    """
    _, libraries = machine.process_memory()  # before data is mapped as well
    findings = list(findings_of("software", machine.check_software))
    about_data = list(_data(config, seconds))
    findings += about_data
    there = not is_bags(config) or (worst(about_data) != "fail" and _store_is_there(config))
    sizes: dict[str, int] = {}
    if there:
        settings = list(findings_of("settings", partial(_settings, config, sizes)))
        findings += settings
        if worst(settings) != "fail":
            findings += findings_of("run", partial(_run_folders, config))
    findings += _room(config, sizes, libraries)
    return findings


def _data(config: Config, seconds: float) -> Iterator[Finding]:
    if not is_bags(config):
        return
    if not _store_is_there(config) and config["data"]["make"] is not None:
        made = config["data"]["make"]["_target_"]
        told = warn(
            f"no store at {config['data']['path']} yet", f"jobs.train first makes it from {made}; ask again after that"
        )
        yield told._replace(check="data")
        return
    opened: list[Store] = []
    yield from findings_of("data", lambda: _open(config, opened, seconds))
    if opened:
        folds: dict[int, Split] = {}
        monitor = config["plan"]["monitor"]
        yield from findings_of("splits", lambda: _splits(config, opened[0], folds, monitor))
        if folds:
            yield from findings_of("labels", lambda: on_data.check_labels(opened[0], folds))


def _open(config: Config, opened: list[Store], seconds: float) -> Iterator[Finding]:
    opened.append(Store(config["data"]["path"]))
    yield from on_data.check_checksums(opened[0], seconds)


def _splits(config: Config, store: Store, folds: dict[int, Split], monitor: str | None) -> Iterator[Finding]:
    for _, own in members(dict(config)):
        fold = own["data"]["fold"]
        folds[fold] = store.split(own["data"]["split"], fold)
    yield from on_data.check_splits(store, folds, monitor)


def _settings(config: Config, sizes: dict[str, int]) -> Iterator[Finding]:
    """Everything that `train_run` checks before it starts, for each run; the model is built, and its bytes are found."""
    names = []
    for name, own in members(dict(config)):
        names.append(name)
        if is_bags(config):
            own = balance(own)
            check_run(own)
        else:
            problems.check_problem(own)
    if is_bags(config):
        foot = measure(own, Store(config["data"]["path"]))
        sizes |= {"checkpoints": foot.checkpoints, "training": foot.training}
    else:
        foot = measure_problem(own)
        sizes |= {"checkpoints": foot.checkpoints}  # what a step holds, this task alone knows
    yield ok(f"model and plan fit the data: {foot.weights / 4:,.0f} parameters")
    if len(names) > 1:
        yield ok(f"{len(names)} runs: {', '.join(names)}")


def _run_folders(config: Config) -> Iterator[Finding]:
    """What is in the folders that the runs would write."""
    home = Path(config["run"]["dir"]).resolve()
    for name, own in members(dict(config)):
        folder = home / name
        if not (folder / "config.yaml").is_file():
            yield ok(f"{folder} is new") if not folder.exists() else ok(f"{folder} holds no run yet")
            continue
        run = RunFolder.prepare(folder, balance(own) if is_bags(config) else own)  # nothing is written where a run is
        if run.metrics is not None:
            yield warn(f"{folder} holds this run, finished", "nothing would be trained; choose another run.dir")
        elif (run.checkpoints / "last" / "state.pt").exists() or own["cluster"]["storage"] is not None:
            yield ok(f"{folder} holds this run, begun: it goes on from its last checkpoint")
        else:
            yield ok(f"{folder} holds this run, without a checkpoint: it starts from the beginning")


def _room(config: Config, sizes: Mapping[str, int], libraries: int) -> Iterator[Finding]:
    cluster: Cluster = build(config["cluster"], "cluster")
    need = sizes["training"] + libraries + machine.process_memory()[0] if "training" in sizes else None
    on_ray = cluster.workers > 0 or cluster.actors > 0
    far = on_ray and (cluster.address or os.environ.get("RAY_ADDRESS"))
    if sizes:
        files = len(list(members(dict(config)))) * sizes["checkpoints"]
        yield from findings_of(
            "disk", lambda: machine.check_disk(Path(config["run"]["dir"]).resolve(), files, "checkpoints")
        )
    if not far:
        if need is not None:
            processes, free = max(cluster.workers, 1) * (1 + cluster.actors), machine.available_memory()
            yield from findings_of("memory", lambda: machine.check_memory(need, processes, free))
        elif sizes:
            told = "not estimated for this task: only training on bags of a store is; look at the first steps"
            yield ok(told)._replace(check="memory")
        yield from findings_of("cluster", lambda: machine.check_cores(cluster))
    if on_ray:
        yield from _cluster(config, cluster, bool(far), need)


def _cluster(config: Config, cluster: Cluster, far: bool, need: int | None) -> Iterator[Finding]:
    if importlib.util.find_spec("ray") is None:
        told = fail(
            "cluster.workers or cluster.actors asks for Ray, which is not installed",
            "pip install 'distset[jobs]', or cluster=none",
        )
        yield told._replace(check="cluster")
        return
    from distset.cluster import preflight

    if cluster.workers > 0:  # else checkpoints are this process's own
        yield from findings_of("storage", lambda: preflight.check_storage(cluster))
    storage = cluster.storage if cluster.workers > 0 else None
    if not far:
        return
    reached = list(findings_of("cluster", lambda: preflight.check_cluster(cluster, need)))
    yield from reached
    if any(finding.message.startswith("cluster.address") for finding in reached):
        return
    data = Path(config["data"]["path"]) / "store.json" if is_bags(config) and _store_is_there(config) else None
    yield from findings_of("nodes", lambda: preflight.check_nodes(data, storage))


def _store_is_there(config: Config) -> bool:
    return (Path(config["data"]["path"]) / "store.json").exists()
