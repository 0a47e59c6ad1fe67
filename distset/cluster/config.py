"""Where and with what to train; needs no Ray to be read."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Cluster"]


class Cluster(NamedTuple):
    """Where and with what to train.

    Attributes:
        workers: processes; 0 for the driver's own process, without Ray.
        cpus: cores of each worker, and its threads; a fraction where workers are to share a core.
        gpu: one GPU for each worker (collectives by NCCL, else by gloo); 0.5 for half of one, where runs of one worker
            share it.
        address: of a running Ray cluster; None for ``RAY_ADDRESS`` if set, else a Ray of its own on this machine.
        storage: folder or URI (``s3://...``) of checkpoints that every worker sees; None for the run folder.
        max_failures: restarts after lost workers before giving up.
        check_seconds: how often lost workers are looked for.
        set_parallel: so many successive workers share each set, and a batch is shared out to the ``workers / set_parallel``
            teams; for sets so large that one worker sweeps them too slowly.
        actors: of each worker: they sweep its sets, and sampled chunks are replayed by the worker (CPU machines beside a
            GPU). 0 for none.
        actor_cpus: cores of each actor, a fraction if you like.
        wait_seconds: how long to wait for resources that the cluster lacks at the start, such as nodes that an autoscaler
            has yet to bring; 0 for not at all.
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
