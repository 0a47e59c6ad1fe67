"""Files that are there whole or not at all, and one writer a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["publish", "sole_writer", "write_atomically"]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    publish(draft, path)


def publish(draft: Path, path: Path) -> None:
    """Flush the finished file ``draft`` to the disk and move it to ``path``: a kill leaves the old state or the new."""
    _flush(draft)
    os.replace(draft, path)
    _flush(path.parent)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when the process ends, however it ends.

    Raises:
        ValueError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder.parent}: another process is writing this store; wait for it, or stop it") from error
        yield


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
