r"""`RaySet`: a set whose chunks are worked on by Ray actors, each with its own contiguous run of them.

Parameters go down as one object for all actors; an actor sends up the few nodes of the merge tree that its run holds whole.
Then cotangents go down, and parameter gradients come up. Elements do not travel: an actor opens the set itself (a stored set
maps its own row groups). Bytes on the wire do not grow with the set:

.. math:: \text{down} = P + Q + S + C, \qquad \text{up} \le \text{slices}\,(12\,S + P + Q),

with P the bytes of the parameters, Q of the query, S of a state and C of its cotangents.

Values have the bits of `InMemory` for any number of actors, whoever computed what: states are merged in the tree that the
chunks' places fix. A gradient is added up slice by slice, and a slice chunk by chunk, so it has the same bits for the same
number of slices, and differs by rounding otherwise.

With ``Sampled`` this is UMBC's shape on a cluster: actors sweep all chunks without a graph, and the sampled chunk, of which
there are at most ``local``, is replayed where the trainer (and its GPU) is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from distset.cluster.layout import MAP_ELEMENTS, runs, wanted_ids
from distset.cluster.set_actor import Piece, Task
from distset.cluster.set_actors import SetActors
from distset.cluster.wire import Traffic
from distset.sets import ChunkedSet, added
from distset.states import merge_nodes

__all__ = ["RaySet"]

COARSE_ELEMENTS = 65_536  # a CPU actor's chunk, however large a GPU beside the caller would like it


class RaySet(ChunkedSet):
    """A set on Ray actors; everything that takes a `ChunkedSet` takes this.

    Args:
        set: any `ChunkedSet` that can be pickled. A stored one travels as its name and borders; one in memory with all its
            elements, once to each machine.
        actors: how many to start for this set, or a `SetActors` that several sets share.
        local: a call that names at most so many chunks (``ids``), and a set of so few, is worked on in this process.
        slices: pieces in which runs are given out, and the layout that fixes a gradient's bits; 4 an actor if None. Each
            sends a gradient up: fewer for very large models.

    Raises:
        ValueError: for a set that is none, or already on actors; numbers out of range.

    Example (with a Ray cluster):
        ``encode_set(encoder, RaySet(Store(path).open("slide-3", 8192), actors=8), grad=Sampled(1))``
    """

    def __init__(self, set: ChunkedSet, actors: int | SetActors = 2, *, local: int = 1, slices: int | None = None) -> None:
        if not isinstance(set, ChunkedSet) or isinstance(set, RaySet):
            raise ValueError(f"set: got {type(set).__name__}, wanted a ChunkedSet that is not on actors yet")
        if local < 0 or (slices is not None and slices < 1):
            raise ValueError(f"local, slices: got {local} and {slices}, wanted at least 0 and at least 1")
        self.set, self.local = set, local
        self.actors = SetActors(actors) if isinstance(actors, int) else actors
        self.slices = 4 * self.actors.count if slices is None else slices
        self.name, self.batch_shape = set.name, set.batch_shape
        self._factor, self._whole, self._ref = 1, self, None
        self._coarse: dict[int, RaySet] = {}

    @property
    def sizes(self) -> Sequence[int]:
        return self.set.sizes

    @property
    def traffic(self) -> Traffic:
        """Bytes to and from the actors so far, of all sets that share them."""
        return self.actors.traffic

    def map(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Iterator[Any]:
        wanted = wanted_ids(self.num_chunks, ids)
        if len(wanted) <= self.local:
            return self.set.map(fn, *args, ids=ids)
        length = max(1, MAP_ELEMENTS // max(self.sizes))
        pieces = [Piece(start, wanted[start : start + length]) for start in range(0, len(wanted), length)]
        ahead = self.actors.count * self.actors.in_flight
        return chain.from_iterable(self._run("map", fn, args, pieces, ahead))

    def merge(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Any:
        wanted = wanted_ids(self.num_chunks, ids)
        if len(wanted) <= self.local:
            return self.set.merge(fn, *args, ids=ids)
        pieces = self._slices(wanted)
        return merge_nodes(chain.from_iterable(self._run("merge", fn, args, pieces, len(pieces))))

    def sum(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> list[Tensor | None]:
        wanted = wanted_ids(self.num_chunks, ids)
        if len(wanted) <= self.local:
            return self.set.sum(fn, *args, ids=ids)
        pieces = self._slices(wanted)
        return added(self._run("sum", fn, args, pieces, len(pieces)))

    def coarser(self, factor: int) -> RaySet:
        if not self.actors.num_gpus:
            while factor > 1 and factor * max(self.sizes) > COARSE_ELEMENTS:
                factor //= 2
        if factor not in self._coarse:
            coarse = self._coarse[factor] = RaySet(
                self.set.coarser(factor), self.actors, local=self.local, slices=self.slices
            )
            coarse._factor, coarse._whole = self._factor * factor, self._whole
        return self._coarse[factor]

    def close(self) -> None:
        """Stop the actors; those of a shared `SetActors` too."""
        self.actors.close()
        self._whole._ref = None

    def __enter__(self) -> RaySet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_coarse": {}, "_ref": None}

    def _run(self, how: str, fn: Any, args: Any, pieces: Sequence[Piece], ahead: int) -> Iterator[Any]:
        whole = self._whole
        if whole._ref is None:
            whole._ref = self.actors.put(whole.set)
        return self.actors.run(Task(how, self._factor), whole._ref, fn, args, pieces, ahead)

    def _slices(self, wanted: Sequence[int]) -> list[Piece]:
        return [Piece(run.start, wanted[run.start : run.stop]) for run in runs(len(wanted), self.slices) if run]
