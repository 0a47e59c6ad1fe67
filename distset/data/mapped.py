"""The rows of a set as they lie in its file: views of row groups that are mapped one at a time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["MappedRows"]

COPIED_BYTES = 64 * 2**10


class MappedRows:
    """Rows of fixed size in blocks of a file; a context manager around the open file.

    A block is mapped when a row of it is asked for and unmapped with the last tensor that looks at it. The mapping is
    private and writable: an operation in place changes the tensor, never the file. A block of a few pages is copied: that
    is cheaper than a mapping, and puts it where a tensor would be.

    Args:
        file: holds the blocks.
        offsets: where each block begins.
        group_rows: rows of a block, of all but the last one.
        size: rows in all.
        dtype, shape: of a row.
    """

    def __init__(
        self,
        file: str | Path,
        offsets: Sequence[int],
        group_rows: int,
        size: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
    ) -> None:
        self._file, self._offsets, self._group_rows, self._size = file, offsets, group_rows, size
        self._dtype, self._shape = dtype, shape
        self._width = dtype.itemsize * torch.Size(shape).numel()
        self._mapped: tuple[int, Tensor] | None = None

    def __enter__(self) -> MappedRows:
        self._descriptor = os.open(self._file, os.O_RDONLY)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._descriptor)
        self._mapped = None

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``: a view of the file, a copy only where they span blocks."""
        parts = [self._block(number)[first:last] for number, first, last in self._under(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def announce(self, start: int, stop: int) -> None:
        """Tell the kernel to read rows from the disk, which it does while this process works on."""
        if hasattr(os, "posix_fadvise"):
            for number, first, last in self._under(start, stop):
                offset, length = self._offsets[number] + first * self._width, (last - first) * self._width
                os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def _under(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The blocks under rows ``start`` to ``stop``: (number, first row, end row within it)."""
        for number in range(start // self._group_rows, -(-stop // self._group_rows)):
            begin = number * self._group_rows
            yield number, max(start - begin, 0), min(stop - begin, self._group_rows)

    def _block(self, number: int) -> Tensor:
        """A whole block, mapped once while its rows are read one chunk after another: the kernel maps large pages."""
        if self._mapped is None or self._mapped[0] != number:
            rows = min(self._group_rows, self._size - number * self._group_rows)
            offset, length = self._offsets[number], rows * self._width
            raw = (_read_bytes if length <= COPIED_BYTES else _map_bytes)(self._descriptor, offset, length)
            if raw.data_ptr() % self._dtype.itemsize:  # a file whose writer could not align its rows
                raw = raw.clone()
            self._mapped = number, raw.view(self._dtype).view(rows, *self._shape)
        return self._mapped[1]


def _read_bytes(descriptor: int, offset: int, length: int) -> Tensor:
    raw = torch.empty(length, dtype=torch.uint8)
    found = os.preadv(descriptor, [raw.numpy()], offset)  # type: ignore[list-item]  # an array is a buffer
    assert found == length, "a store compares the sizes of its files when it is opened"
    return raw


def _map_bytes(descriptor: int, offset: int, length: int) -> Tensor:
    aligned = offset - offset % mmap.ALLOCATIONGRANULARITY
    skip = offset - aligned
    access = mmap.PROT_READ | mmap.PROT_WRITE
    window = mmap.mmap(descriptor, length + skip, flags=mmap.MAP_PRIVATE, prot=access, offset=aligned)
    return torch.frombuffer(window, dtype=torch.uint8, count=length, offset=skip)
