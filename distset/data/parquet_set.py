"""A set on disk as a sequence of chunks: memory-mapped, read ahead, equal bit for bit to the same rows in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distset.data import schema
from distset.data.images import decode
from distset.data.mapped import MappedRows
from distset.data.schema import DTYPES
from distset.sets import Chunk, ChunkedSet, chunk_bounds
from distset.waiting import counted, page_in

__all__ = ["ParquetSet", "SetRecord"]

DECODERS = 4  # threads that decode images; Pillow decodes outside of the interpreter's lock


class SetRecord(NamedTuple):
    """One set's line in the index, and what its store says of all elements: all that reading it takes."""

    set_id: str
    case_id: str
    label: str | None
    n: int
    file: str
    first_row_group: int
    row_groups: int
    group_rows: int
    offsets: tuple[int, ...]
    checksum: str
    has_coords: bool
    has_instance_labels: bool
    extra: dict[str, Any]
    first_row: int = 0  # within the row group, where small sets share one


class ParquetSet(ChunkedSet):
    """A set in a store; made by `Store.open`.

    Raw elements are views of the file (a private mapping, one row group at a time): reading costs no copy, and memory is
    that of the chunks in use. Images are decoded to uint8 ``(N, C, H, W)``. Chunk borders are those of
    `InMemory` with the same ``chunk_size``, so the same encoder gives the same bits. Can be pickled: it holds no open file.

    Args:
        root: the store's folder.
        record: the set's line in the index.
        dtype, shape, encoding: of its elements, as in `StoreInfo`.
        chunk_size: elements a chunk; all in one if None.
        prefetch: bring the next chunk in while this one is worked on: raw elements by telling the kernel to, images by
            decoding them in background threads.
    """

    def __init__(
        self,
        root: Path,
        record: SetRecord,
        *,
        dtype: str,
        shape: Sequence[int],
        encoding: str,
        chunk_size: int | None = None,
        prefetch: bool = True,
    ) -> None:
        self.root, self.record, self.name, self.prefetch = root, record, record.set_id, prefetch
        self.dtype, self.element_shape, self.encoding = dtype, tuple(shape), encoding
        self.element_ndim = len(self.element_shape)
        self.bounds = chunk_bounds(record.n, chunk_size)

    @property
    def sizes(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.bounds)]

    def chunk(self, index: int) -> Chunk:
        """Chunk ``index``."""
        if self.encoding == "files":
            return self._decoded(index)
        with self._rows() as rows:
            return self._mapped(index, rows)

    def coarser(self, factor: int) -> ParquetSet:
        merged = copy(self)
        merged.bounds = [*self.bounds[:-1:factor], self.bounds[-1]]
        return merged

    def map(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Iterator[Any]:
        ids = range(self.num_chunks) if ids is None else ids
        for chunk in counted((self._sweep_images if self.encoding == "files" else self._sweep_raw)(ids)):
            yield fn(chunk, *args)

    def coords(self) -> Tensor | None:
        """``(N, 2)`` float64, x and y of the elements in the order of the chunks; None where there are none."""
        if not self.record.has_coords:
            return None
        table = self._columns([schema.X, schema.Y])
        return torch.from_numpy(np.stack([table.column(name).to_numpy() for name in (schema.X, schema.Y)], -1))

    def instance_labels(self) -> Tensor | None:
        """``(N,)`` int64, the elements' own labels in the order of the chunks; None where there are none."""
        if not self.record.has_instance_labels:
            return None
        return self._integers(schema.INSTANCE_LABEL)

    def rows(self) -> Tensor:
        """``(N,)`` int64, each element's position in the source, before the store permuted them."""
        return self._integers(schema.ROW)

    def _integers(self, name: str) -> Tensor:
        return torch.from_numpy(self._columns([name]).column(name).to_numpy().astype(np.int64))

    def _sweep_raw(self, ids: Sequence[int]) -> Iterator[Chunk]:
        with self._rows() as rows:
            for number, i in enumerate(ids):
                if self.prefetch and number + 1 < len(ids):
                    following = ids[number + 1]
                    rows.announce(self.bounds[following], self.bounds[following + 1])
                yield self._mapped(i, rows)

    def _sweep_images(self, ids: Sequence[int]) -> Iterator[Chunk]:
        if not self.prefetch:
            yield from map(self._decoded, ids)
            return
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(DECODERS) as decoders:
            yield from _one_ahead(reader, lambda i: self._decoded(i, decoders), ids)

    def _mapped(self, index: int, rows: MappedRows) -> Chunk:
        start, stop = self.bounds[index], self.bounds[index + 1]
        return Chunk(page_in(rows.read(start, stop)), None, index, start, self.element_ndim)

    def _decoded(self, index: int, decoders: Executor | None = None) -> Chunk:
        start, stop = self.bounds[index], self.bounds[index + 1]
        elements = decode(self._images(start, stop), f"set {self.name!r}", decoders)
        return Chunk(elements, None, index, start, self.element_ndim)

    def _rows(self) -> MappedRows:
        record = self.record
        file = f"{self.root}/{record.file}"  # joining paths takes as long as reading a small set
        return MappedRows(file, record.offsets, record.group_rows, record.n, DTYPES[self.dtype], self.element_shape)

    def _images(self, start: int, stop: int) -> list[bytes]:
        rows = self.record.group_rows
        groups = range(start // rows, -(-stop // rows))
        with self._open() as file:
            table = file.read_row_groups([self.record.first_row_group + number for number in groups], columns=[schema.IMAGE])
        return table.column(0).slice(start - groups[0] * rows, stop - start).to_pylist()

    def _columns(self, names: list[str]) -> pa.Table:
        record = self.record
        groups = list(range(record.first_row_group, record.first_row_group + record.row_groups))
        with self._open() as file:
            return file.read_row_groups(groups, columns=names).slice(record.first_row, record.n)

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.root / self.record.file, memory_map=True)


def _one_ahead(pool: Executor, fn: Callable[[int], Chunk], ids: Iterable[int]) -> Iterator[Chunk]:
    waiting: deque[Future[Chunk]] = deque()
    for i in ids:
        waiting.append(pool.submit(fn, i))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
