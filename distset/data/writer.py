"""Writing a store, bag by bag, at the memory of one bag; a killed writer goes on at its last whole shard.

Shards are written under another name, flushed, and moved into place together with a record of what is in them; the index
and ``store.json`` come last. Which bags share a shard depends on the bags alone, so a store that was killed and picked up
has the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distset.data import schema
from distset.data.bag import Bag
from distset.data.columns import (
    Layout,
    block_offsets,
    elements_column,
    padding,
    parquet_writer,
    set_ids,
    sides,
    update_checksum,
)
from distset.data.labels import Labelled
from distset.data.schema import DTYPES, StoreInfo, element_bytes
from distset.data.splits import Split, save_splits
from distset.files import publish, sole_writer, write_atomically
from distset.seeds import seed_for

__all__ = ["StoreWriter", "write_store"]

ROW_GROUP_BYTES = 64 * 2**20
ENCODED_GROUP_ROWS = 256


class StoreWriter:
    """Write bags one after another; a context manager, ended by `finish`.

    Args:
        path: the store's folder. What an earlier, killed writer left there is kept, if it was started alike: `done` says
            which sets need not be given again, and the next ones must follow in the same order.
        seed: of the permutation of rows in each set.
        dtype: to store floating-point elements as; as they come if None.
        source: what the store is made from, as JSON has it; part of "started alike".
        group_rows: rows of a row group, at most.
        shard_bytes: a shard is closed once it holds this much.

    Raises:
        ValueError: for a path that holds a finished store, or one started with other settings; while another process writes.

    Example:
        >>> import numpy as np, tempfile
        >>> from distset.data import Bag, StoreWriter
        >>> with tempfile.TemporaryDirectory() as path, StoreWriter(path) as writer:
        ...     for i, label in enumerate(["benign", "tumour"]):
        ...         writer.add(Bag(f"slide-{i}", np.ones((100, 8), np.float16), label=label))
        ...     store = writer.finish()
        ...     print(store)
        <Store: 2 sets, 200 elements of (8,) float16, classes benign, tumour>
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seed: int = 0,
        dtype: str | None = None,
        source: Mapping[str, Any] | None = None,
        group_rows: int = 8192,
        shard_bytes: int = 256 * 2**20,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
        if group_rows < 1 or shard_bytes < 1:
            raise ValueError(f"group_rows, shard_bytes: got {group_rows} and {shard_bytes}, wanted at least 1 each")
        self.path, self.seed, self.dtype = Path(path), seed, dtype
        self.group_rows, self.shard_bytes = group_rows, shard_bytes
        self.source = json.loads(json.dumps(dict(source or {})))
        self._records: list[dict[str, Any]] = []  # of whole shards
        self._open: list[dict[str, Any]] = []  # of the shard being written
        self._shards = 0
        self._layout: Layout | None = None
        self._sink: pa.NativeFile | None = None
        self._file: pq.ParquetWriter | None = None
        self._groups = 0
        self._held = ExitStack()

    def __enter__(self) -> StoreWriter:
        if (self.path / schema.INFO).exists():
            raise ValueError(f"path: {self.path} holds a finished store; delete it or choose another path")
        self._held.enter_context(sole_writer(self.path / schema.INGEST))
        try:
            self._pick_up()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Without `finish`, the shard being written is dropped; whole shards are kept for the next start."""
        if self._file is not None and self._sink is not None:
            with suppress(OSError, pa.ArrowException):  # a full disk said so already
                self._file.close()
            self._sink.close()
            self._draft.unlink(missing_ok=True)
        self._held.close()

    @property
    def done(self) -> list[str]:
        """Ids of the sets that are written, in order; those of an earlier start included."""
        return [record[schema.SET_ID] for record in (*self._records, *self._open)]

    def said(self) -> dict[str, Labelled]:
        """What the bags that are written said of themselves."""
        records = (*self._records, *self._open)
        return {r[schema.SET_ID]: Labelled(r["case_id"] or r[schema.SET_ID], r["label"]) for r in records}

    def add(self, bag: Bag) -> None:
        """Write one bag.

        Raises:
            ValueError: for an empty bag, an id that was written before, elements of another shape or type than the first
                bag's, values that are not finite, coordinates or instance labels that do not fit the elements.
        """
        if bag.set_id in self._ids:
            raise ValueError(f"set_id: {bag.set_id!r} comes twice; give every set its own id")
        _check_bag(bag)
        layout = Layout.of(bag, self.dtype)
        if self._layout is not None and layout != self._layout:
            raise ValueError(
                f"set {bag.set_id!r}: elements are {layout.dtype} of shape {layout.shape}, those of the sets before "
                f"{self._layout.dtype} of shape {self._layout.shape}; one store holds one kind of element"
            )
        self._layout = layout
        self._open.append(self._write(bag, layout))
        self._ids.add(bag.set_id)
        if self._sink is not None and self._sink.tell() >= self.shard_bytes:
            self._close_shard()

    def finish(
        self,
        *,
        labels: Mapping[str, Labelled] | None = None,
        classes: Sequence[str] | None = None,
        splits: Sequence[Split] = (),
        about: Mapping[str, Any] | None = None,
    ) -> Any:
        """Write the index, the splits and ``store.json``; returns the `Store`.

        Args:
            labels: ``{set_id: Labelled(case_id, label)}``, in the place of what the bags said.
            classes: names of the classes in order; those found, sorted, if None.
            splits: one a fold; written as the split file "default" where there are any.
            about: what labels and splits came from, as JSON has it.

        Raises:
            ValueError: where no bag was written, for classes unknown or only one, for splits that leak.
        """
        from distset.data.store import Store

        if self._file is not None:
            self._close_shard()
        if not self._records or self._layout is None:
            raise ValueError("bags: got none, wanted at least one set to store")
        index = _index(self._records, labels)
        found = class_names([row["label"] for row in index], classes)
        split_file = self.path / schema.SPLITS / "default.csv"
        if splits:
            save_splits(split_file, splits, {row[schema.SET_ID]: row["case_id"] for row in index})
        else:
            split_file.unlink(missing_ok=True)
        table = pa.Table.from_pylist(index, schema=schema.index_schema())
        draft = self.path / (schema.INDEX + ".tmp")
        pq.write_table(table, draft)
        publish(draft, self.path / schema.INDEX)
        layout, elements = self._layout, sum(row["n"] for row in index)
        files = dict.fromkeys(row["file"] for row in index)
        shards = {file: (self.path / file).stat().st_size for file in files}
        info = StoreInfo(
            layout.kind, layout.encoding, layout.dtype, layout.shape, tuple(found), self.seed, len(index), elements,
            shards, self.source, dict(about or {}), schema.versions(),
        )  # fmt: skip
        write_atomically(self.path / schema.INFO, info.dumps())
        return Store(self.path)

    @property
    def _draft(self) -> Path:
        return self.path / schema.SHARDS / f"part-{self._shards:05d}.parquet.tmp"

    def _pick_up(self) -> None:
        """Compare with the earlier start, if there was one, read what it finished and clear away what it did not."""
        for draft in self.path.rglob("*.tmp"):
            draft.unlink()
        settings = {"version": schema.FORMAT_VERSION, "seed": self.seed, "dtype": self.dtype, "source": self.source}
        settings |= {"group_rows": self.group_rows, "shard_bytes": self.shard_bytes}
        manifest = self.path / schema.INGEST / "manifest.json"
        if manifest.exists():
            earlier = json.loads(manifest.read_text())
            other = sorted(key for key in settings if settings[key] != earlier.get(key))
            if other:
                said = "; ".join(f"{key} was {earlier.get(key)!r}, now {settings[key]!r}" for key in other)
                raise ValueError(f"path: {self.path} was started with other settings ({said}); delete it or choose another")
        else:
            write_atomically(manifest, json.dumps(settings, indent=2) + "\n")
        while (record := self.path / schema.INGEST / f"part-{self._shards:05d}.json").exists():
            part = json.loads(record.read_text())
            self._layout = Layout(part["encoding"], part["dtype"], tuple(part["shape"]))
            self._records += part["sets"]
            self._shards += 1
        self._ids = set(self.done)

    def _write(self, bag: Bag, layout: Layout) -> dict[str, Any]:
        """Write the bag's row groups, rows in their seeded permutation; returns its record."""
        n = len(bag.elements)
        order = np.random.default_rng(seed_for(self.seed, "rows", bag.set_id)).permutation(n)
        hash = hashlib.blake2b(digest_size=16)
        first, rows = self._groups, self._rows_a_group(layout)
        for start in range(0, n, rows):
            self._write_group(bag, layout, order[start : start + rows], hash)
        return {
            schema.SET_ID: bag.set_id,
            "case_id": bag.case_id,
            "label": bag.label,
            "n": n,
            "file": f"{schema.SHARDS}/part-{self._shards:05d}.parquet",
            "first_row_group": first,
            "row_groups": self._groups - first,
            "group_rows": rows,
            "checksum": hash.hexdigest(),
            "has_coords": bag.coords is not None,
            "has_instance_labels": bag.instance_labels is not None,
            "extra": json.dumps(dict(bag.extra), sort_keys=True),
        }

    def _rows_a_group(self, layout: Layout) -> int:
        if layout.encoding == "files":
            return min(self.group_rows, ENCODED_GROUP_ROWS)
        return max(1, min(self.group_rows, ROW_GROUP_BYTES // element_bytes(layout.dtype, layout.shape)))

    def _write_group(self, bag: Bag, layout: Layout, positions: np.ndarray, hash: Any) -> None:
        columns = schema.shard_schema(layout.encoding, layout.dtype, layout.shape)
        if self._file is None or self._sink is None:
            self._draft.parent.mkdir(parents=True, exist_ok=True)
            self._sink = pa.OSFile(str(self._draft), "wb")
            self._file = parquet_writer(self._sink, columns, self.group_rows)
        elements = elements_column(bag, layout, positions)
        table = pa.Table.from_arrays([elements, set_ids(bag.set_id, len(positions)), *sides(bag, positions)], schema=columns)
        update_checksum(hash, table)
        if layout.encoding == "raw":
            self._sink.write(padding(self._sink.tell(), len(positions), elements.type.byte_width))
        self._file.write_table(table, row_group_size=self.group_rows)
        self._groups += 1

    def _close_shard(self) -> None:
        assert self._file is not None
        assert self._sink is not None
        assert self._layout is not None
        self._file.close()
        self._sink.close()
        self._file = self._sink = None
        for record in self._open:
            record["offsets"] = block_offsets(self._draft, record, self._layout)
        name = f"part-{self._shards:05d}"
        publish(self._draft, self.path / schema.SHARDS / f"{name}.parquet")
        layout = self._layout._asdict()
        write_atomically(self.path / schema.INGEST / f"{name}.json", json.dumps({**layout, "sets": self._open}, indent=1))
        self._records += self._open
        self._open, self._groups, self._shards = [], 0, self._shards + 1


def write_store(path: str | Path, bags: Iterable[Bag], *, seed: int = 0, dtype: str | None = None) -> Any:
    """Write ``bags`` (with their labels) as a store without splits; returns the `Store`. See `StoreWriter`."""
    with StoreWriter(path, seed=seed, dtype=dtype) as writer:
        done = writer.done
        for number, bag in enumerate(bags):
            if number >= len(done):
                writer.add(bag)
            elif bag.set_id != done[number]:
                raise ValueError(f"bags: set {number} is {bag.set_id!r}, was {done[number]!r} at the start that was cut off")
        return writer.finish()


def class_names(labels: Iterable[str | None], classes: Sequence[str] | None) -> list[str]:
    """The names of the classes in order, checked.

    Raises:
        ValueError: for a label that is not among ``classes``, or only one class found.
    """
    found = {label for label in labels if label is not None}
    if classes is not None and (unknown := sorted(found - set(classes))):
        raise ValueError(f"classes: labels hold {', '.join(unknown)}, wanted only {', '.join(classes)}; complete the list")
    if len(found) == 1:
        raise ValueError(f"labels: all sets are {found.pop()!r}, wanted at least two classes; check the label column")
    return list(classes) if classes is not None else sorted(found, key=_natural)


def _check_bag(bag: Bag) -> None:
    n = len(bag.elements)
    if not bag.set_id:
        raise ValueError("set_id: got an empty one, wanted a name")
    if n == 0 or 0 in getattr(bag.elements, "shape", (1,))[1:]:
        raise ValueError(f"set {bag.set_id!r} is empty; a set needs an element: drop it from the source")
    shape = getattr(bag.elements, "shape", None)
    if shape is not None and len(shape) not in (2, 4):
        raise ValueError(f"set {bag.set_id!r}: elements have shape {tuple(shape)}, wanted (N, D) or (N, C, H, W)")
    if bag.coords is not None and (np.shape(bag.coords) != (n, 2) or not np.isfinite(bag.coords).all()):
        raise ValueError(f"set {bag.set_id!r}: coords have shape {np.shape(bag.coords)}, wanted finite numbers ({n}, 2)")
    if bag.instance_labels is not None and np.shape(bag.instance_labels) != (n,):
        got = np.shape(bag.instance_labels)
        raise ValueError(f"set {bag.set_id!r}: instance_labels have shape {got}, wanted ({n},), one an element")


def _index(records: Sequence[dict[str, Any]], labels: Mapping[str, Labelled] | None) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        case, label = record["case_id"], record["label"]
        if labels is not None and record[schema.SET_ID] in labels:
            case, label = labels[record[schema.SET_ID]]
        rows.append({**record, "case_id": case or record[schema.SET_ID], "label": label})
    return rows


def _natural(label: str) -> tuple[float, str]:
    """Numbers by value, before words."""
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label
