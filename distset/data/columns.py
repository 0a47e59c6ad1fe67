"""A bag's rows as the columns of a shard, and where their bytes lie in the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distset.data import schema
from distset.data.bag import Bag, dtype_name, raw_rows
from distset.data.images import image_shape
from distset.data.schema import DTYPES

__all__ = [
    "Layout",
    "Sides",
    "block_offsets",
    "elements_column",
    "padding",
    "parquet_writer",
    "raw_bytes",
    "set_ids",
    "side_columns",
    "update_checksum",
]

ALIGNMENT = 64  # of a row group's elements in the file, and so in memory: that of a tensor


class Layout(NamedTuple):
    """What all sets of a store share; the first bag fixes it."""

    encoding: str
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def of(bag: Bag, dtype: str | None) -> Layout:
        if not hasattr(bag.elements, "dtype"):
            told = getattr(bag.elements, "image_shape", None)
            return Layout("files", "uint8", told or image_shape(bag.elements.take([0])[0], bag.set_id))
        found = dtype_name(bag.elements.dtype)
        if dtype is None and found not in DTYPES:
            raise ValueError(
                f"set {bag.set_id!r}: elements are {found}, wanted one of {', '.join(DTYPES)}; ingest with dtype=float32"
            )
        wanted = dtype or found
        if wanted != found and not DTYPES[wanted].is_floating_point:
            raise ValueError(f"dtype: got {wanted}, which would cut the set's {found} values; wanted a floating-point type")
        return Layout("raw", wanted, tuple(bag.elements.shape[1:]))

    @property
    def kind(self) -> str:
        return "features" if len(self.shape) == 1 else "images"


def set_ids(ids: Sequence[str], sizes: Sequence[int]) -> pa.Array:
    """The column of ``ids``, each as often as its set has rows."""
    return pa.DictionaryArray.from_arrays(pa.array(np.repeat(np.arange(len(ids), dtype=np.int32), sizes)), pa.array(ids))


def elements_column(bag: Bag, layout: Layout, positions: np.ndarray) -> pa.Array:
    if layout.encoding == "files":
        images = bag.elements.take(positions.tolist())
        looked_at = () if getattr(bag.elements, "image_shape", None) else zip(positions, images)
        for position, image in looked_at:
            if (shape := image_shape(image, bag.set_id)) != layout.shape:
                raise ValueError(
                    f"set {bag.set_id!r}: image {position} has shape {shape}, those before {layout.shape}; "
                    f"cut all patches to one size"
                )
        return pa.array(images, pa.large_binary())
    raw = raw_bytes(bag, layout, positions)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(raw.shape[1]), len(raw), [None, pa.py_buffer(raw)])


def raw_bytes(bag: Bag, layout: Layout, positions: np.ndarray) -> np.ndarray:
    """The elements at ``positions`` as bytes ``(len(positions), bytes of one)``."""
    dtype = bag.elements.dtype
    if isinstance(bag.elements, np.ndarray) and dtype.name == layout.dtype and dtype.isnative:  # small sets: half the time
        plain = np.ascontiguousarray(bag.elements[positions])
        if plain.dtype.kind != "f" or np.isfinite(plain).all():
            return plain.reshape(len(positions), -1).view(np.uint8)
    rows: Tensor = raw_rows(bag.elements, positions, layout.dtype, bag.set_id)
    return rows.reshape(len(positions), -1).view(torch.uint8).numpy()


class Sides(NamedTuple):
    """What stands beside a set's elements: positions ``(n,)``, coordinates ``(n, 2)`` and instance labels ``(n,)``."""

    row: np.ndarray
    xy: np.ndarray | None
    label: np.ndarray | None

    @staticmethod
    def of(bag: Bag, positions: np.ndarray) -> Sides:
        xy = None if bag.coords is None else np.asarray(bag.coords, np.float64)[positions]
        label = None if bag.instance_labels is None else np.asarray(bag.instance_labels)[positions].astype(np.int32)
        return Sides(positions.astype(np.int32), xy, label)

    def update_checksum(self, hash: Any) -> None:
        """As the function of the same name does from a table."""
        nothing = np.full(len(self.row), np.nan)
        x, y = (nothing, nothing) if self.xy is None else self.xy.T
        for column in (self.row, x, y, nothing if self.label is None else self.label):
            hash.update(np.ascontiguousarray(column, np.float64))


def side_columns(sides: Sequence[Sides]) -> list[pa.Array]:
    """Row, x, y and label of several sets, one after the other."""
    sizes = [len(side.row) for side in sides]
    row = pa.array(np.concatenate([side.row for side in sides]))
    x, y = (_joined([None if side.xy is None else side.xy[:, axis] for side in sides], sizes, np.float64) for axis in (0, 1))
    return [row, x, y, _joined([side.label for side in sides], sizes, np.int32)]


def _joined(parts: Sequence[np.ndarray | None], sizes: Sequence[int], dtype: type) -> pa.Array:
    """One column of them all, null where a part is None."""
    if all(part is None for part in parts):
        return pa.nulls(sum(sizes), pa.from_numpy_dtype(dtype))
    missing = np.repeat([part is None for part in parts], sizes)
    values = [np.zeros(size, dtype) if part is None else part for part, size in zip(parts, sizes)]
    return pa.array(np.concatenate(values), mask=missing if missing.any() else None)


def update_checksum(hash: Any, table: pa.Table) -> None:
    """Add the rows of a row group: elements, positions, coordinates and instance labels."""
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if name == schema.FEATURE:
            hash.update(memoryview(column.buffers()[1])[column.offset * column.type.byte_width :][: column.nbytes])
        elif name == schema.IMAGE:
            for image in column.to_pylist():
                hash.update(len(image).to_bytes(8, "little") + image)
        elif name != schema.SET_ID:
            hash.update(np.ascontiguousarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False)).tobytes())


def parquet_writer(sink: pa.NativeFile, columns: pa.Schema, group_rows: int) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        sink,
        columns,
        compression="none",
        use_dictionary=[schema.SET_ID],
        write_statistics=[schema.SET_ID],
        data_page_size=2**31 - 1,  # one page a row group, so that its bytes lie together
        write_batch_size=group_rows,
    )


def padding(position: int, rows: int, width: int) -> bytes:
    """What puts the elements of a row group that begins at ``position`` on a multiple of `ALIGNMENT`.

    They follow a page header of 16 bytes and three zigzag varints: twice the page's size, and the number of rows. Parquet
    allows gaps between row groups. A writer with another header costs the alignment (and a copy on reading), no more.
    """
    header = 16 + 2 * _varint_bytes(rows * width) + _varint_bytes(rows)
    return bytes(-(position + header) % ALIGNMENT)


def _varint_bytes(number: int) -> int:
    return max(1, -(-(2 * number).bit_length() // 7))


def block_offsets(path: Path, width: int) -> list[int]:
    """Where the elements (of ``width`` bytes) of each row group begin: what is left of its one page is the page's header."""
    metadata, offsets = pq.read_metadata(path), []
    for number in range(metadata.num_row_groups):
        column = metadata.row_group(number).column(0)
        header = column.total_compressed_size - column.num_values * width
        assert 0 < header < 256, "one plain page a row group"
        offsets.append(column.data_page_offset + header)
    return offsets
