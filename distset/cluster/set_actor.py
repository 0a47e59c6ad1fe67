"""One actor that works on runs of chunks: it opens sets where it lives, and sends small things back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray
import torch
from ray import cloudpickle

from distset.cluster.wire import Failure, Packed, Tensors, pack, unpack
from distset.sets import ChunkedSet
from distset.states import merge_siblings
from distset.versions import installed

__all__ = ["FunctionPickler", "Piece", "SetActor", "Task"]


class Piece(NamedTuple):
    """A run of chunks of one call: the places ``start, start + 1, ...`` among those asked for, and their ids."""

    start: int
    ids: Sequence[int]


class Task(NamedTuple):
    """What to do with the chunks of a piece.

    Attributes:
        how: ``"map"``, ``"merge"`` or ``"sum"``.
        factor: so many chunks of the set count as one.
        sweeps: the places of arguments that are sweeps, whose encoders come apart.
    """

    how: str
    factor: int = 1
    sweeps: tuple[int, ...] = ()


class FunctionPickler(Tensors, cloudpickle.CloudPickler):
    """Also functions and classes of scripts, notebooks and tests."""


@ray.remote
class SetActor:
    """Holds the sets and encoders it used last, opened."""

    KEEP = {"set": 8, "job": 2, "encoder": 2}  # noqa: RUF012

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self.kept: dict[str, OrderedDict[Any, Any]] = {kind: OrderedDict() for kind in self.KEEP}

    def about(self) -> dict[str, str]:
        """Answered once the process is up."""
        return installed()

    def work(self, refs: list[Any], task: Task, piece: Piece) -> Packed | Failure:
        try:
            return self._work(refs, task, piece)
        except OSError as error:
            node = ray.util.get_node_ip_address()
            text = f"set: cannot be read on node {node} ({error}); every actor must see its files under the same path"
            return Failure.of(ValueError(text), f"a set actor of node {node}")
        except Exception as error:
            return Failure.of(error, f"a set actor of node {ray.util.get_node_ip_address()}", FunctionPickler)

    def _work(self, refs: list[Any], task: Task, piece: Piece) -> Packed:
        chunks = self._set(refs[0], task.factor)
        fn, args = self._object("job", refs[1])
        args = list(args)
        for place, ref in zip(task.sweeps, refs[2:]):
            args[place] = args[place]._replace(encoder=self._object("encoder", ref))
        if task.how == "sum":
            return pack(chunks.sum(fn, *args, ids=piece.ids), FunctionPickler)
        found = chunks.map(fn, *args, ids=piece.ids)
        if task.how == "merge":
            nodes = merge_siblings((0, piece.start + place, state) for place, state in enumerate(found))
            return pack(nodes, FunctionPickler)
        return pack(list(found), FunctionPickler)

    def _set(self, ref: Any, factor: int) -> ChunkedSet:
        whole = self._object("set", ref)
        return whole if factor == 1 else self._keep("set", (ref.hex(), factor), lambda: whole.coarser(factor))

    def _object(self, kind: str, ref: Any) -> Any:
        return self._keep(kind, ref.hex(), lambda: unpack(ray.get(ref), self.device))

    def _keep(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        kept = self.kept[kind]
        if key not in kept:
            kept[key] = make()
        kept.move_to_end(key)
        while len(kept) > self.KEEP[kind]:
            kept.popitem(last=False)
        return kept[key]
