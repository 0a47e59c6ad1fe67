"""Chunks as Arrow bytes: what travels to a server of streams."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distset.data.schema import need

__all__ = ["read_chunk", "write_chunk"]


def write_chunk(elements: Tensor) -> bytes:
    """Vectors ``(N, D)`` of float32 or float16 as an Arrow stream with one column, ``elements``.

    Example:
        >>> import torch
        >>> from distset.data.arrow_chunks import read_chunk, write_chunk
        >>> read_chunk(write_chunk(torch.ones(2, 3))).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    pa = need("pyarrow")
    flat = pa.array(elements.contiguous().cpu().numpy().reshape(-1))
    table = pa.table({"elements": pa.FixedSizeListArray.from_arrays(flat, elements.shape[1])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_chunk(body: bytes) -> Tensor:
    """The vectors of an Arrow stream or file: a column of lists of one length, or numeric columns side by side.

    Raises:
        ValueError: for bytes that are no Arrow data, columns of another kind, missing values, no rows.
    """
    pa = need("pyarrow")
    try:
        reader = pa.ipc.open_file(body) if body[:6] == b"ARROW1" else pa.ipc.open_stream(body)
        table = reader.read_all()
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).partition("\n")[0] or "it is empty"
        raise ValueError(f"body: is no Arrow stream or file: {reason}") from error
    if table.num_rows == 0 or table.num_columns == 0:
        raise ValueError(f"body: has {table.num_rows} rows of {table.num_columns} columns, wanted at least one element")
    columns = [column.combine_chunks() for column in table.columns]
    if any(column.null_count for column in columns):
        raise ValueError("body: has missing values; drop those elements or fill them")
    if len(columns) == 1 and pa.types.is_fixed_size_list(columns[0].type):
        values = columns[0].flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
    else:
        try:
            values = np.stack([column.to_numpy(zero_copy_only=False).astype(np.float32) for column in columns], 1)
        except (TypeError, ValueError) as error:
            kinds = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
            raise ValueError(
                f"body: has the columns {kinds}, wanted numbers, or one column of lists of one length"
            ) from error
    if values.dtype not in (np.float16, np.float32, np.float64):
        values = values.astype(np.float32)
    return torch.from_numpy(np.array(values))
