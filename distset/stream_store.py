"""Streams of many sets in a folder: what was acknowledged outlives the process, and several processes may share it.

``folder/sets/<set>/<level>-<position>.safetensors`` is a node of the set's merge tree. Taking a chunk merges it with the
siblings that are there, publishes the one resulting file, and only then deletes what it absorbed; a node whose ancestor
exists was left by a process that died between the two, and does not count. Who reads or changes a set holds the lock in
its folder. A set is forgotten by moving its folder to ``folder/dropped`` under that lock, and deleting it there.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote, unquote
from uuid import uuid4

from torch import Tensor

from distset.encoders.stream import Node, Place, Stream, climb, covered, fingerprint, like_of, state_tensors
from distset.files import draft_for, publish, write_atomically

__all__ = ["StreamStore", "Taken"]

LONGEST = 200
"""Bytes of a quoted set id, which names a folder: file systems allow 255."""


class Taken(NamedTuple):
    """What a set has after a chunk was offered; ``new`` is False for one that it had."""

    new: bool
    chunks: int
    elements: int


class StreamStore:
    """The running encodings of many sets.

    A set id is any text that does not start with a dot and has at most 200 bytes once it is quoted as in a URL; all methods
    raise ValueError for others.

    Args:
        folder: of all sets; every process that shares it must see it.
        encoder: a `ChunkEncoder` in eval mode.
        element_shape: of the elements, such as ``(512,)``.
        seed: of the query.

    Raises:
        ValueError: where the folder holds states of an encoder of other weights or settings.

    Example:
        >>> import tempfile, torch
        >>> from distset import DeepSets
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = StreamStore(folder, DeepSets(pool="sum"), (2,))
        ...     print(store.take("slide/7", 1, torch.ones(3, 2)))
        ...     print(store.take("slide/7", 1, torch.ones(3, 2)))  # a client that got no answer sends again
        ...     print(store.value("slide/7"), store.drop("slide/7"))
        Taken(new=True, chunks=1, elements=3)
        Taken(new=False, chunks=1, elements=3)
        (tensor([3., 3.]), Taken(new=False, chunks=1, elements=3)) True
    """

    def __init__(self, folder: str | Path, encoder: Any, element_shape: tuple[int, ...], seed: int = 0) -> None:
        self.folder, self.shape = Path(folder), tuple(element_shape)
        self.stream = Stream(encoder, element_ndim=len(self.shape), seed=seed)
        self.sets, self.dropped = self.folder / "sets", self.folder / "dropped"
        for path in (self.sets, self.dropped):
            path.mkdir(parents=True, exist_ok=True)
        mark, weights = self.folder / "weights", f"{fingerprint(encoder)} {seed}\n"
        if not mark.exists():
            write_atomically(mark, weights)
        if mark.read_text() != weights:
            raise ValueError(
                f"folder: {folder} holds states of other weights or settings, or of an earlier version of distset; this "
                "model needs a folder of its own"
            )

    def take(self, set_id: str, number: int, elements: Tensor) -> Taken:
        """Add a chunk to a set; when this returns, it is on disk.

        Raises:
            ValueError: for elements of another shape, none, or not finite; a negative number; a set id that cannot be.
        """
        path = self._path(set_id)
        self._check(number, elements)
        with _locked(path) as there:
            if there and covered(_places(path), (0, number)):
                return _taken(path, new=False)
        state = self.stream.state_of(elements, number)
        with _locked(path, make=True):
            known = _places(path)
            if new := not covered(known, (0, number)):
                self._insert(path, known, (0, number), Node(state, len(elements)), like_of(elements))
            return _taken(path, new)

    def value(self, set_id: str) -> tuple[Any, Taken]:
        """The encoding of a set so far, and what it is of.

        Raises:
            KeyError: for a set that is not there.
        """
        path = self._path(set_id)
        own = Stream(self.stream.encoder, element_ndim=len(self.shape), seed=self.stream.seed)
        with _locked(path) as there:
            for place in _places(path) if there else ():
                own.nodes[place] = self._read(path, place)
        if not own.nodes:
            raise KeyError(set_id)
        return own.value(), Taken(False, own.num_chunks, len(own))

    def drop(self, set_id: str) -> bool:
        """Forget a set; whether it was there."""
        return self._forget(self._path(set_id))

    def expire(self, idle_seconds: float) -> list[str]:
        """Forget sets that got nothing for so long; returns their ids."""
        return [unquote(path.name) for path in list(self.sets.iterdir()) if self._forget(path, idle_seconds)]

    def places(self, set_id: str) -> list[Place]:
        """The nodes that a set has; those that an ancestor covers do not count."""
        return _places(self._path(set_id))

    def _forget(self, path: Path, idle_seconds: float = -math.inf) -> bool:
        if time.time() - _last_change(path) <= idle_seconds:
            return False
        with _locked(path) as there:
            if not there or time.time() - _last_change(path) <= idle_seconds:  # a chunk came while we waited
                return False
            path.rename(self.dropped / uuid4().hex)
        for left in self.dropped.iterdir():  # those of a process that died here, too
            shutil.rmtree(left, ignore_errors=True)
        return True

    def _insert(self, path: Path, known: list[Place], place: Place, node: Node, like: Tensor) -> None:
        absorbed: list[Place] = []

        def take(sibling: Place) -> Node | None:
            if sibling not in known:
                return None
            absorbed.append(sibling)
            return self._read(path, sibling)

        _write(path, *climb(place, node, take), like)
        for sibling in absorbed:
            _file(path, sibling).unlink(missing_ok=True)

    def _read(self, path: Path, place: Place) -> Node:
        from safetensors import safe_open

        with safe_open(str(_file(path, place)), framework="pt") as file:
            *fields, like = (file.get_tensor(name) for name in sorted(file.keys()))
            return Node(self.stream.rebuild(fields, like), int(file.metadata()["elements"]))

    def _path(self, set_id: str) -> Path:
        if not set_id or set_id.startswith("."):
            raise ValueError(f"set: got the id {set_id!r}, wanted a name that does not start with a dot")
        name = quote(set_id, safe="")
        if len(name) > LONGEST:
            raise ValueError(
                f"set: got the id {set_id[:20]!r}... of {len(name)} bytes quoted as in a URL, wanted at most {LONGEST}; "
                f"shorten it, or take a digest of it"
            )
        return self.sets / name

    def _check(self, number: int, elements: Tensor) -> None:
        if number < 0:
            raise ValueError(f"number: got {number}, wanted a chunk number from 0")
        if tuple(elements.shape[1:]) != self.shape:
            raise ValueError(f"elements: got shape {tuple(elements.shape)}, wanted (N, {', '.join(map(str, self.shape))})")


def _file(path: Path, place: Place) -> Path:
    return path / f"{place[0]}-{place[1]}.safetensors"


def _places(path: Path) -> list[Place]:
    names = [file.stem.split("-") for file in path.glob("*.safetensors")] if path.is_dir() else []
    found = {(int(level), int(position)) for level, position in names}
    return sorted(p for p in found if not covered(found - {p}, p))


def _write(path: Path, place: Place, node: Node, like: Tensor) -> None:
    from safetensors.torch import save_file

    draft = draft_for(_file(path, place))
    tensors = {f"{i:04}": tensor.contiguous().cpu() for i, tensor in enumerate(state_tensors(node.state))}
    save_file({**tensors, "like": like.cpu()}, draft, metadata={"elements": str(node.elements)})
    publish(draft, _file(path, place))


def _taken(path: Path, new: bool) -> Taken:
    from safetensors import safe_open

    chunks, elements = 0, 0
    for place in _places(path):
        with safe_open(str(_file(path, place)), framework="pt") as file:
            elements += int(file.metadata()["elements"])
        chunks += 1 << place[0]
    return Taken(new, chunks, elements)


def _last_change(path: Path) -> float:
    """When a node of the set was written; never (-inf) where there is no such set."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return -math.inf


@contextmanager
def _locked(path: Path, *, make: bool = False) -> Iterator[bool]:
    """Hold the lock of a set's folder; yields whether there is one, which ``make`` sees to."""
    while (lock := _lock(path)) is None and (make or path.exists()):
        if make:
            path.mkdir(parents=True, exist_ok=True)
    if lock is None:
        yield False
    else:
        with lock:
            yield True


def _lock(path: Path) -> IO[str] | None:
    """The locked file of a folder; None where there is no folder, or it was moved away while we waited."""
    try:
        lock = (path / ".lock").open("w")
    except FileNotFoundError:
        return None
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if os.path.samestat(os.fstat(lock.fileno()), (path / ".lock").stat()):
            return lock
    except FileNotFoundError:
        pass
    lock.close()
    return None
