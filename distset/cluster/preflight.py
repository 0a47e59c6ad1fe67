"""A running cluster before a run: is it there, has it room, do its nodes run the same software and see the same files?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distset.cluster.config import Cluster
from distset.cluster.resources import room_for
from distset.cluster.storage import StorageCheckpoints
from distset.cluster.train import start_ray
from distset.doctor.findings import Finding, fail, ok, warn
from distset.versions import differences, installed

__all__ = ["check_cluster", "check_nodes", "check_storage"]

ANSWER = 120.0
"""Seconds that a node has to answer in: it may have to start a process first."""


def check_cluster(cluster: Cluster, need: int | None) -> Iterator[Finding]:
    """Connect; compare what is asked for with what is there.

    Args:
        cluster: with an address (or ``RAY_ADDRESS``).
        need: memory of a worker in bytes, if known.
    """
    start_ray(cluster)
    room = room_for(cluster)
    if room.missing and not cluster.wait_seconds:
        yield fail(room.describe(), "lower cluster.workers or cluster.cpus, add nodes, or set cluster.wait_seconds")
    elif room.missing:
        yield warn(room.describe(), f"training waits {cluster.wait_seconds:g} s for an autoscaler to bring the rest")
    elif room.busy:
        yield warn(room.describe(), "others are using it: set cluster.wait_seconds to wait for them")
    else:
        yield ok(room.describe())
    if os.environ.get("RAY_AUTH_MODE") != "token":
        yield warn(
            "the cluster asks for no token: who reaches its ports runs code on it",
            "start it with RAY_AUTH_MODE=token; docs/cluster.md says what must never be exposed",
        )
    smallest = min((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if need is not None and smallest and need > smallest:
        yield fail(
            f"a worker takes about {need / 2**30:.1f} GiB, the smallest node has {smallest / 2**30:.1f} GiB for workers",
            "lower data.chunk_size, use grad=exact or grad=sampled, or larger nodes",
        )


def check_nodes(data: Path | None, storage: str | None) -> Iterator[Finding]:
    """Ask each node for its versions, whether it sees the data, and whether it can write checkpoints."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = {}
    for node in nodes:
        on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[_answer.options(scheduling_strategy=on).remote(data, storage)] = node["NodeManagerAddress"]
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)
    for reference in silent:
        yield fail(f"node {asked[reference]} did not answer in {ANSWER:g} s", "look at it with: ray status, ray list nodes")
        ray.cancel(reference, force=True)
    problems = 0
    for reference in answered:
        for told in _problems(ray.get(reference), data):
            problems += 1
            yield fail(f"node {asked[reference]}: {told[0]}", told[1])
    if not silent and not problems:
        seen = " and see the data" if data is not None else ""
        yield ok(f"{len(nodes)} node{'s' * (len(nodes) != 1)} run the driver's versions{seen}")


def check_storage(cluster: Cluster) -> Iterator[Finding]:
    """Write and read back a small file where checkpoints will go."""
    if cluster.storage is not None:
        storage = StorageCheckpoints(cluster.storage)
        storage.check()
        yield ok(f"checkpoints can be written to {storage.name}")
    elif cluster.address or os.environ.get("RAY_ADDRESS"):
        yield warn(
            "cluster.storage is null: checkpoints go to the run folder, which every node has to see",
            "set cluster.storage to a shared folder or a URI, unless run.dir is on one",
        )


@ray.remote(num_cpus=0, max_retries=0)
def _answer(data: Path | None, storage: str | None) -> dict[str, Any]:
    problem = ""
    if storage is not None:
        try:
            StorageCheckpoints(storage).check()
        except ValueError as error:
            problem = str(error)
    return {"versions": installed(), "data": data is None or data.exists(), "storage": problem}


def _problems(answer: dict[str, Any], data: Path | None) -> Iterator[tuple[str, str]]:
    if other := differences(installed(), answer["versions"]):
        yield f"has {', '.join(other)}, which is here", "install the same versions everywhere: one container image for all"
    if not answer["data"]:
        yield f"does not see {data}", "put the store where every node sees it, under the same path"
    if answer["storage"]:
        yield answer["storage"], "give its workers the same access as this machine"
