"""The world of a run on a cluster: its sets are shared by the workers of a team, or worked on by actors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from distset.cluster.config import Cluster, actor_bundle
from distset.cluster.group_set import GroupSet, SetGroup
from distset.sets import ChunkedSet
from distset.world import World, use_world

if TYPE_CHECKING:
    from distset.cluster.set_actors import SetActors

__all__ = ["ClusterWorld", "check_sharing", "open_world"]

START_SECONDS = 60.0  # what actors may take to start where there is room for them


class ClusterWorld(World):
    """As `World`, with ``cluster.set_parallel`` workers or ``cluster.actors`` actors to each set of more than one chunk.

    Raises:
        ValueError: see `check_sharing`.
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.set_parallel)
        self.group = SetGroup.split(cluster.set_parallel) if cluster.set_parallel > 1 else None
        self.actors = _actors(cluster) if cluster.actors else None
        self.local, self.slices = cluster.local, cluster.slices

    def place(self, set: ChunkedSet) -> ChunkedSet:
        if set.num_chunks == 1:
            return set
        if self.group is not None:
            return GroupSet(set, self.group)
        if self.actors is not None:
            from distset.cluster.ray_set import RaySet

            return RaySet(set, self.actors, local=self.local, slices=self.slices)
        return set

    def step(self) -> AbstractContextManager[None]:
        return super().step() if self.actors is None else self.actors.unchanged()


def check_sharing(cluster: Cluster) -> None:
    """Raise where sets cannot be shared as the configuration says.

    Raises:
        ValueError: for workers that do not divide into teams of ``set_parallel``, for teams that have actors as well, and
            for numbers out of range.
    """
    if cluster.set_parallel < 1 or max(cluster.workers, 1) % cluster.set_parallel:
        raise ValueError(
            f"cluster.set_parallel: got {cluster.set_parallel} workers a set, which do not divide the {cluster.workers} of "
            f"cluster.workers; make one a multiple of the other"
        )
    for name in ("actors", "actor_cpus", "actor_gpus", "local"):
        if getattr(cluster, name) < 0:
            raise ValueError(f"cluster.{name}: got {getattr(cluster, name):g}, wanted at least 0")
    if cluster.slices is not None and cluster.slices < 1:
        raise ValueError(f"cluster.slices: got {cluster.slices}, wanted at least 1, or null for 4 an actor")
    if cluster.actors and cluster.set_parallel > 1:
        raise ValueError(
            f"cluster.actors: got {cluster.actors} with cluster.set_parallel={cluster.set_parallel}; a set is shared by "
            f"workers or by actors, so leave one of them out"
        )


@contextmanager
def open_world(cluster: Cluster) -> Iterator[None]:
    """In a worker, or in a driver that works itself: train and predict with sets shared as ``cluster`` says."""
    if cluster.set_parallel == 1 and not cluster.actors:
        yield
        return
    check_sharing(cluster)
    world = ClusterWorld(cluster)
    try:
        with use_world(world):
            yield
    finally:
        if world.actors is not None:
            world.actors.close()


def _actors(cluster: Cluster) -> SetActors:
    from distset.cluster.set_actors import SetActors

    return SetActors(
        cluster.actors,
        num_cpus=cluster.actor_cpus,
        num_gpus=cluster.actor_gpus,
        resources=cluster.actor_resources,
        threads=max(1, int(cluster.actor_cpus)),
        start_seconds=START_SECONDS + cluster.wait_seconds,
        group=_reserved(cluster),
    )


def _reserved(cluster: Cluster) -> Any:
    """The placement group of a process without workers where it has a place for each actor: a trial reserves them."""
    from ray.util.placement_group import get_current_placement_group

    group = None if cluster.workers else get_current_placement_group()  # a worker's holds the places of other workers
    places = [] if group is None else group.bundle_specs[1:]  # the first is this process's own
    return group if places.count(actor_bundle(cluster)) >= cluster.actors else None
