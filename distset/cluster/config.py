"""Where and with what to train; needs no Ray to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Cluster", "actor_bundle", "storage_below"]


class Cluster(NamedTuple):
    """Where and with what to train.

    Attributes:
        workers: processes; 0 for the driver's own process, without Ray.
        cpus: cores of each worker, and its threads; a fraction where workers are to share a core.
        gpu: one GPU for each worker (collectives by NCCL, else by gloo); 0.5 for half of one, where runs of one worker
            share it.
        address: of a running Ray cluster; None for ``RAY_ADDRESS`` if set, else a Ray of its own on this machine.
        storage: folder or URI (``s3://...``) of checkpoints that every worker sees; None for the run folder.
        max_failures: restarts after lost workers before giving up; in ingestion, so often is a slide tried again that ended
            its worker's process.
        check_seconds: how often lost workers are looked for.
        set_parallel: so many successive workers share each set, and a batch is shared out to the ``workers / set_parallel``
            teams; for sets so large that one worker sweeps them too slowly.
        actors: of each worker: they sweep its sets, and sampled chunks are replayed by the worker (CPU machines beside a
            GPU). 0 for none.
        actor_cpus: cores of each actor, a fraction if you like.
        actor_gpus: GPUs of each actor, a fraction if you like; with one, it computes there.
        actor_resources: others that each actor asks for, such as ``{"preemptible": 1}``, as the cluster names them.
        local: so many sampled chunks of a set, at most, are replayed by the worker itself, more of them by its actors.
            ``jobs.train`` sets it to ``grad.m``.
        slices: pieces in which a set is given out to actors; they fix a gradient's bits (`distset.cluster.ray_set`). 4 an
            actor if None.
        wait_seconds: how long to wait for resources that the cluster lacks at the start, such as nodes that an autoscaler
            has yet to bring; 0 for not at all. For those of lost workers, so long and at least some minutes.
    """

    workers: int = 1
    cpus: float = 1
    gpu: bool | float = False
    address: str | None = None
    storage: str | None = None
    max_failures: int = 3
    check_seconds: float = 0.5
    wait_seconds: float = 0.0
    set_parallel: int = 1
    actors: int = 0
    actor_cpus: float = 1.0
    actor_gpus: float = 0.0
    actor_resources: Mapping[str, float] | None = None
    local: int = 1
    slices: int | None = None


def actor_bundle(cluster: Cluster) -> dict[str, float]:
    """What each actor asks of the cluster: ``{"CPU": 2.0, "preemptible": 1.0}``."""
    asked = {"CPU": cluster.actor_cpus, "GPU": cluster.actor_gpus, **(cluster.actor_resources or {})}
    return {name: float(amount) for name, amount in asked.items() if amount}


def storage_below(storage: str, name: str) -> str:
    """A folder below ``cluster.storage``; what a URI asks for after its path stays at its end.

    Example:
        >>> storage_below("s3://bucket/runs?endpoint_override=minio:9000", "fold-0")
        's3://bucket/runs/fold-0?endpoint_override=minio:9000'
    """
    folder, mark, query = storage.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"
