"""The processes that train together, and where they put a set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distset.sets import ChunkedSet

__all__ = ["World", "current_world", "use_world"]

_CURRENT: ContextVar[World | None] = ContextVar("world", default=None)


class World:
    """The processes that train together: torch.distributed's default group, or this process alone.

    Args:
        team: so many successive ranks work on the same sets, and on each set together (set parallelism); a batch is shared
            out to the teams (data parallelism). One rank a team is data parallelism alone.

    Attributes:
        rank, size: of this process; processes in all.
        team: ranks a team.
        part, parts: the number of this process's team; teams in all.

    Raises:
        ValueError: where ``team`` does not divide the processes.
    """

    def __init__(self, team: int = 1) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        if team < 1 or self.size % team:
            raise ValueError(
                f"cluster.set_parallel: got {team} workers a set, which do not divide the {self.size} workers of this run"
            )
        self.team, self.part, self.parts = team, self.rank // team, self.size // team

    def place(self, set: ChunkedSet) -> ChunkedSet:
        """The set as this process's team, or its actors, work on it."""
        return set

    def step(self) -> AbstractContextManager[None]:
        """Open while sets are worked on with parameters that do not change."""
        return nullcontext()

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """The items of this process's team."""
        return items[self.part :: self.parts]

    def add_up(self, tensors: list[Tensor]) -> None:
        """Add the tensors up over all teams, in place, in one collective; those of a team's members are alike."""
        if self.size == 1:
            return
        widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([tensor.reshape(-1).to(widest) for tensor in tensors])
        # Over all ranks, and not over one of each team: whatever rounding told members apart, they go on as one.
        dist.all_reduce(flat)
        if self.team > 1:
            flat /= self.team
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))

    def gather(self, item: Any) -> list[Any]:
        """Everybody's item, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items


def current_world() -> World:
    """The world that `use_world` set, else a plain one."""
    return _CURRENT.get() or World()


@contextmanager
def use_world(world: World) -> Iterator[World]:
    """While this is open, training and prediction take place in ``world``."""
    token = _CURRENT.set(world)
    try:
        yield world
    finally:
        _CURRENT.reset(token)
