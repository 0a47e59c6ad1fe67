"""Writing a store, bag by bag, at the memory of one bag; a killed writer goes on at its last whole shard.

Shards are written under another name, flushed, and moved into place together with a record of what is in them; the index
and ``store.json`` come last. Which bags share a shard depends on the bags alone, so a store that was killed and picked up
has the same bytes as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distset.data import schema
from distset.data.bag import Bag
from distset.data.columns import Layout
from distset.data.index import read_part, said, write_index, write_part
from distset.data.labels import Labelled
from distset.data.schema import DTYPES
from distset.data.shards import Shard
from distset.data.splits import Split
from distset.files import naming_full_disk, sole_writer, write_atomically

__all__ = ["StoreWriter", "check_bag", "check_layout", "pick_up", "write_store"]

LARGEST = 2**31 - 1
SHARD_SETS = 65_536  # a shard of small sets is closed once it holds so many: their records are kept until then


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
        self._parts: list[pa.Table] = []  # records of whole shards
        self._layout: Layout | None = None
        self._shard: Shard | None = None
        self._ids: dict[str, None] = {}
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
        if self._shard is not None:
            self._shard.discard()
        self._held.close()

    @property
    def done(self) -> list[str]:
        """Ids of the sets that are written, in order; those of an earlier start included."""
        return list(self._ids)

    def said(self) -> dict[str, Labelled]:
        """What the bags that are written said of themselves."""
        self._close_shard()
        return said(pa.concat_tables(self._parts)) if self._parts else {}

    def add(self, bag: Bag) -> None:
        """Write one bag.

        Raises:
            ValueError: for an empty bag, an id that was written before, names and labels that are no text, elements of
                another shape or type than the first bag's, values that are not finite, coordinates or instance labels that
                do not fit the elements, instance labels that are not integers, more elements than 2^31 - 1.
        """
        if bag.set_id in self._ids:
            raise ValueError(f"set_id: {bag.set_id!r} comes twice; give every set its own id")
        check_bag(bag)
        layout = Layout.of(bag, self.dtype)
        if self._layout is not None:
            check_layout(bag.set_id, layout, self._layout)
        self._layout = layout
        with naming_full_disk(self.path):
            if self._shard is None:
                draft = self.path / schema.SHARDS / f"part-{len(self._parts):05d}.parquet.tmp"
                self._shard = Shard(draft, layout, seed=self.seed, group_rows=self.group_rows)
            self._shard.add(bag)
            self._ids[bag.set_id] = None
            if self._shard.size >= self.shard_bytes or len(self._shard.records) >= SHARD_SETS:
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

        self._close_shard()
        if not self._parts or self._layout is None:
            raise ValueError("bags: got none, wanted at least one set to store")
        with naming_full_disk(self.path):
            write_index(
                self.path, pa.concat_tables(self._parts), self._layout, seed=self.seed, source=self.source, labels=labels,
                classes=classes, splits=splits, about=about,
            )  # fmt: skip
        return Store(self.path)

    def _pick_up(self) -> None:
        """Compare with the earlier start, if there was one, read what it finished and clear away what it did not."""
        settings = {"seed": self.seed, "dtype": self.dtype, "source": self.source}
        pick_up(self.path, settings | {"group_rows": self.group_rows, "shard_bytes": self.shard_bytes})
        while (record := self.path / schema.INGEST / f"part-{len(self._parts):05d}.parquet").exists():
            part, self._layout = read_part(record)
            self._parts.append(part)
            self._ids |= dict.fromkeys(part[schema.SET_ID].to_pylist())

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        assert self._layout is not None
        number = len(self._parts)
        with naming_full_disk(self.path):
            part = self._shard.publish(self.path, number)
            write_part(self.path / schema.INGEST / f"part-{number:05d}.parquet", part, self._layout)
        self._parts.append(part)
        self._shard = None


def pick_up(path: Path, settings: Mapping[str, Any]) -> None:
    """Clear away what a killed writer did not finish, and compare ``settings`` with those it was started with.

    Raises:
        ValueError: where they differ.
    """
    for draft in path.rglob("*.tmp"):
        draft.unlink()
    settings = {"version": schema.FORMAT_VERSION, **settings}
    manifest = path / schema.INGEST / "manifest.json"
    if not manifest.exists():
        write_atomically(manifest, json.dumps(settings, indent=2) + "\n")
        return
    earlier = json.loads(manifest.read_text())
    if other := sorted(key for key in settings if settings[key] != earlier.get(key)):
        words = "; ".join(f"{key} was {earlier.get(key)!r}, now {settings[key]!r}" for key in other)
        raise ValueError(f"path: {path} was started with other settings ({words}); delete it or choose another")


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


def check_bag(bag: Bag) -> None:
    """Refuse what no store can hold; see `StoreWriter.add`."""
    n = len(bag.elements)
    if not isinstance(bag.set_id, str):
        raise ValueError(f"set_id: got {bag.set_id!r}, wanted text; str(...) makes it so")
    if not bag.set_id:
        raise ValueError("set_id: got an empty one, wanted a name")
    for name, given in (("label", bag.label), ("case_id", bag.case_id)):
        if not isinstance(given, str | None):
            raise ValueError(f"set {bag.set_id!r}: {name} is {given!r}, wanted text or None; str(...) makes it so")
    if n == 0 or 0 in getattr(bag.elements, "shape", (1,))[1:]:
        raise ValueError(f"set {bag.set_id!r} is empty; a set needs an element: drop it from the source")
    shape = getattr(bag.elements, "shape", None)
    if shape is not None and len(shape) not in (2, 4):
        raise ValueError(f"set {bag.set_id!r}: elements have shape {tuple(shape)}, wanted (N, D) or (N, C, H, W)")
    if bag.coords is not None and (np.shape(bag.coords) != (n, 2) or not np.isfinite(bag.coords).all()):
        raise ValueError(f"set {bag.set_id!r}: coords have shape {np.shape(bag.coords)}, wanted finite numbers ({n}, 2)")
    if n > LARGEST:  # positions in the source are kept as int32
        raise ValueError(f"set {bag.set_id!r}: has {n:,} elements, wanted at most {LARGEST:,}; divide it")
    if bag.instance_labels is not None:
        _check_instance_labels(bag.set_id, np.asarray(bag.instance_labels), n)


def _check_instance_labels(set_id: str, labels: np.ndarray, n: int) -> None:
    if labels.shape != (n,):
        raise ValueError(f"set {set_id!r}: instance_labels have shape {labels.shape}, wanted ({n},), one an element")
    fits = np.zeros(n, bool)
    if labels.dtype.kind in "biuf":
        values = labels.astype(np.float64)
        fits = (np.abs(values) <= LARGEST) & (values == np.rint(values))
    if bad := np.flatnonzero(~fits).tolist():
        raise ValueError(
            f"set {set_id!r}: instance_labels hold {labels[bad[0]]} at row {bad[0]}, wanted whole numbers of 32 bits; "
            f"number the kinds of elements, or leave the labels out"
        )


def check_layout(set_id: str, layout: Layout, wanted: Layout) -> None:
    """Refuse a set of another kind of element than those before it.

    Raises:
        ValueError: naming both kinds.
    """
    if layout != wanted:
        raise ValueError(
            f"set {set_id!r}: elements are {layout.dtype} of shape {layout.shape}, those of the sets before "
            f"{wanted.dtype} of shape {wanted.shape}; one store holds one kind of element"
        )
