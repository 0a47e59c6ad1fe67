"""A finished store: the index of its sets, opened one by one; its splits; its checksums."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distset.data import schema
from distset.data.columns import update_checksum
from distset.data.parquet_set import ParquetSet, SetRecord
from distset.data.schema import StoreInfo
from distset.data.splits import Split, load_splits

__all__ = ["Store"]


class Store:
    """Sets on disk, written by `StoreWriter` or ``python -m jobs.ingest``.

    Args:
        path: the store's folder.

    Attributes:
        path, info: the folder and what its ``store.json`` says (`StoreInfo`).
        sets: the index, a `pyarrow.Table` with one row a set.
        ids: names of the sets in the order of the index (a list that belongs to the store: do not change it).
        classes, kind, dtype, element_shape: as in ``info``.

    Raises:
        ValueError: for a folder without a finished store, an index that does not fit, shards missing or cut short.

    Example:
        >>> import tempfile
        >>> from distset.data import Store, gaussian_bags, write_store
        >>> with tempfile.TemporaryDirectory() as path:
        ...     store = write_store(path, gaussian_bags(num_sets=4, size=100, dim=8))
        ...     bag = store.open(store.ids[0], chunk_size=32)
        ...     print(bag, store.labels(store.ids).tolist())
        <ParquetSet 'set-0': 100 elements in 4 chunks> [0, 1, 0, 1]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / schema.INFO).exists():
            started = (self.path / schema.INGEST).exists()
            what = "its ingest was cut off: run the same ingest again, it goes on" if started else "run jobs.ingest first"
            raise ValueError(f"path: {self.path} holds no finished store ({schema.INFO} is missing); {what}")
        self.info = StoreInfo.load(self.path / schema.INFO)
        self.sets = _read_index(self.path)
        self.ids: list[str] = self.sets[schema.SET_ID].to_pylist()
        self._lines = _Lines(self.sets)
        self._line_of = {set_id: line for line, set_id in enumerate(self.ids)}
        if len(self._line_of) != self.info.num_sets:
            raise ValueError(
                f"{self.path / schema.INDEX}: holds {len(self._line_of)} sets, {schema.INFO} says {self.info.num_sets}; "
                f"the store is damaged, ingest again"
            )
        self._check_files()

    @property
    def cases(self) -> dict[str, str]:
        """The case of each set."""
        return dict(zip(self.ids, self.sets["case_id"].to_pylist()))

    @property
    def classes(self) -> list[str]:
        return list(self.info.classes)

    @property
    def kind(self) -> str:
        return self.info.kind

    @property
    def dtype(self) -> torch.dtype:
        return schema.DTYPES[self.info.dtype]

    @property
    def element_shape(self) -> tuple[int, ...]:
        return self.info.element_shape

    @property
    def splits(self) -> list[str]:
        """Names of the split files."""
        return sorted(file.stem for file in (self.path / schema.SPLITS).glob("*.csv"))

    def record(self, set_id: str) -> SetRecord:
        """The set's line in the index.

        Raises:
            ValueError: for a set that the store does not hold.
        """
        return self._lines[self._line(set_id)]

    def open(self, set_id: str, chunk_size: int | None = None, *, prefetch: bool = True) -> ParquetSet:
        """The set, in chunks of ``chunk_size`` elements (all in one if None).

        Raises:
            ValueError: for a set that the store does not hold, or a chunk size below 1.
        """
        info = self.info
        return ParquetSet(
            self.path, self.record(set_id), dtype=info.dtype, shape=info.element_shape, encoding=info.encoding,
            chunk_size=chunk_size, prefetch=prefetch,
        )  # fmt: skip

    def labels(self, ids: Sequence[str]) -> Tensor:
        """Class numbers ``(len(ids),)`` int64, places in `classes`.

        Raises:
            ValueError: for a set without a label.
        """
        number = {name: i for i, name in enumerate(self.info.classes)}
        label = self._lines.labels
        found = [label[self._line(set_id)] for set_id in ids]
        if missing := [set_id for set_id, label in zip(ids, found) if label is None]:
            raise ValueError(
                f"labels: {len(missing)} sets have none, the first is {missing[0]!r}; add it to the label table"
            )
        return torch.tensor([number[label] for label in found if label is not None], dtype=torch.long)

    def folds(self, name: str | None = None) -> list[Split]:
        """All folds of the split file ``name``; of "default", or of the only one, if None.

        Raises:
            ValueError: where there is no such file.
        """
        names = self.splits
        chosen = name or ("default" if "default" in names else names[0] if len(names) == 1 else None)
        if chosen not in names:
            has = ", ".join(names) or "no splits"
            raise ValueError(f"split: got {name!r}, {self.path} has {has}; name one, or ingest with splits")
        return load_splits(self.path / schema.SPLITS / f"{chosen}.csv")

    def split(self, which: str | int | None = None, fold: int = 0) -> Split:
        """One fold: ``split()``, ``split(3)`` of the default file, ``split("shipped", 3)`` of another.

        Raises:
            ValueError: for a name or a fold that is not there.
        """
        name, number = (None, which) if isinstance(which, int) else (which, fold)
        folds = self.folds(name)
        if not 0 <= number < len(folds):
            raise ValueError(f"fold: got {number}, wanted 0 to {len(folds) - 1}")
        return folds[number]

    def verify(self, ids: Sequence[str] | None = None) -> Iterator[str]:
        """Read the sets ``ids`` (all if None) and compare them with their checksums; yields the ids of those that are whole.

        Raises:
            ValueError: for the first that is not.
        """
        read = _Groups(self.path)
        for set_id in self.ids if ids is None else ids:
            record, hash = self.record(set_id), hashlib.blake2b(digest_size=16)
            try:
                for number in range(record.row_groups):
                    table = read(record.file, record.first_row_group + number)
                    rows = min(record.group_rows, record.n - number * record.group_rows)
                    update_checksum(hash, table.slice(record.first_row, rows))
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{self.path / record.file}: does not read ({error}); ingest again") from error
            if hash.hexdigest() != record.checksum:
                raise ValueError(
                    f"set {set_id!r}: its checksum differs, {self.path / record.file} is damaged; delete the store and "
                    f"ingest again"
                )
            yield set_id

    def _line(self, set_id: str) -> int:
        if set_id not in self._line_of:
            raise ValueError(f"set_id: {set_id!r} is not in {self.path}, which holds {len(self)} sets; see Store.ids")
        return self._line_of[set_id]

    def _check_files(self) -> None:
        """Every shard is there and ends as it should: a mapping beyond the end of a file would kill the process."""
        for name, wanted in self.info.shards.items():
            file = self.path / name
            size = file.stat().st_size if file.exists() else -1
            if size != wanted:
                found = "is missing" if size < 0 else f"has {size:,} bytes instead of {wanted:,}"
                raise ValueError(f"{file}: {found}; the store is damaged, delete it and ingest again")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        info = self.info
        classes = f", classes {', '.join(info.classes)}" if info.classes else ""
        return f"<Store: {len(self):,} sets, {info.num_elements:,} elements of {info.element_shape} {info.dtype}{classes}>"


