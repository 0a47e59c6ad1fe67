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

    Args:
        path: the folder of files, folders below included.
        folder_is_label: take the name of a file's folder as its bag's label (DSMIL: ``datasets/tcga/LUAD/slide.csv``).

    References:
        Li, Li, Eliceiri: Dual-stream multiple instance learning network for whole slide image classification with
        self-supervised contrastive learning. CVPR 2021. https://github.com/binli123/dsmil-wsi
    """

    def read(set_id: str, file: Path) -> Bag:
        return Bag(set_id, _numbers(file), label=file.parent.name if folder_is_label else None)

    return FileSource(bag_files(path, (".csv",)), read)


def _numbers(file: Path) -> np.ndarray:
    try:
        table = pacsv.read_csv(file)
        columns = [column.cast(pa.float32()).to_numpy() for column in table.columns]
    except pa.ArrowException as error:  # ragged lines, words among the numbers
        raise ValueError(f"is not a table of numbers ({error})") from error
    return np.stack(columns, -1) if columns and len(table) else np.empty((0, max(1, len(columns))), np.float32)
