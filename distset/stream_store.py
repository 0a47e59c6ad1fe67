"""Streams of many sets in a folder: what was acknowledged outlives the process, and several processes may share it.

``folder/<set>/<level>-<position>.safetensors`` is a node of the set's merge tree. Taking a chunk merges it with the siblings
that are there, publishes the one resulting file, and only then deletes what it absorbed; a node whose ancestor exists was
left by a process that died between the two, and does not count.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from distset.encoders.stream import Node, Place, Stream, climb, covered, fingerprint, state_tensors
from distset.files import draft_for, publish, write_atomically

__all__ = ["StreamStore", "Taken"]


class Taken(NamedTuple):
    """What a set has after a chunk was offered; ``new`` is False for one that it had."""

    new: bool
    chunks: int
    elements: int


class StreamStore:
    """The running encodings of many sets.

    Args:
        folder: of all sets; every process that shares it must see it.
        encoder: a `ChunkEncoder` in eval mode.
        element_shape: of the elements, such as ``(512,)``.
        seed: of the query.

    Raises:
        ValueError: where the folder holds states of an encoder of other weights.
    """

    def __init__(self, folder: str | Path, encoder: Any, element_shape: tuple[int, ...], seed: int = 0) -> None:
        self.folder, self.shape = Path(folder), tuple(element_shape)
        self.stream = Stream(encoder, element_ndim=len(self.shape), seed=seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark, weights = self.folder / "weights", f"{fingerprint(encoder)} {seed}\n"
        if not mark.exists():
            write_atomically(mark, weights)
        if mark.read_text() != weights:
            raise ValueError(f"folder: {folder} holds states of other weights; this model needs a folder of its own")

    def take(self, set_id: str, number: int, elements: Tensor) -> Taken:
        """Add a chunk to a set; when this returns, it is on disk.

        Raises:
            ValueError: for elements of another shape, none, or not finite; a negative number; an empty set id.
        """
        self._check(set_id, number, elements)
        if covered(self.places(set_id), (0, number)):
            return self._taken(set_id, new=False)
        state = self.stream.state_of(elements, number)
        path = self._path(set_id)
        with _locked(path):
            known = self.places(set_id)
            if new := not covered(known, (0, number)):
                self._insert(path, known, (0, number), Node(state, len(elements)))
        return self._taken(set_id, new)

    def value(self, set_id: str) -> tuple[Any, Taken]:
        """The encoding of a set so far, and what it is of.

        Raises:
            KeyError: for a set that is not there.
        """
        path = self._path(set_id)
        if not path.is_dir():
            raise KeyError(set_id)
        own = Stream(self.stream.encoder, element_ndim=len(self.shape), seed=self.stream.seed)
        with _locked(path):
            for place in self.places(set_id):
                own.nodes[place] = self._read(path, place)
        if not own.nodes:
            raise KeyError(set_id)
        with torch.no_grad():
            return own.value(), Taken(False, own.num_chunks, len(own))

    def drop(self, set_id: str) -> bool:
        """Forget a set; whether it was there."""
        path = self._path(set_id)
        there = path.is_dir()
        shutil.rmtree(path, ignore_errors=True)
        return there

    def expire(self, idle_seconds: float) -> list[str]:
        """Forget sets that got nothing for so long; returns their ids."""
        gone = []
        for path in self.folder.iterdir():
            if path.is_dir() and time.time() - path.stat().st_mtime > idle_seconds:
                gone.append(unquote(path.name))
                shutil.rmtree(path, ignore_errors=True)
        return gone

    def places(self, set_id: str) -> list[Place]:
        """The nodes that a set has; those that an ancestor covers do not count."""
        path = self._path(set_id)
        names = [file.stem.split("-") for file in path.glob("*.safetensors")] if path.is_dir() else []
        found = {(int(level), int(position)) for level, position in names}
        return sorted(p for p in found if not covered(found - {p}, p))

    def _insert(self, path: Path, known: list[Place], place: Place, node: Node) -> None:
        absorbed: list[Place] = []

        def take(sibling: Place) -> Node | None:
            if sibling not in known:
                return None
            absorbed.append(sibling)
            return self._read(path, sibling)

        self._write(path, *climb(place, node, take))
        for sibling in absorbed:
            _file(path, sibling).unlink(missing_ok=True)

    def _write(self, path: Path, place: Place, node: Node) -> None:
        from safetensors.torch import save_file

        draft = draft_for(_file(path, place))
        tensors = {f"{i:04}": tensor.contiguous().cpu() for i, tensor in enumerate(state_tensors(node.state))}
        save_file(tensors, draft, metadata={"elements": str(node.elements)})
        publish(draft, _file(path, place))

    def _read(self, path: Path, place: Place) -> Node:
        from safetensors import safe_open

        with safe_open(str(_file(path, place)), framework="pt") as file:
            tensors = [file.get_tensor(name) for name in sorted(file.keys())]
            return Node(self.stream.rebuild(list(self.shape), tensors), int(file.metadata()["elements"]))

    def _taken(self, set_id: str, new: bool) -> Taken:
        from safetensors import safe_open

        path, chunks, elements = self._path(set_id), 0, 0
        with _locked(path):
            for place in self.places(set_id):
                with safe_open(str(_file(path, place)), framework="pt") as file:
                    elements += int(file.metadata()["elements"])
                chunks += 1 << place[0]
        return Taken(new, chunks, elements)

    def _path(self, set_id: str) -> Path:
        return self.folder / quote(set_id, safe="")

    def _check(self, set_id: str, number: int, elements: Tensor) -> None:
        if not set_id or set_id.startswith("."):
            raise ValueError(f"set: got the id {set_id!r}, wanted a name that does not start with a dot")
        if number < 0:
            raise ValueError(f"number: got {number}, wanted a chunk number from 0")
        if tuple(elements.shape[1:]) != self.shape:
            raise ValueError(f"elements: got shape {tuple(elements.shape)}, wanted (N, {', '.join(map(str, self.shape))})")


def _file(path: Path, place: Place) -> Path:
    return path / f"{place[0]}-{place[1]}.safetensors"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
