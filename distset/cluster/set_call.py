"""One call's pieces on their way to the actors and back: dealt out, taken over from the silent, redone for the dead."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from distset.cluster.set_actor import Piece, Task
from distset.cluster.wire import Failure, Packed

if TYPE_CHECKING:
    from distset.cluster.set_actors import SetActors

__all__ = ["LOST", "Call"]

LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError)
"""What ``ray.get`` raises where an actor, or the node that held its answer, is gone: the work has to be done again."""


class _Flight(NamedTuple):
    piece: int
    member: int
    actor: Any
    since: float


class Call:
    """One call's pieces on their way: dealt to their owners first, to whoever is idle after that."""

    TICK = 0.5  # seconds between looks at who has become silent
    PATIENCE = 2.0  # seconds of silence that are always forgiven

    def __init__(self, crew: SetActors, refs: list[Any], task: Task, pieces: Sequence[Piece], ahead: int) -> None:
        self.crew, self.refs, self.task, self.pieces, self.ahead = crew, refs, task, pieces, ahead
        owners = [number * crew.count // len(pieces) for number in range(len(pieces))]
        self.waiting = [deque(n for n, owner in enumerate(owners) if owner == i) for i in range(crew.count)]
        self.flying: dict[Any, _Flight] = {}
        self.done: dict[int, Packed] = {}
        self.lost: Counter[int] = Counter()
        self.heard = [time.monotonic()] * crew.count  # when each last answered
        self.slowest: float | None = None

    def __iter__(self) -> Iterator[Packed]:
        try:
            for number in range(len(self.pieces)):
                while number not in self.done:
                    self._deal(number + self.ahead)
                    self._receive()
                packed = self.done[number]
                self.done[number] = None  # type: ignore[assignment]  # given away, but still known to be done
                yield packed
        finally:
            if self.crew.members:  # they may have been closed while this waited to be asked
                for ref, flight in self.flying.items():
                    self.crew.members[flight.member].stale.append(ref)

    def _deal(self, limit: int) -> None:
        """Give pieces below ``limit`` to actors that have room."""
        load = Counter(flight.member for flight in self.flying.values())
        for number in range(self.crew.count):
            while load[number] < self.crew.in_flight and self.crew.usable(number):
                piece = self._next(number, limit)
                if piece is None:
                    break
                self._send(piece, number)
                load[number] += 1

    def _next(self, member: int, limit: int) -> int | None:
        own, fullest = self.waiting[member], max(self.waiting, key=len)
        if own and own[0] < limit:
            return own.popleft()
        if fullest and fullest[-1] < limit:
            return fullest.pop()
        first = min((queue for queue in self.waiting if queue), key=lambda queue: queue[0], default=None)
        return first.popleft() if first and first[0] < limit else None

    def _send(self, piece: int, member: int) -> None:
        actor = self.crew.members[member].actor
        ref = actor.work.remote(self.refs, self.task, self.pieces[piece])
        self.flying[ref] = _Flight(piece, member, actor, time.monotonic())
        self.crew.traffic = self.crew.traffic.add(calls=1)

    def _receive(self) -> None:
        if not self.flying:
            self._wait_for_an_actor()
            return
        arrived, _ = ray.wait(list(self.flying), timeout=self.TICK)
        for ref in arrived:
            flight = self.flying.pop(ref)
            try:
                self._take(flight, ray.get(ref))
            except LOST as error:
                self._redo(flight, error)
        if not arrived:
            self._take_over()

    def _take(self, flight: _Flight, answer: Packed | Failure) -> None:
        now = time.monotonic()
        took = now - max(flight.since, self.heard[flight.member])
        self.heard[flight.member], self.slowest = now, max(took, self.slowest or 0.0)
        if isinstance(answer, Failure):
            answer.throw()
        assert isinstance(answer, Packed)
        self.crew.traffic = self.crew.traffic.add(up=answer.nbytes)
        if flight.piece not in self.done:
            self.done[flight.piece] = answer

    def _redo(self, flight: _Flight, error: Exception) -> None:
        self.lost[flight.piece] += 1
        if self.lost[flight.piece] > self.crew.retries:
            ids = self.pieces[flight.piece].ids
            raise RuntimeError(
                f"actors: the one working on chunks {ids[0]} to {ids[-1]} was lost {self.lost[flight.piece]} times; see its "
                f"log, its memory above all: smaller chunks (chunk_size) need less"
            ) from error
        self.crew.replace(flight.member, flight.actor)
        if flight.piece not in self.done:
            self.waiting[flight.member].appendleft(flight.piece)

    def _take_over(self) -> None:
        """Give what a silent actor has to idle ones as well."""
        if self.slowest is None:
            return
        now, patience = time.monotonic(), self.PATIENCE + 3 * self.slowest
        flights = sorted(self.flying.values(), key=lambda flight: flight.piece)
        copies, busy = Counter(flight.piece for flight in flights), {flight.member for flight in flights}
        late = [
            flight.piece for flight in flights
            if copies[flight.piece] == 1 and flight.piece not in self.done
            and now - max(flight.since, self.heard[flight.member]) > patience
        ]  # fmt: skip
        idle = [number for number in range(self.crew.count) if number not in busy and self.crew.usable(number)]
        for piece, member in zip(late, idle):
            self._send(piece, member)

    def _wait_for_an_actor(self) -> None:
        if any(self.crew.usable(number) for number in range(self.crew.count)):
            return
        starting = [member.ready for member in self.crew.members if not member.checked]
        stale = [ref for member in self.crew.members for ref in member.stale]
        seconds = self.crew.start_seconds if starting else None  # what is only busy will answer
        if not ray.wait(starting + stale, timeout=seconds)[0]:
            raise ValueError(self.crew.lack(len(starting)))
