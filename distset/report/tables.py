"""Tables that a run leaves behind: whole ones as CSV and Parquet, per-element ones streamed to Parquet."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from distset.report.scores import predicted_classes

__all__ = ["ElementTable", "prediction_table", "write_json", "write_table"]


def prediction_table(
    probabilities: ArrayLike,
    classes: Sequence[str],
    *,
    set_ids: Sequence[str],
    case_ids: Sequence[str] | None = None,
    labels: Sequence[str | None] | None = None,
    split: str | Sequence[str] | None = None,
    threshold: float | None = None,
) -> pd.DataFrame:
    """One row a set: ``set_id, case_id, split, label, prob_<class>..., predicted``; columns that are not given are left out.

    Args:
        probabilities: ``(N, C)``.
        classes: their C names.
        set_ids, case_ids, labels, split: N names each (``split`` also one for all).
        threshold: on the probability of the second of two classes, for the column ``predicted``.
    """
    p = np.asarray(probabilities, np.float64)
    if p.shape != (len(set_ids), len(classes)):
        raise ValueError(f"probabilities: got shape {p.shape}, wanted {(len(set_ids), len(classes))}, (sets, classes)")
    columns: dict[str, Any] = {"set_id": list(set_ids)}
    for name, column in (("case_id", case_ids), ("split", split), ("label", labels)):
        if column is not None:
            columns[name] = column if isinstance(column, str) else list(column)
    columns |= {f"prob_{name}": p[:, c] for c, name in enumerate(classes)}
    columns["predicted"] = [classes[c] for c in predicted_classes(p, threshold)]
    return pd.DataFrame(columns)


def write_table(frame: pd.DataFrame, stem: Path) -> list[Path]:
    """Write ``<stem>.csv`` and ``<stem>.parquet``, whole or not at all."""
    csv, parquet = (stem.with_name(stem.name + suffix) for suffix in (".csv", ".parquet"))
    for path, write in ((csv, frame.to_csv), (parquet, frame.to_parquet)):
        draft = path.with_name(path.name + ".tmp")
        write(draft, index=False)
        os.replace(draft, path)
    return [csv, parquet]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all; named tuples as objects, numbers that are not finite as null."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(_plain(value), indent=2) + "\n")
    os.replace(draft, path)


class ElementTable:
    """A Parquet file of elements, written chunk by chunk; it appears when it is complete.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from distset.report import ElementTable
        >>> path = Path(tempfile.mkdtemp()) / "elements.parquet"
        >>> with ElementTable(path) as table:
        ...     table.add({"element": np.arange(3), "attention": np.full(3, 1 / 3)})
        ...     table.add({"element": np.arange(3, 5), "attention": np.zeros(2)})
        >>> table.rows, path.exists()
        (5, True)
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._draft = path.with_name(path.name + ".tmp")
        self._writer: pq.ParquetWriter | None = None

    def add(self, columns: Mapping[str, np.ndarray]) -> None:
        """The rows of one chunk, as a row group."""
        table = pa.table({name: pa.array(column) for name, column in columns.items()})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._draft, table.schema)
        self._writer.write_table(table)
        self.rows += len(table)

    def __enter__(self) -> ElementTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is None:
            return
        self._writer.close()
        if kind is None:
            os.replace(self._draft, self.path)
        else:
            self._draft.unlink()


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
