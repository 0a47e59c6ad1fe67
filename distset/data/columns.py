"""A bag's rows as the columns of a shard, and where their bytes lie in the file."""

from __future__ import annotations

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
from distset.data.schema import DTYPES, element_bytes

__all__ = ["Layout", "block_offsets", "elements_column", "padding", "parquet_writer", "set_ids", "sides", "update_checksum"]

ALIGNMENT = 64  # of a row group's elements in the file, and so in memory: that of a tensor


class Layout(NamedTuple):
    """What all sets of a store share; the first bag fixes it."""

    encoding: str
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def of(bag: Bag, dtype: str | None) -> Layout:
        if not hasattr(bag.elements, "dtype"):
            return Layout("files", "uint8", image_shape(bag.elements.take([0])[0], bag.set_id))
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


def set_ids(set_id: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([set_id]))


def elements_column(bag: Bag, layout: Layout, positions: np.ndarray) -> pa.Array:
    if layout.encoding == "files":
        images = bag.elements.take(positions.tolist())
        for position, image in zip(positions, images):
            if (shape := image_shape(image, bag.set_id)) != layout.shape:
                raise ValueError(
                    f"set {bag.set_id!r}: image {position} has shape {shape}, those before {layout.shape}; "
                    f"cut all patches to one size"
                )
        return pa.array(images, pa.large_binary())
    rows: Tensor = raw_rows(bag.elements, positions, layout.dtype, bag.set_id)
    width = element_bytes(layout.dtype, layout.shape)
    raw = rows.reshape(len(positions), -1).view(torch.uint8).numpy()
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(positions), [None, pa.py_buffer(raw)])


def sides(bag: Bag, positions: np.ndarray) -> list[pa.Array]:
    """The columns beside the elements: row, x, y, instance label."""
    n = len(positions)
    x, y = pa.nulls(n, pa.float64()), pa.nulls(n, pa.float64())
    if bag.coords is not None:
        xy = np.asarray(bag.coords, np.float64)[positions]
        x, y = pa.array(xy[:, 0]), pa.array(xy[:, 1])
    labels = pa.nulls(n, pa.int32())
    if bag.instance_labels is not None:
        labels = pa.array(np.asarray(bag.instance_labels)[positions].astype(np.int32))
    return [pa.array(positions.astype(np.int32)), x, y, labels]


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


def block_offsets(path: Path, record: dict[str, Any], layout: Layout) -> list[int]:
    """Where the raw elements of each of the set's row groups begin: what is left of its one page is the page's header."""
    if layout.encoding == "files":
        return []
    metadata, offsets = pq.read_metadata(path), []
    for number in range(record["first_row_group"], record["first_row_group"] + record["row_groups"]):
        column = metadata.row_group(number).column(0)
        header = column.total_compressed_size - column.num_values * element_bytes(layout.dtype, layout.shape)
        assert 0 < header < 256, "one plain page a row group"
        offsets.append(column.data_page_offset + header)
    return offsets
