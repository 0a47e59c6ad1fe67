r"""`GroupSet`: a set whose chunks are shared by the ranks of a process group, each with its own contiguous run of them.

Every rank calls the same methods in the same order. Its states go up in one small collective (the few nodes of the merge
tree that its run holds whole), parameter gradients in one sum over the group; elements never move. All ranks get the same:

- a value has the bits of `InMemory`, for any number of ranks;
- a gradient is that of the whole set, *on every rank*, up to the rounding of the group's sum. What follows the state is
  computed by every rank alike. So the mean over ranks that `DistributedDataParallel` takes is the right one, without a
  factor: within a group a mean of equal gradients, between groups the mean over the batch.

Ranks beyond the number of chunks have nothing to do and get the same results. An error on one rank is raised on all of them.

Example (under torchrun, or in a Ray Train worker):
    >>> group = SetGroup.split(4)  # ranks 0 to 3 share each set, 4 to 7 another one  # doctest: +SKIP
    >>> bag = GroupSet(Store(path).open(ids[rank // 4], 8192), group)  # doctest: +SKIP
    >>> encode_set(encoder, bag, grad=Exact(), seed=step).sum().backward()  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distset.cluster.layout import MAP_ELEMENTS, runs, wanted_ids
from distset.cluster.wire import Failure, Traffic, dumps, loads
from distset.encode import Sweep
from distset.sets import ChunkedSet
from distset.states import merge_nodes, merge_siblings

__all__ = ["GroupSet", "SetGroup"]


class SetGroup:
    """Ranks that share sets, and their collectives.

    Args:
        group: a process group; the default one, of all ranks, if None. With NCCL, ranks have set their CUDA device.

    Attributes:
        rank, size: of this process in the group; of the group.
        traffic: bytes that this rank sent and received so far.

    Raises:
        ValueError: where torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group: torch.distributed is not initialised; call init_process_group first, or use torchrun")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        backend = dist.get_backend(group)  # such as gloo, nccl, cpu:gloo,cuda:nccl
        self._bytes_on = torch.device("cuda" if backend == "nccl" else "cpu")
        self._sums_on = torch.device("cuda" if "nccl" in backend else "cpu")
        self.traffic = Traffic()
        self._room = 65_536  # bytes of a rank's answer that one collective carries; alike on all ranks

    @classmethod
    def split(cls, size: int) -> SetGroup:
        """Cut all ranks into groups of ``size`` successive ones; returns this rank's. All ranks call it.

        Raises:
            ValueError: where ``size`` does not divide the number of ranks.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if size < 1 or world % size:
            raise ValueError(f"set_parallel: got {size} ranks a set, which do not divide the {world} ranks of this run")
        groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
        return cls(groups[dist.get_rank() // size])

    def exchange(self, work: Callable[[], Any], seed: int | None = None) -> list[Any]:
        """What each rank's ``work()`` returned, by rank; an error that one raised is raised by all.

        Args:
            seed: where given, ranks must agree on it.
        """
        try:
            mine = dumps((seed, work()))
        except Exception as error:
            mine = dumps((seed, Failure.of(error, f"rank {dist.get_rank()}")))
        answers = [loads(answer) for answer in self.gather(mine)]
        for _, answer in answers:
            if isinstance(answer, Failure):
                answer.throw()
        seeds = [seed for seed, _ in answers]
        if len(set(seeds)) > 1:
            raise ValueError(f"seed: the ranks that share a set drew different ones ({seeds}); pass encode_set(..., seed=)")
        return [answer for _, answer in answers]

    def gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, by rank, in one collective; in two where they are more than ever before."""
        while True:
            frame = torch.zeros(8 + self._room, dtype=torch.uint8)
            frame[:8] = torch.frombuffer(bytearray(len(mine).to_bytes(8, "big")), dtype=torch.uint8)
            fits = mine[: self._room]
            frame[8 : 8 + len(fits)] = torch.frombuffer(bytearray(fits), dtype=torch.uint8)
            frames = self._all_gather(frame)
            lengths = [int.from_bytes(bytes(each[:8]), "big") for each in frames]
            if max(lengths) <= self._room:
                return [each[8 : 8 + length].tobytes() for each, length in zip(frames, lengths)]
            self._room = 1 << (max(lengths) - 1).bit_length()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors up over the group, in place, in one collective for each type of number."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike]).to(self._sums_on)
            dist.all_reduce(flat, group=self.group)
            once = flat.nbytes * 2 * (self.size - 1) // self.size  # a ring's share
            self.traffic = self.traffic.add(once, once, 1)
            for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike])):
                tensor.copy_(part.view_as(tensor))

    def _all_gather(self, frame: Tensor) -> list[Any]:
        frame = frame.to(self._bytes_on)
        frames = [torch.empty_like(frame) for _ in range(self.size)]
        dist.all_gather(frames, frame, group=self.group)
        self.traffic = self.traffic.add((self.size - 1) * len(frame), (self.size - 1) * len(frame), 1)
        return [each.cpu().numpy() for each in frames]


