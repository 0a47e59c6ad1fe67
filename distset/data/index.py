"""The end of an ingest: the index of all sets, the splits, and ``store.json``, whose presence says that it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distset.data import schema
from distset.data.columns import Layout
from distset.data.labels import Labelled
from distset.data.schema import StoreInfo
from distset.data.splits import Split, save_splits
from distset.files import draft_for, publish, write_atomically

__all__ = ["class_names", "read_part", "said", "write_index", "write_part"]

LAYOUT = b"layout"


def write_part(path: Path, part: pa.Table, layout: Layout) -> None:
    """Keep the records of a whole shard, and its layout, for a start after a kill."""
    draft = draft_for(path)
    pq.write_table(part.replace_schema_metadata({LAYOUT: json.dumps(layout._asdict())}), draft)
    publish(draft, path)


def read_part(path: Path) -> tuple[pa.Table, Layout]:
    """What `write_part` kept."""
    part = pq.read_table(path)
    layout = json.loads(part.schema.metadata[LAYOUT])
    part = part.replace_schema_metadata(None)
    return part, Layout(layout["encoding"], layout["dtype"], tuple(layout["shape"]))


def said(records: pa.Table) -> dict[str, Labelled]:
    """What the bags said of themselves."""
    columns = (records[name].to_pylist() for name in (schema.SET_ID, "case_id", "label"))
    return {set_id: Labelled(case or set_id, label) for set_id, case, label in zip(*columns)}


def write_index(
    path: Path,
    records: pa.Table,
    layout: Layout,
    *,
    seed: int,
    source: Mapping[str, Any],
    labels: Mapping[str, Labelled] | None = None,
    classes: Sequence[str] | None = None,
    splits: Sequence[Split] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the index, the splits and ``store.json``.

    Args:
        path: the store's folder.
        records: of all sets, in the order of the index.
        layout: of all sets.
        seed, source: as the writer was given them.
        labels, classes, splits, about: as in `StoreWriter.finish`.

    Raises:
        ValueError: for no records, classes unknown or only one, splits that leak.
    """
    if len(records) == 0:
        raise ValueError("bags: got none, wanted at least one set to store")
    known = said(records) | ({} if labels is None else dict(labels))
    ids = records[schema.SET_ID].to_pylist()
    found = class_names([known[set_id].label for set_id in ids], classes)
    split_file = path / schema.SPLITS / "default.csv"
    if splits:
        save_splits(split_file, splits, {set_id: known[set_id].case_id for set_id in ids})
    else:
        split_file.unlink(missing_ok=True)
    told = {"case_id": [known[set_id].case_id or set_id for set_id in ids], "label": [known[set_id].label for set_id in ids]}
    for name, values in told.items():
        records = records.set_column(records.schema.get_field_index(name), name, pa.array(values, pa.string()))
    draft = path / (schema.INDEX + ".tmp")
    pq.write_table(records.cast(schema.index_schema()), draft)
    publish(draft, path / schema.INDEX)
    shards = {file: (path / file).stat().st_size for file in pc.unique(records["file"]).to_pylist()}
    elements = pc.sum(records["n"]).as_py()
    info = StoreInfo(
        layout.kind, layout.encoding, layout.dtype, layout.shape, tuple(found), seed, len(ids), elements,
        shards, dict(source), dict(about or {}), schema.versions(),
    )  # fmt: skip
    write_atomically(path / schema.INFO, info.dumps())


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


def _natural(label: str) -> tuple[float, str]:
    """Numbers by value, before words."""
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label
