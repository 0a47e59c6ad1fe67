"""One large table of elements (Parquet, Arrow, CSV): many sets, told apart by a column, or one set as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from distset.data.bag import Bag
from distset.data.labels import MISSING
from distset.data.readers.files import naming
from distset.data.shuffle import Streamed
from distset.data.splits import Split

__all__ = ["Table", "table"]

SPOOL_BYTES = 2**27  # a set beyond this is shuffled through the disk; within, it is in memory about three times
BATCH_ROWS = 16_384
KINDS = {".parquet": "parquet", ".arrow": "ipc", ".ipc": "ipc", ".feather": "ipc", ".csv": "csv"}


def table(
    path: str | Path,
    *,
    set_id: str | None = "set_id",
    features: str | Sequence[str] | None = None,
    x: str | None = "x",
    y: str | None = "y",
    label: str | None = "label",
    case_id: str | None = "case_id",
    instance_label: str | None = None,
) -> Table:
    """Bags of a Parquet, Arrow (IPC) or CSV file, or a folder of them; rows of a set may lie anywhere, and are read fast
    where they lie together. A set of more than 128 MiB is shuffled through the disk and never held in memory.

    Args:
        path: the file or folder.
        set_id: the column that names the set; None for one set of all rows, named as the file.
        features: a column of lists or fixed-size lists, or names of columns of numbers; every column of numbers that is
            not another of these if None.
        x, y: columns of coordinates; used where both are there.
        label, case_id: columns with the set's class and its case, the same in all its rows; used where they are there.
            Empty, NA, NaN or None is none.
        instance_label: a column with the element's own class, an integer.

    In CSV the columns ``set_id``, ``label`` and ``case_id`` are text: ``007`` stays ``007``.

    Raises:
        ValueError: for a file that is neither, columns that are missing or hold no numbers, a set with two labels or cases.
    """
    return Table(Path(path), set_id, features, (x, y), label, case_id, instance_label)


class Table:
    """See `table`; a `Source`."""

    def __init__(
        self,
        path: Path,
        set_id: str | None,
        features: str | Sequence[str] | None,
        xy: tuple[str | None, str | None],
        label: str | None,
        case_id: str | None,
        instance_label: str | None,
    ) -> None:
        self.splits: list[Split] = []
        self._path, self._set_id, self._instance_label = path, set_id, instance_label
        self._kept: dict[Any, pa.Table] = {}
        with naming(path):
            self._data = _open(path, [name for name in (set_id, label, case_id) if name is not None])
            names = self._data.schema.names
            for wanted in (set_id, instance_label):
                if wanted is not None and wanted not in names:
                    raise ValueError(f"has no column {wanted!r}, its columns are {', '.join(names)}")
            self._xy = [name for name in xy if name is not None and name in names]
            sides = {"label": label, "case_id": case_id}
            self._sides = {field: name for field, name in sides.items() if name is not None and name in names}
            others = {set_id, *self._xy, *self._sides.values(), instance_label}
            self._features = self._feature_columns(features, others)
            self._pieces = {path.stem: []} if set_id is None else self._index()

    @property
    def ids(self) -> list[str]:
        return list(self._pieces)

    def read(self, set_id: str) -> Bag:
        beside = [*self._xy, *self._sides.values()] + ([self._instance_label] if self._instance_label else [])
        with naming(self._path):
            size = sum(len(rows) for _, rows in self._pieces[set_id]) if self._set_id else self._data.count_rows()
            elements = self._elements(set_id, size)
            found = self._gather(set_id, beside)
            said = {field: _one(found, name, set_id) for field, name in self._sides.items()}
            coords = np.stack([found[name].to_numpy() for name in self._xy], -1) if len(self._xy) == 2 else None
            labels = found[self._instance_label].to_numpy() if self._instance_label else None
        return Bag(set_id, elements, coords, labels, said.get("label"), said.get("case_id"))

    def _elements(self, set_id: str, size: int) -> Any:
        """The features of a set: in memory, or as a stream where they are too many for that."""
        first = next(self._blocks(set_id, self._features), None)
        if first is None:
            return np.empty((0, 1), np.float32)
        head = _matrix(first, self._features, set_id)
        if size * head.itemsize * head.shape[1] <= SPOOL_BYTES:
            return _matrix(self._gather(set_id, self._features), self._features, set_id)

        def blocks() -> Iterator[np.ndarray]:
            with naming(self._path):
                for block in self._blocks(set_id, self._features):
                    yield _matrix(block, self._features, set_id)

        return Streamed(blocks, size, head.dtype, head.shape[1:])

    def _gather(self, set_id: str, columns: list[str]) -> pa.Table:
        return pa.concat_tables(list(self._blocks(set_id, columns))) if columns else pa.table({})

    def _blocks(self, set_id: str, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of a set, some at a time."""
        if self._set_id is not None:
            for piece, rows in self._pieces[set_id]:
                yield self._rows(piece, rows, columns)
            return
        for fragment in self._data.get_fragments():
            for batch in _batches(fragment, columns):
                if len(batch):
                    yield pa.Table.from_batches([batch])

    def _feature_columns(self, features: str | Sequence[str] | None, others: set[str | None]) -> list[str]:
        fields = self._data.schema
        if features is not None:
            chosen = [features] if isinstance(features, str) else list(features)
        else:
            chosen = [f.name for f in fields if f.name not in others and (_is_number(f.type) or _is_list(f.type))]
        if missing := [name for name in chosen if name not in fields.names]:
            raise ValueError(f"has no column {missing[0]!r}, its columns are {', '.join(fields.names)}")
        lists = [name for name in chosen if _is_list(fields.field(name).type)]
        if (
            not chosen
            or (lists and len(chosen) > 1)
            or any(not _is_number(fields.field(n).type) for n in chosen if n not in lists)
        ):
            raise ValueError(f"features: got the columns {chosen}, wanted one column of lists, or columns of numbers")
        return chosen

    def _index(self) -> dict[str, list[tuple[Any, np.ndarray]]]:
        """For each set, in order of its name, the pieces of the files that hold its rows, and which rows."""
        found: dict[str, list[tuple[Any, np.ndarray]]] = {}
        for piece in _pieces(self._data):
            column = piece.to_table(columns=[self._set_id]).column(0)
            names = column.cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False)
            if lacking := int((names == "").sum()):
                raise ValueError(f"has {lacking} rows without a {self._set_id}; fill it in or drop them")
            values, codes = np.unique(names, return_inverse=True)
            order = np.argsort(codes, kind="stable")
            for value, rows in zip(values, np.split(order, np.cumsum(np.bincount(codes))[:-1])):
                found.setdefault(str(value), []).append((piece, rows))
        return dict(sorted(found.items()))

    def _rows(self, piece: Any, rows: np.ndarray, columns: list[str]) -> pa.Table:
        key = (piece, tuple(columns))  # neighbours in order of name often share a piece
        if key not in self._kept:
            self._kept = {at: table for at, table in self._kept.items() if at[0] is piece}
            self._kept[key] = piece.to_table(columns=list(dict.fromkeys(columns)))
        return self._kept[key].take(pa.array(rows))