class GroupSet(ChunkedSet):
    """A set that the ranks of a process group share; everything that takes a `ChunkedSet` takes this.

    Args:
        set: the same on all ranks; a stored one is only opened, and each rank reads its own run.
        group: who shares it; all ranks if None. Pass the same object for all sets of a program.
        local: a call that is about at most so many chunks is worked on by every rank alone, which gets the same bits
            without a word to the others: ``Sampled(1)`` replays its chunk so.

    Raises:
        ValueError: for a set that is none or shared already, ``local`` below 0.
    """

    def __init__(self, set: ChunkedSet, group: SetGroup | None = None, *, local: int = 1) -> None:
        if not isinstance(set, ChunkedSet) or isinstance(set, GroupSet):
            raise ValueError(f"set: got {type(set).__name__}, wanted a ChunkedSet that is not shared yet")
        if local < 0:
            raise ValueError(f"local: got {local}, wanted at least 0")
        self.set, self.group, self.local = set, SetGroup() if group is None else group, local
        self.name, self.batch_shape = set.name, set.batch_shape

    @property
    def sizes(self) -> Sequence[int]:
        return self.set.sizes

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank sent and received so far, for all sets of its group."""
        return self.group.traffic

    def map(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Iterator[Any]:
        wanted = wanted_ids(self.num_chunks, ids)
        if len(wanted) <= self.local:
            return self.set.map(fn, *args, ids=ids)
        return self._map(fn, args, wanted)

    def merge(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Any:
        wanted = wanted_ids(self.num_chunks, ids)
        if len(wanted) <= self.local:
            return self.set.merge(fn, *args, ids=ids)
        run = runs(len(wanted), self.group.size)[self.group.rank]

        def nodes() -> list[Any]:
            states = self.set.map(fn, *args, ids=wanted[run.start : run.stop])
            return merge_siblings((0, run.start + place, state) for place, state in enumerate(states))

        return merge_nodes(chain.from_iterable(self.group.exchange(nodes, _seed(args))))

    def sum(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> list[Tensor | None]:
        wanted = wanted_ids(self.num_chunks, ids)
        if len(wanted) <= self.local:
            return self.set.sum(fn, *args, ids=ids)
        run = runs(len(wanted), self.group.size)[self.group.rank]
        mine: list[Tensor | None] = []

        def shapes() -> list[Any]:
            if run:
                mine.extend(self.set.sum(fn, *args, ids=wanted[run.start : run.stop]))
            return [None if part is None else (part.shape, part.dtype, part.device) for part in mine]

        return self._added(mine, self.group.exchange(shapes, _seed(args)))

    def coarser(self, factor: int) -> GroupSet:
        return GroupSet(self.set.coarser(factor), self.group, local=self.local)

    def _added(self, mine: list[Tensor | None], shapes: list[list[Any]]) -> list[Tensor | None]:
        """The sum over the group of what each has; None where nobody has anything."""
        length = max(map(len, shapes))
        mine = mine or [None] * length
        total: list[Tensor | None] = []
        for place, part in enumerate(mine):
            like = next((theirs[place] for theirs in shapes if theirs and theirs[place] is not None), None)
            if part is None and like is not None:
                shape, dtype, device = like
                part = torch.zeros(shape, dtype=dtype, device=device)
            total.append(None if part is None else part.contiguous())  # one that is expanded cannot be added to
        self.group.add_up([part for part in total if part is not None])
        return total

    def _map(self, fn: Callable[..., Any], args: Any, wanted: Sequence[int]) -> Iterator[Any]:
        """In rounds: each rank works on a piece, all get the results, in order."""
        length = max(1, MAP_ELEMENTS // max(self.sizes))
        for start in range(0, len(wanted), length * self.group.size):
            first = start + self.group.rank * length
            piece = wanted[first : first + length]
            yield from chain.from_iterable(
                self.group.exchange(lambda piece=piece: list(self.set.map(fn, *args, ids=piece)), _seed(args))  # type: ignore[misc]
            )


def _seed(args: Sequence[Any]) -> int | None:
    return next((arg.seed for arg in args if isinstance(arg, Sweep)), None)
