"""Resources that a Ray Train run keeps after its driver was ended: found and given back while a search goes on.

Ray 2.60 reserves the workers' resources in the controller's name and keeps them until the whole job ends, unless its
``PlacementGroupCleaner`` learns of the controller's death, for which it asks the dashboard; a Ray of one's own has none. So
a trial that is stopped would leave the next one no room.
"""

from __future__ import annotations

import threading
from types import TracebackType

import ray
from ray._private.state import state  # no public function says whose a placement group is
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

__all__ = ["Tidy", "free_leftovers"]


def free_leftovers() -> int:
    """Give back what dead actors of this job had reserved; returns how many reservations."""
    table = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined]  # made by protobuf
    own, found = ray.get_runtime_context().get_job_id(), 0
    for packed in state._connect_and_get_accessor().get_placement_group_table():
        group = table.FromString(packed)
        if group.state == table.REMOVED or group.is_detached or group.creator_job_id.hex() != own:
            continue
        # What the driver itself reserved has no creating actor, and counts as a dead one's.
        if group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil():
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            found += 1
    return found


class Tidy:
    """Frees leftovers every now and then while the context is open, and when it closes.

    Args:
        enabled: whether there can be any.
    """

    INTERVAL = 1.0

    def __init__(self, *, enabled: bool) -> None:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True) if enabled else None

    def __enter__(self) -> Tidy:
        if self.thread is not None:
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.done.set()
        if self.thread is not None:
            self.thread.join(timeout=10)

    def _work(self) -> None:
        while not self.done.wait(self.INTERVAL):
            free_leftovers()
        threading.Event().wait(2 * self.INTERVAL)  # the last trial's driver may still be ending
        free_leftovers()
