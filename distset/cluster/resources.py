"""Whether a cluster has what a run asks for; waits for it, and says what is missing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from distset.cluster.config import Cluster, actor_bundle

__all__ = ["Room", "require_workers", "room_for", "runs_that_fit", "shortage"]

SETTLE_SECONDS = 10.0
"""What placing workers may take on a cluster that has room for them."""

Bundle = Mapping[str, float]
"""An amount of each resource, ``{"CPU": 4.0, "GPU": 1.0}``."""


class Room(NamedTuple):
    """What a cluster has for the workers of a run.

    Attributes:
        bundle, actor: what one worker asks for, and one actor.
        workers, actors: how many are asked for; all the actors of all the workers (of this process, without workers).
        fits, actors_fit: how many find room on the nodes, were they free; actors beside the workers.
        nodes: how many there are.
        total, free: of each resource asked for, on all nodes.
    """

    bundle: dict[str, float]
    actor: dict[str, float]
    workers: int
    actors: int
    fits: int
    actors_fit: int
    nodes: int
    total: dict[str, float]
    free: dict[str, float]

    @property
    def missing(self) -> str:
        """Who lacks room, however idle the cluster: ``"2 of 8 workers"``; empty where nobody does."""
        lacking = (
            (self.workers - self.fits, self.workers, "workers"),
            (self.actors - self.actors_fit, self.actors, "actors"),
        )
        return " and ".join(f"{lack} of {asked} {who}" for lack, asked, who in lacking if lack > 0)

    @property
    def asked(self) -> dict[str, float]:
        """All that is asked for of each resource."""
        return {
            name: self.workers * self.bundle.get(name, 0.0) + self.actors * self.actor.get(name, 0.0) for name in self.total
        }

    @property
    def busy(self) -> bool:
        """Whether others are using what is asked for."""
        return any(self.free[name] < amount for name, amount in self.asked.items())

    def describe(self) -> str:
        """Asked and there, as a clause of a sentence."""
        there = " and ".join(f"{self.total[name]:g} {name} ({self.free[name]:g} free)" for name in self.total)
        who = [f"{self.workers} workers of {_amounts(self.bundle)}"] if self.workers else []
        who += [f"{self.actors} actors of {_amounts(self.actor)}"] if self.actors else []
        nodes = f"{self.nodes} node{'s' * (self.nodes != 1)}"
        return f"{' with '.join(who)} ask for {_amounts(self.asked)}; the cluster's {nodes} have {there}"


def room_for(cluster: Cluster) -> Room:
    """Count the room on the nodes of the connected cluster."""
    worker, actor = _worker_bundle(cluster), actor_bundle(cluster)
    workers, actors = cluster.workers, max(cluster.workers, 1) * cluster.actors
    nodes = _nodes()
    names = dict.fromkeys([*(worker if workers else ()), *(actor if actors else ())])
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in names}
    available = ray.available_resources()
    free = {name: available.get(name, 0.0) for name in names}
    fits = sum(_holds(node, worker) for node in nodes)
    for _ in range(min(fits, workers)):
        _place(nodes, worker, beside=actor)
    actors_fit = sum(_holds(node, actor) for node in nodes)
    return Room(worker, actor, workers, actors, fits, actors_fit, len(nodes), total, free)


def runs_that_fit(cluster: Cluster, most: int) -> int:
    """How many runs such as ``cluster`` says the nodes of the connected cluster hold, were they free; at most ``most``."""
    worker, actor = _worker_bundle(cluster), actor_bundle(cluster)
    nodes = _nodes()
    for count in range(most):
        wanted = [(worker, actor)] * cluster.workers + [(actor, {})] * (cluster.workers * cluster.actors)
        if not all(_place(nodes, bundle, beside) for bundle, beside in wanted):
            return count
    return most


def require_workers(cluster: Cluster) -> None:
    """Return once the connected cluster has free what ``cluster`` asks for.

    The workers' resources are asked for as a whole, which an autoscaler sees, and given back for Ray Train to take.

    Raises:
        ValueError: after ``cluster.wait_seconds``: says what was asked for, what is there, and what is missing.
    """
    room = room_for(cluster)
    if room.missing and not cluster.wait_seconds:
        raise ValueError(shortage(room, cluster))
    actors = [room.actor] * room.actors if room.actor else []
    group = placement_group([room.bundle] * room.workers + actors, strategy="PACK")
    try:
        placed = group.wait(timeout_seconds=max(cluster.wait_seconds, SETTLE_SECONDS))
    finally:
        remove_placement_group(group)
    if not placed:
        raise ValueError(shortage(room_for(cluster), cluster))


def shortage(room: Room, cluster: Cluster) -> str:
    """What is missing after ``cluster.wait_seconds``, and what to do about it."""
    waited = f" after {cluster.wait_seconds:g} s of waiting" if cluster.wait_seconds else ""
    if room.missing:
        lack = f"{room.missing} lack a place{waited}"
        advice = "lower cluster.workers or cluster.cpus, add nodes, or"
    else:
        lack = f"others are using what the workers need{waited}"
        advice = "lower cluster.workers or cluster.cpus, or"
    wait = "raise cluster.wait_seconds (the time that an autoscaler, or the work of others, may take)"
    return f"cluster.workers: {lack}: {room.describe()}. Either {advice} {wait}"


def _worker_bundle(cluster: Cluster) -> dict[str, float]:
    return {"CPU": float(cluster.cpus), **({"GPU": float(cluster.gpu)} if cluster.gpu else {})}


def _nodes() -> list[dict[str, float]]:
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _holds(node: Bundle, bundle: Bundle) -> int:
    """How many bundles a node holds."""
    return min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items() if amount), default=sys.maxsize)


def _place(nodes: list[dict[str, float]], bundle: Bundle, beside: Bundle) -> bool:
    """Take a bundle from a node, the one that loses the fewest places for those ``beside`` it, or else the fullest.

    Returns:
        Whether there was one.
    """

    def cost(node: dict[str, float]) -> tuple[float, float]:
        left = _without(node, bundle)
        return _holds(node, beside) - _holds(left, beside), sum(left.get(name, 0.0) for name in bundle)

    able = [node for node in nodes if _holds(node, bundle)]
    if able:
        node = min(able, key=cost)
        node.update(_without(node, bundle))
    return bool(able)


def _without(node: Bundle, bundle: Bundle) -> dict[str, float]:
    return {**node, **{name: node.get(name, 0.0) - amount for name, amount in bundle.items()}}


def _amounts(bundle: Bundle) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items()) or "nothing"