def _open(path: Path, words: Sequence[str]) -> pds.Dataset:
    """The data set; in CSV the columns ``words`` are text, whatever they look like."""
    if not path.exists():
        raise ValueError("no such file or folder")
    endings = [path.suffix.lower()] if path.is_file() else [file.suffix.lower() for file in path.rglob("*")]
    kind = next((KINDS[ending] for ending in (".parquet", *KINDS) if ending in endings), "parquet")
    text = pacsv.ConvertOptions(column_types=dict.fromkeys(words, pa.string()))
    return pds.dataset(path, format=pds.CsvFileFormat(convert_options=text) if kind == "csv" else kind)


def _pieces(data: pds.Dataset) -> Iterator[Any]:
    """Fragments no larger than a row group."""
    for fragment in data.get_fragments():
        yield from fragment.split_by_row_group() if isinstance(fragment, pds.ParquetFileFragment) else [fragment]


def _batches(fragment: Any, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A file's rows, some thousand at a time; a dataset would read Parquet ahead, and keep it, without bound."""
    if isinstance(fragment, pds.ParquetFileFragment):
        with pq.ParquetFile(fragment.path, filesystem=fragment.filesystem, pre_buffer=False) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=columns)
    else:
        yield from fragment.to_batches(columns=columns, batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1)


def _matrix(found: pa.Table, columns: list[str], set_id: str) -> np.ndarray:
    if len(columns) == 1 and _is_list(found.schema.field(columns[0]).type):
        column = found[columns[0]].combine_chunks()
        widths = np.unique(pc.list_value_length(column).fill_null(-1).to_numpy())
        if len(widths) > 1 or widths[0] < 1:
            raise ValueError(
                f"set {set_id!r}: {columns[0]} has rows of {', '.join(map(str, widths))} numbers, wanted one width"
            )
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(found), widths[0])
    return np.stack([found[name].to_numpy() for name in columns], -1)


def _one(found: pa.Table, name: str, set_id: str) -> str | None:
    values = found[name].unique().to_pylist()
    if len(values) > 1:
        raise ValueError(f"set {set_id!r}: {name} is {values[0]!r} and {values[1]!r}, wanted the same in all rows of a set")
    said = "" if values[0] is None else str(values[0])
    return None if said.lower() in MISSING else said


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _is_list(kind: pa.DataType) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    return listed and _is_number(kind.value_type)
