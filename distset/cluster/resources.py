"""Whether a cluster has what a run asks for; waits for it, and says what is missing."""

from __future__ import annotations

from typing import NamedTuple

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from distset.cluster.config import Cluster

__all__ = ["Room", "require_workers", "room_for"]

SETTLE_SECONDS = 10.0
"""What placing workers may take on a cluster that has room for them."""


class Room(NamedTuple):
    """What a cluster has for the workers of a run.

    Attributes:
        bundle: what one worker asks for, ``{"CPU": 4.0, "GPU": 1.0}``.
        workers, actors: how many are asked for; all the actors of all the workers.
        actor_cpus: of one actor.
        fits, actors_fit: how many find room, on all nodes, were they free; actors beside the workers.
        nodes: how many there are.
        total, free: of each resource asked for, on all nodes.
    """

    bundle: dict[str, float]
    workers: int
    actors: int
    actor_cpus: float
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
        own = {name: amount * self.workers for name, amount in self.bundle.items()}
        return {**own, "CPU": own["CPU"] + self.actors * self.actor_cpus}

    @property
    def busy(self) -> bool:
        """Whether others are using what is asked for."""
        return any(self.free[name] < amount for name, amount in self.asked.items())

    def describe(self) -> str:
        """Asked and there, as a clause of a sentence."""
        asked = " and ".join(f"{amount:g} {name}" for name, amount in self.asked.items())
        there = " and ".join(f"{self.total[name]:g} {name} ({self.free[name]:g} free)" for name in self.bundle)
        each = " and ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())
        actors = f" with {self.actors} actors of {self.actor_cpus:g} CPU" if self.actors else ""
        nodes = f"{self.nodes} node{'s' * (self.nodes != 1)}"
        return f"{self.workers} workers of {each}{actors} ask for {asked}; the cluster's {nodes} have {there}"


def room_for(cluster: Cluster) -> Room:
    """Count the room on the nodes of the connected cluster."""
    bundle = {"CPU": float(cluster.cpus), **({"GPU": float(cluster.gpu)} if cluster.gpu else {})}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = sum(int(min(node.get(name, 0.0) // amount for name, amount in bundle.items())) for node in nodes)
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in bundle}
    available = ray.available_resources()
    free = {name: available.get(name, 0.0) for name in bundle}
    actors, left = cluster.workers * cluster.actors, total["CPU"] - min(fits, cluster.workers) * cluster.cpus
    actors_fit = int(left // cluster.actor_cpus) if cluster.actor_cpus else actors
    return Room(bundle, cluster.workers, actors, cluster.actor_cpus, fits, actors_fit, len(nodes), total, free)


def require_workers(cluster: Cluster) -> None:
    """Return once the connected cluster has free what ``cluster`` asks for.

    The workers' resources are asked for as a whole, which an autoscaler sees, and given back for Ray Train to take.

    Raises:
        ValueError: after ``cluster.wait_seconds``: says what was asked for, what is there, and what is missing.
    """
    room = room_for(cluster)
    if room.missing and not cluster.wait_seconds:
        raise ValueError(_shortage(room, cluster))
    actors = [{"CPU": room.actor_cpus}] * room.actors if room.actor_cpus else []
    group = placement_group([room.bundle] * room.workers + actors, strategy="PACK")
    try:
        placed = group.wait(timeout_seconds=max(cluster.wait_seconds, SETTLE_SECONDS))
    finally:
        remove_placement_group(group)
    if not placed:
        raise ValueError(_shortage(room_for(cluster), cluster))


def _shortage(room: Room, cluster: Cluster) -> str:
    waited = f" after {cluster.wait_seconds:g} s of waiting" if cluster.wait_seconds else ""
    if room.missing:
        lack = f"{room.missing} lack a place{waited}"
        advice = "lower cluster.workers or cluster.cpus, add nodes, or"
    else:
        lack = f"others are using what the workers need{waited}"
        advice = "lower cluster.workers or cluster.cpus, or"
    wait = "raise cluster.wait_seconds (the time that an autoscaler, or the work of others, may take)"
    return f"cluster.workers: {lack}: {room.describe()}. Either {advice} {wait}"
