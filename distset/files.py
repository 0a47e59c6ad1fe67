"""Files that are there whole or not at all, and one writer a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["DiskFull", "draft_for", "naming_full_disk", "publish", "sole_writer", "whole_lines", "write_atomically"]


class DiskFull(ValueError):
    """There is no room left; the message says where, and what to do."""


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Raise what a full disk (or a used-up quota) makes of a write as a `DiskFull` that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"{folder}: no space is left on its disk ({error.strerror or error}); make room and start the same command "
            f"again: it goes on from what is whole"
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, then move it into place."""
    draft = draft_for(path)
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    publish(draft, path)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that is appended to, none where it is not there; a last one that was cut short does not count."""
    text = path.read_text() if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def draft_for(path: Path) -> Path:
    """A new file beside ``path``, named like nobody else's: a writer thought dead must not write into the same draft."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    os.fchmod(descriptor, 0o666 & ~_umask())  # as open() would have made it; mkstemp's is for its owner alone
    os.close(descriptor)
    return Path(name)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
