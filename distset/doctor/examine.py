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
from distset.doctor.footprint import Footprint, measure
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
    foot: list[Footprint] = []
    if there:
        settings = list(findings_of("settings", partial(_settings, config, foot)))
        findings += settings
        if worst(settings) != "fail":
            findings += findings_of("run", partial(_run_folders, config))
    findings += _room(config, foot[0] if foot else None, libraries)
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


def _settings(config: Config, foot: list[Footprint]) -> Iterator[Finding]:
    """Everything that `train_run` checks before it starts, for each run; the model is built."""
    names = []
    for name, own in members(dict(config)):
        names.append(name)
        if is_bags(config):
            own = balance(own)
            check_run(own)
        else:
            problems.check_problem(own)
    if is_bags(config):
        foot.append(measure(own, Store(config["data"]["path"])))
        yield ok(f"model and plan fit the data: {foot[0].weights / 4:,.0f} parameters")
    else:
        yield ok("model and plan fit the data")
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


def _room(config: Config, foot: Footprint | None, libraries: int) -> Iterator[Finding]:
    cluster: Cluster = build(config["cluster"], "cluster")
    need = None if foot is None else foot.training + libraries + machine.process_memory()[0]
    far = cluster.workers > 0 and (cluster.address or os.environ.get("RAY_ADDRESS"))
    runs = len(list(members(dict(config)))) if foot is not None else 1
    if foot is not None:
        files = runs * foot.checkpoints
        yield from findings_of(
            "disk", lambda: machine.check_disk(Path(config["run"]["dir"]).resolve(), files, "checkpoints")
        )
    if not far:
        if need is not None:
            workers, free = max(cluster.workers, 1), machine.available_memory()
            yield from findings_of("memory", lambda: machine.check_memory(need, workers, free))
        yield from findings_of("cluster", lambda: machine.check_cores(cluster))
    if cluster.workers > 0:
        yield from _cluster(config, cluster, bool(far), need)


def _cluster(config: Config, cluster: Cluster, far: bool, need: int | None) -> Iterator[Finding]:
    if importlib.util.find_spec("ray") is None:
        told = fail("cluster.workers asks for Ray, which is not installed", "pip install 'distset[jobs]', or cluster=none")
        yield told._replace(check="cluster")
        return
    from distset.cluster import preflight

    yield from findings_of("storage", lambda: preflight.check_storage(cluster))
    if not far:
        return
    reached = list(findings_of("cluster", lambda: preflight.check_cluster(cluster, need)))
    yield from reached
    if any(finding.message.startswith("cluster.address") for finding in reached):
        return
    data = Path(config["data"]["path"]) / "store.json" if is_bags(config) and _store_is_there(config) else None
    yield from findings_of("nodes", lambda: preflight.check_nodes(data, cluster.storage))


def _store_is_there(config: Config) -> bool:
    return (Path(config["data"]["path"]) / "store.json").exists()
