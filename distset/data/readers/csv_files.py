"""One CSV of numbers a bag, as DSMIL has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from distset.data.bag import Bag
from distset.data.readers.files import FileSource, bag_files

__all__ = ["csv_bags"]


def csv_bags(path: str | Path, *, folder_is_label: bool = False) -> FileSource:
    """Bags in CSV files: a header, then one row of numbers an element; stored as float32.

    A first line of numbers that do not count the columns (0, 1, 2, ...) is taken for an element whose header is missing.

    Args:
        path: the folder of files, folders below included.
        folder_is_label: take the name of a file's folder as its bag's label (DSMIL: ``datasets/tcga/LUAD/slide.csv``).

    Raises:
        ValueError: for a path without such files; on reading, for a file without a header, ragged lines, words.

    References:
        Li, Li, Eliceiri: Dual-stream multiple instance learning network for whole slide image classification with
        self-supervised contrastive learning. CVPR 2021. https://github.com/binli123/dsmil-wsi
    """

    def read(set_id: str, file: Path) -> Bag:
        return Bag(set_id, _numbers(file), label=file.parent.name if folder_is_label else None)

    return FileSource(bag_files(path, (".csv",)), read)


def _check_header(names: list[str]) -> None:
    """Refuse a header that is an element: numbers, and not those of the columns, counted from 0 or 1."""
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return
    if numbers not in (list(range(len(names))), list(range(1, len(names) + 1))):
        raise ValueError(f"has no header, its first line is {', '.join(names[:3])}, ...; write one name a column above it")


def _numbers(file: Path) -> np.ndarray:
    try:
        table = pacsv.read_csv(file)
        _check_header(table.column_names)
        columns = [column.cast(pa.float32()).to_numpy() for column in table.columns]
    except pa.ArrowException as error:  # ragged lines, words among the numbers
        raise ValueError(f"is not a table of numbers ({error})") from error
    return np.stack(columns, -1) if columns and len(table) else np.empty((0, max(1, len(columns))), np.float32)
