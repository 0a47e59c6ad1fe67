"""Actors that several sets share: started, checked, watched, replaced."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn

from distset.cluster.set_actor import FunctionPickler, Piece, SetActor, Task
from distset.cluster.set_call import LOST, Call
from distset.cluster.wire import Traffic, device_of, pack, unpack
from distset.encode import Sweep
from distset.versions import differences, installed

__all__ = ["SetActors"]


class SetActors:
    """A crew of Ray actors that sets share; started when it is first needed.

    An actor that dies is replaced and its pieces are done again; while its successor waits for a machine the others go on. A
    piece of an actor that has become silent is given to an idle one as well, and whoever is first is heard.

    Args:
        count: actors.
        num_cpus, num_gpus: what each asks of the cluster; fractions and 0 are welcome. With a GPU, it computes there.
        resources: others it asks for, such as ``{"preemptible": 1}``, as the cluster names them.
        threads: of each; the bits of a value may depend on their number, so the caller's for the same bits as in memory.
        in_flight: pieces an actor may have waiting, so that it is never idle and never flooded.
        retries: how often a piece may be lost with its actor.
        start_seconds: how long to wait for actors to start before saying what is missing.
        group: a placement group that has a place for each; None for wherever there is room.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        count: int = 2,
        *,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        threads: int = 1,
        in_flight: int = 2,
        retries: int = 3,
        start_seconds: float = 60.0,
        group: PlacementGroup | None = None,
    ) -> None:
        given = (("count", count, 1), ("num_cpus", num_cpus, 0), ("num_gpus", num_gpus, 0), ("threads", threads, 1))
        for name, value, least in (*given, ("in_flight", in_flight, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"{name}: got {value}, wanted at least {least}")
        self.count, self.num_cpus, self.num_gpus, self.threads = count, num_cpus, num_gpus, threads
        self.resources, self.in_flight = dict(resources or {}), in_flight
        self.retries, self.start_seconds, self.group = retries, start_seconds, group
        self.traffic = Traffic()
        self.members: list[Member] = []
        self._sent: OrderedDict[int, tuple[nn.Module, Sweep, Any]] = OrderedDict()
        self._unchanged = False

    def start(self) -> None:
        """Start the actors that are not there yet, and wait for all of them.

        Raises:
            ValueError: where the cluster has no room for them (says what is missing); where one runs other versions than
                this process.
            RuntimeError: where one dies while it starts.
        """
        if self.members:
            return
        self.members = [Member(self._new()) for _ in range(self.count)]
        waiting = [member.ready for member in self.members]
        _, missing = ray.wait(waiting, num_returns=self.count, timeout=self.start_seconds)
        try:
            if missing:
                raise ValueError(self.lack(len(missing)))
            for member in self.members:
                member.check()
        except LOST as error:
            self.close()
            raise RuntimeError(f"actors: a set actor died while it started: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the actors; a later call starts new ones."""
        if ray.is_initialized():
            for member in self.members:
                ray.kill(member.actor)
        self.members = []
        self._sent.clear()

    def __enter__(self) -> SetActors:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"members": [], "_sent": OrderedDict()}

    def put(self, tree: Any) -> Any:
        """One object for all actors."""
        packed = pack(tree, FunctionPickler)
        self.traffic = self.traffic.add(down=packed.nbytes)
        return ray.put(packed)

    def encoder_of(self, sweep: Sweep) -> Any:
        """The sweep's encoder as an object; the same one for the sweep forward and the replay backward."""
        encoder, at, ref = self._sent.get(id(sweep.encoder), (None, None, None))
        if encoder is not sweep.encoder or not (self._unchanged or at is sweep):
            ref = self.put(sweep.encoder)
            self._sent[id(sweep.encoder)] = (sweep.encoder, sweep, ref)
            while len(self._sent) > 4:
                self._sent.popitem(last=False)
        return ref

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """While this is open no encoder changes (the sets of one training step), so that each is sent once."""
        self._sent.clear()
        self._unchanged = True
        try:
            yield
        finally:
            self._unchanged = False
            self._sent.clear()

    def run(
        self, task: Task, set_ref: Any, fn: Callable[..., Any], args: Sequence[Any], pieces: Sequence[Piece], ahead: int
    ) -> Iterator[Any]:
        """What the actors make of the pieces, in their order, none more than ``ahead`` places before it is asked for."""
        self.start()
        sweeps = {i: arg for i, arg in enumerate(args) if isinstance(arg, Sweep)}
        plain = [arg._replace(encoder=None) if i in sweeps else arg for i, arg in enumerate(args)]
        refs = [set_ref, self.put((fn, plain)), *(self.encoder_of(sweep) for sweep in sweeps.values())]
        device = device_of(list(args))
        for packed in Call(self, refs, task._replace(sweeps=tuple(sweeps)), pieces, ahead):
            yield unpack(packed, device)

    def usable(self, number: int) -> bool:
        """Whether an actor has started and is not still busy with what nobody waits for."""
        member = self.members[number]
        try:
            return member.usable()
        except LOST as error:  # it died before it was ready
            if member.attempt >= self.retries:
                raise RuntimeError(f"actors: set actor {number} died {member.attempt + 1} times while it started") from error
            self.replace(number, member.actor, member.attempt + 1)
            return False

    def replace(self, number: int, actor: Any, attempt: int = 0) -> None:
        """Put a new actor in the place of a dead one, unless that was done."""
        if self.members[number].actor is actor:
            warnings.warn(f"actors: set actor {number} died; a new one takes its place", stacklevel=2)
            ray.kill(actor)  # where it was only out of reach: its resources are its successor's
            self.members[number] = Member(self._new(), attempt)

    def _new(self) -> Any:
        # SPREAD, which also leaves the placement group of a training worker that starts actors of its own.
        where = "SPREAD" if self.group is None else PlacementGroupSchedulingStrategy(self.group)
        options = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "resources": self.resources}
        return SetActor.options(scheduling_strategy=where, **options).remote(self.threads)  # type: ignore[attr-defined]

    def lack(self, missing: int) -> str:
        """What the cluster lacks, as the text of an error."""
        wants = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        total, free = ray.cluster_resources(), ray.available_resources()
        each = " and ".join(f"{amount:g} {name}" for name, amount in wants.items() if amount)
        has = ", ".join(f"{total.get(n, 0):g} {n} ({free.get(n, 0):g} free now)" for n, amount in wants.items() if amount)
        return (
            f"actors: {missing} of {self.count} set actors did not start within {self.start_seconds:g} s; each asks for "
            f"{each or 'nothing'}, the cluster has {has or 'room'}; ask for fewer actors, or for less each, or add machines"
        )


class Member:
    """An actor's place in the crew."""

    def __init__(self, actor: Any, attempt: int = 0) -> None:
        self.actor, self.ready, self.attempt = actor, actor.about.remote(), attempt
        self.checked = False
        self.stale: list[Any] = []  # calls that nobody waits for any more

    def check(self) -> None:
        if other := differences(installed(), ray.get(self.ready)):
            raise ValueError(
                f"actors: a set actor has {', '.join(other)}, which this process has; results would differ, so install the "
                f"same versions on every node"
            )
        self.checked = True

    def usable(self) -> bool:
        if not self.checked and ray.wait([self.ready], timeout=0)[0]:
            self.check()
        if self.stale:
            self.stale = ray.wait(self.stale, num_returns=len(self.stale), timeout=0)[1]
        return self.checked and not self.stale