def _read_index(path: Path) -> pa.Table:
    try:
        return pq.read_table(path / schema.INDEX, read_dictionary=["file", "extra"])  # the same words again and again
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path / schema.INDEX}: does not read ({error}); delete the store and ingest again") from error


class _Lines:
    """The index, a record at a time: a million of them in Python would take seconds and a gigabyte."""

    def __init__(self, table: pa.Table) -> None:
        if "first_row" not in table.column_names:  # layout version 1
            table = table.append_column("first_row", pa.array(np.zeros(len(table), np.int32)))
        columns = {name: table[name].combine_chunks() for name in SetRecord._fields}
        offsets = columns.pop("offsets")
        self._borders, self._offsets = offsets.offsets.to_numpy(), offsets.values.to_numpy()
        self._columns = columns

    @functools.cached_property
    def labels(self) -> list[str | None]:
        return self._columns["label"].to_pylist()

    def __getitem__(self, line: int) -> SetRecord:
        found: dict[str, Any] = {name: column[line].as_py() for name, column in self._columns.items()}
        found["offsets"] = tuple(self._offsets[self._borders[line] : self._borders[line + 1]].tolist())
        found["extra"] = {} if found["extra"] == "{}" else json.loads(found["extra"])
        return SetRecord(**found)


class _Groups:
    """Row groups of the shards, the last one kept: neighbours share them."""

    def __init__(self, root: Path) -> None:
        self._root, self._key, self._table = root, ("", -1), None
        self._file: Any = None

    def __call__(self, file: str, number: int) -> pa.Table:
        if self._key[0] != file:
            self._file = pq.ParquetFile(self._root / file, memory_map=True, pre_buffer=False)
        if self._key != (file, number):
            self._table, self._key = self._file.read_row_group(number), (file, number)
        return self._table
