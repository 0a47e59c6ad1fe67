"""One shard being written: sets one after another, large ones in row groups of their own, small ones sharing theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distset.data import schema
from distset.data.bag import Bag
from distset.data.columns import (
    Layout,
    Sides,
    block_offsets,
    elements_column,
    padding,
    parquet_writer,
    raw_bytes,
    set_ids,
    side_columns,
    update_checksum,
)
from distset.data.schema import element_bytes
from distset.files import publish
from distset.seeds import seed_for

__all__ = ["Shard", "part_file"]

ROW_GROUP_BYTES = 64 * 2**20
ENCODED_GROUP_ROWS = 256
SHARED_BYTES = 64 * 2**10  # a set of raw elements up to this size shares its row group with its neighbours


def part_file(number: int) -> str:
    """The name of shard ``number`` below the store's folder."""
    return f"{schema.SHARDS}/part-{number:05d}.parquet"


class Shard:
    """A shard under the name of a draft; `publish` moves it into place.

    Args:
        draft: the file to write; it goes with `discard`.
        layout: of its elements.
        seed: of the permutation of rows in each set.
        group_rows: rows of a row group, at most.
    """

    def __init__(self, draft: Path, layout: Layout, *, seed: int, group_rows: int) -> None:
        self._draft, self._layout, self._seed = draft, layout, seed
        self._columns = schema.shard_schema(layout.encoding, layout.dtype, layout.shape)
        self._width = element_bytes(layout.dtype, layout.shape) if layout.encoding == "raw" else 0
        self._group_rows = _rows_a_group(layout, group_rows)
        draft.parent.mkdir(parents=True, exist_ok=True)
        self._sink = pa.OSFile(str(draft), "wb")
        self._file = parquet_writer(self._sink, self._columns, group_rows)
        self._groups = 0
        self._sharing: list[_Small] = []
        self._sharing_rows = 0
        self._records: list[dict[str, Any]] = []

    @property
    def ids(self) -> list[str]:
        return [record[schema.SET_ID] for record in self._records]

    @property
    def records(self) -> Sequence[dict[str, Any]]:
        """The lines of the index, without what is known at the end alone: ``file`` and ``offsets``."""
        return self._records

    @property
    def size(self) -> int:
        """Bytes so far, what waits for its neighbours included."""
        return self._sink.tell() + self._sharing_rows * self._width

    def add(self, bag: Bag) -> None:
        """Write the rows of a bag that was checked, in their seeded permutation."""
        n = len(bag.elements)
        order = np.random.default_rng(seed_for(self._seed, "rows", bag.set_id)).permutation(n)
        streamed = hasattr(bag.elements, "prepare")  # see distset.data.shuffle
        small = self._width > 0 and not streamed and n <= self._group_rows and n * self._width <= SHARED_BYTES
        checksum, first_row = (self._share if small else self._alone)(bag, order)
        last = self._groups + 1 if small else self._groups
        groups = 1 if small else -(-n // self._group_rows)
        self._records.append(
            {
                schema.SET_ID: bag.set_id,
                "case_id": bag.case_id,
                "label": bag.label,
                "n": n,
                "first_row_group": last - groups,
                "row_groups": groups,
                "group_rows": self._group_rows,
                "first_row": first_row,
                "checksum": checksum,
                "has_coords": bag.coords is not None,
                "has_instance_labels": bag.instance_labels is not None,
                "extra": json.dumps(dict(bag.extra), sort_keys=True),
            }
        )

    def publish(self, root: Path, number: int) -> pa.Table:
        """Finish the file, move it to its place below ``root``; returns its lines of the index."""
        self._flush()
        self._file.close()
        self._sink.close()
        file = part_file(number)
        blocks = block_offsets(self._draft, self._width) if self._width else []
        for record in self._records:
            groups = range(record["first_row_group"], record["first_row_group"] + record["row_groups"])
            record["file"] = file
            record["offsets"] = [blocks[group] + record["first_row"] * self._width for group in groups] if blocks else []
        publish(self._draft, root / file)
        return pa.Table.from_pylist(self._records, schema=schema.part_schema())

    def discard(self) -> None:
        """Drop the file."""
        with suppress(OSError, pa.ArrowException):  # a full disk said so already
            self._file.close()
        with suppress(OSError, pa.ArrowException):
            self._sink.close()
        self._draft.unlink(missing_ok=True)

    def _alone(self, bag: Bag, order: np.ndarray) -> tuple[str, int]:
        """Row groups that hold this set alone."""
        self._flush()
        if hasattr(bag.elements, "prepare"):
            bag.elements.prepare(order, self._group_rows)
        hash = hashlib.blake2b(digest_size=16)
        for start in range(0, len(order), self._group_rows):
            positions = order[start : start + self._group_rows]
            elements = elements_column(bag, self._layout, positions)
            ids = set_ids([bag.set_id], [len(positions)])
            table = self._table(elements, ids, side_columns([Sides.of(bag, positions)]))
            update_checksum(hash, table)
            self._write(table)
        return hash.hexdigest(), 0

    def _share(self, bag: Bag, order: np.ndarray) -> tuple[str, int]:
        """Rows that wait for those of their neighbours; a table for each would cost more than the set."""
        if self._sharing_rows + len(order) > self._group_rows:
            self._flush()
        small = _Small(bag.set_id, raw_bytes(bag, self._layout, order), Sides.of(bag, order))
        hash = hashlib.blake2b(digest_size=16)
        hash.update(small.raw)  # type: ignore[arg-type]  # an array is a buffer
        small.sides.update_checksum(hash)
        first_row = self._sharing_rows
        self._sharing.append(small)
        self._sharing_rows += len(order)
        return hash.hexdigest(), first_row

    def _flush(self) -> None:
        """Write the sets that share a row group."""
        if not self._sharing:
            return
        raw = np.concatenate([small.raw for small in self._sharing])
        rows = len(raw)
        elements = pa.FixedSizeBinaryArray.from_buffers(pa.binary(self._width), rows, [None, pa.py_buffer(raw)])
        ids = set_ids([small.set_id for small in self._sharing], [len(small.raw) for small in self._sharing])
        self._write(self._table(elements, ids, side_columns([small.sides for small in self._sharing])))
        self._sharing, self._sharing_rows = [], 0

    def _table(self, elements: pa.Array, ids: pa.Array, sides: list[pa.Array]) -> pa.Table:
        return pa.Table.from_arrays([elements, ids, *sides], schema=self._columns)

    def _write(self, table: pa.Table) -> None:
        if self._width:
            self._sink.write(padding(self._sink.tell(), len(table), self._width))
        self._file.write_table(table, row_group_size=len(table))
        self._groups += 1


class _Small(NamedTuple):
    set_id: str
    raw: np.ndarray  # (n, bytes of an element)
    sides: Sides


def _rows_a_group(layout: Layout, group_rows: int) -> int:
    if layout.encoding == "files":
        return min(group_rows, ENCODED_GROUP_ROWS)
    return max(1, min(group_rows, ROW_GROUP_BYTES // element_bytes(layout.dtype, layout.shape)))
