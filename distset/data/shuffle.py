"""Rows in a seeded random order, for sets that do not fit in memory: through scratch files, bucket by bucket."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from distset.files import naming_full_disk

__all__ = ["Streamed"]

BUCKET_BYTES = 64 * 2**20


class Streamed:
    """The elements of a `Bag` that come block by block, and are wanted in an order that is known before.

    `prepare` reads them once and writes each to the bucket in which the order has it; a bucket is a run of places in the
    order that fits in memory. Rows of a bucket arrive as the source has them, so where each belongs follows from the order
    alone. Memory is that of a block, a bucket and a number a row.

    Args:
        blocks: gives all rows in the order of the source, as arrays ``(n, *shape)``, anew each time it is called.
        size: rows in all.
        dtype, shape: of a row.
    """

    def __init__(
        self, blocks: Callable[[], Iterable[np.ndarray]], size: int, dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        self._blocks, self._size, self.dtype, self.shape = blocks, size, np.dtype(dtype), (size, *shape)
        self._width = self.dtype.itemsize * int(np.prod(shape))
        self._order = np.empty(0, np.int64)
        self._bucket_rows, self._loaded, self._next, self._bucket = 0, -1, 0, np.empty(0, np.uint8)

    def __len__(self) -> int:
        return self._size

    def prepare(self, order: np.ndarray, group_rows: int) -> None:
        """Write the rows to their buckets; from now on ``self[positions]`` gives runs of ``order``, one after another."""
        self._order, self._next, self._loaded = order, 0, -1
        self._bucket_rows = group_rows * max(1, BUCKET_BYTES // (self._width * group_rows))
        bucket_of = np.empty(self._size, np.int32)
        bucket_of[order] = np.arange(self._size) // self._bucket_rows
        cursors = np.arange(-(-self._size // self._bucket_rows)) * self._bucket_rows  # in rows
        self._scratch = tempfile.TemporaryFile()  # noqa: SIM115  # it goes with the object
        start = 0
        with naming_full_disk(Path(tempfile.gettempdir())):
            for block in self._blocks():
                start = self._scatter(np.ascontiguousarray(block, self.dtype), bucket_of, cursors, start)
        if start != self._size:
            raise ValueError(f"has {start:,} rows where it said {self._size:,}; it changed while it was read")

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        place, self._next = self._next, self._next + len(positions)
        assert np.array_equal(self._order[place : self._next], positions), "asked for as prepared, from the first on"
        bucket = place // self._bucket_rows
        if bucket != self._loaded:
            self._bucket, self._loaded = self._load(bucket), bucket
        within = place - bucket * self._bucket_rows
        rows = self._bucket[within : within + len(positions)]
        return rows.view(self.dtype).reshape(len(positions), *self.shape[1:])

    def _scatter(self, block: np.ndarray, bucket_of: np.ndarray, cursors: np.ndarray, start: int) -> int:
        buckets = bucket_of[start : start + len(block)]
        if len(buckets) < len(block):
            return start + len(block)
        by_bucket = np.argsort(buckets, kind="stable")
        raw = block.reshape(len(block), -1).view(np.uint8)[by_bucket]
        found, firsts = np.unique(buckets[by_bucket], return_index=True)
        for bucket, rows in zip(found, np.split(raw, firsts[1:])):
            _write(self._scratch.fileno(), rows, int(cursors[bucket]) * self._width)
            cursors[bucket] += len(rows)
        return start + len(block)

    def _load(self, bucket: int) -> np.ndarray:
        """A bucket's rows ``(n, bytes)`` in the order: they were written in that of their positions."""
        places = self._order[bucket * self._bucket_rows : (bucket + 1) * self._bucket_rows]
        raw = np.empty((len(places), self._width), np.uint8)
        _read(self._scratch.fileno(), raw, bucket * self._bucket_rows * self._width)
        rank = np.empty(len(places), np.int64)
        rank[np.argsort(places)] = np.arange(len(places))
        return raw[rank]


def _write(descriptor: int, rows: np.ndarray, offset: int) -> None:
    left = memoryview(np.ascontiguousarray(rows)).cast("B")  # type: ignore[arg-type]  # an array is a buffer
    while len(left):
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def _read(descriptor: int, rows: np.ndarray, offset: int) -> None:
    left = memoryview(rows).cast("B")  # type: ignore[arg-type]
    while len(left):
        done = os.preadv(descriptor, [left], offset)
        left, offset = left[done:], offset + done
