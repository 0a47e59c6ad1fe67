"""The layout of a store on disk: columns, element types, and what ``store.json`` says.

A store is a folder: ``store.json`` (written last: its presence means the ingest is complete), ``sets.parquet`` (the index,
one row a set), ``shards/part-*.parquet`` (the elements), ``splits/*.csv``. Vectors and raw images are kept as
``fixed_size_binary``, uncompressed, one page a row group: the bytes of a row group then lie in the file as one block that
can be memory-mapped, at an offset which the index keeps. Any Parquet reader opens the shards.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pyarrow as pa
import torch

__all__ = ["DTYPES", "FORMAT_VERSION", "StoreInfo", "element_bytes", "index_schema", "shard_schema"]

FORMAT_VERSION = 2  # 1: every set has row groups of its own
INFO, INDEX, SHARDS, SPLITS, INGEST = "store.json", "sets.parquet", "shards", "splits", "ingest"

DTYPES = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

# Columns of the shards. The elements are in FEATURE (raw) or IMAGE (encoded files), never both.
SET_ID, FEATURE, IMAGE = "set_id", "feature", "image"
ROW, X, Y, INSTANCE_LABEL = "row", "x", "y", "label"  # ROW: the position in the source, before the permutation


class StoreInfo(NamedTuple):
    """What ``store.json`` says of a store.

    Attributes:
        kind: ``"features"`` (elements are vectors) or ``"images"`` (elements are ``(C, H, W)``).
        encoding: ``"raw"`` (fixed-size bytes) or ``"files"`` (JPEG or PNG bytes, decoded on reading).
        dtype: of the elements, a key of `DTYPES`; images in files are ``"uint8"``.
        element_shape: of one element, ``(D,)`` or ``(C, H, W)``.
        classes: names of the labels in the order of the class numbers; empty without labels.
        seed: of the permutation of rows in each set.
        num_sets, num_elements: totals.
        shards: sizes of the shard files in bytes.
        source: what the elements were read from, as the ingest was told.
        about: what the labels and splits came from; may change without reading the elements again.
        created_by: versions of the software that wrote it.
        version: of this layout.
    """

    kind: str
    encoding: str
    dtype: str
    element_shape: tuple[int, ...]
    classes: tuple[str, ...]
    seed: int
    num_sets: int
    num_elements: int
    shards: dict[str, int]
    source: dict[str, Any]
    about: dict[str, Any]
    created_by: dict[str, str]
    version: int = FORMAT_VERSION

    def dumps(self) -> str:
        return json.dumps(self._asdict(), indent=2) + "\n"

    @staticmethod
    def load(path: Path) -> StoreInfo:
        """Read ``store.json``.

        Raises:
            ValueError: for a file that is not a store's, or one of a newer layout.
        """
        try:
            found = json.loads(path.read_text())
            known = int(found["version"]) <= FORMAT_VERSION
            info = StoreInfo(**{name: found[name] for name in StoreInfo._fields}) if known else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the description of a store ({error!r}); run ingest again") from error
        if info is None:
            raise ValueError(
                f"{path}: layout version {found['version']}, this distset reads up to {FORMAT_VERSION}; update distset"
            )
        return info._replace(element_shape=tuple(info.element_shape), classes=tuple(info.classes))


def versions() -> dict[str, str]:
    """The software that writes a store."""
    import distset

    return {"distset": distset.__version__, "pyarrow": version("pyarrow"), "python": platform.python_version()}


def element_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of one raw element."""
    return DTYPES[dtype].itemsize * torch.Size(shape).numel()


def shard_schema(encoding: str, dtype: str, shape: Sequence[int]) -> pa.Schema:
    """Columns of a shard; the element's field carries dtype and shape as metadata."""
    meta = {"dtype": dtype, "shape": json.dumps(list(shape))}
    if encoding == "raw":
        elements = pa.field(FEATURE, pa.binary(element_bytes(dtype, shape)), nullable=False, metadata=meta)
    else:
        elements = pa.field(IMAGE, pa.large_binary(), nullable=False, metadata=meta)
    return pa.schema(
        [
            elements,  # first, so that the writer knows where its bytes will lie
            pa.field(SET_ID, pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field(ROW, pa.int32(), nullable=False),
            pa.field(X, pa.float64()),
            pa.field(Y, pa.float64()),
            pa.field(INSTANCE_LABEL, pa.int32()),
        ]
    )


def index_schema() -> pa.Schema:
    """Columns of ``sets.parquet``; ``offsets`` are where the set's raw elements in each row group begin in the file."""
    return pa.schema(
        [
            pa.field(SET_ID, pa.string(), nullable=False),
            pa.field("case_id", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("n", pa.int64(), nullable=False),
            pa.field("file", pa.string(), nullable=False),
            pa.field("first_row_group", pa.int32(), nullable=False),
            pa.field("row_groups", pa.int32(), nullable=False),
            pa.field("group_rows", pa.int32(), nullable=False),
            pa.field("first_row", pa.int32(), nullable=False),  # within the row group, where small sets share one
            pa.field("offsets", pa.list_(pa.int64()), nullable=False),
            pa.field("checksum", pa.string(), nullable=False),
            pa.field("has_coords", pa.bool_(), nullable=False),
            pa.field("has_instance_labels", pa.bool_(), nullable=False),
            pa.field("extra", pa.string(), nullable=False),  # JSON: what else the reader knew of the set
        ]
    )


def part_schema() -> pa.Schema:
    """Columns of the records of a shard: the index before it is known what case a set belongs to."""
    index = index_schema()
    return index.set(index.get_field_index("case_id"), pa.field("case_id", pa.string()))


def need(module: str, extra: str = "data") -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here; install it with: pip install 'distset[{extra}]'") from error
