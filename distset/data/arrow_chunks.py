"""Chunks as Arrow bytes: what travels to a server of streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distset.data.schema import need

__all__ = ["read_chunk", "read_words", "write_chunk"]


def write_chunk(elements: Tensor) -> bytes:
    """Vectors ``(N, D)`` of floats, or words ``(N, 1)`` of integers, as an Arrow stream with one column, ``elements``.

    Arrow has no bfloat16: such vectors travel as float32, which holds the same numbers.

    Example:
        >>> import torch
        >>> from distset.data.arrow_chunks import read_chunk, write_chunk
        >>> read_chunk(write_chunk(torch.ones(2, 3))).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    pa = need("pyarrow")
    held = elements.detach().cpu()
    flat = pa.array((held.float() if held.dtype == torch.bfloat16 else held).numpy().reshape(-1))
    table = pa.table({"elements": pa.FixedSizeListArray.from_arrays(flat, elements.shape[1])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_chunk(body: bytes) -> Tensor:
    """The vectors of an Arrow stream or file: a column of lists of one length, or columns side by side, of numbers.

    Floats keep their precision; integers come as float32.

    Raises:
        ValueError: for bytes that are no Arrow data, columns of another kind, missing values, no rows.
    """
    pa = need("pyarrow")
    table = _table(body)
    columns = [column.combine_chunks() for column in table.columns]
    lists = len(columns) == 1 and _one_length(columns[0])
    parts = [columns[0].flatten()] if lists else columns
    _check_whole(*columns, *parts)
    if not all(pa.types.is_integer(part.type) or pa.types.is_floating(part.type) for part in parts):
        raise ValueError(
            f"body: has the columns {_kinds(table)}, wanted numbers, or one column of lists of numbers, all as long"
        )
    arrays = [part.to_numpy(zero_copy_only=False) for part in parts]
    values = arrays[0].reshape(table.num_rows, -1) if lists else np.stack(arrays, 1)
    return torch.from_numpy(np.array(values, dtype=None if values.dtype.kind == "f" else np.float32))


def read_words(body: bytes, words: int) -> Tensor:
    """The words int64 ``(N, 1)`` of an Arrow stream or file: one column of integers, or of lists of integers (sentences,
    say, of any lengths), whose words are taken one after the other.

    Args:
        body: the bytes.
        words: in the vocabulary.

    Raises:
        ValueError: for bytes that are no Arrow data, columns of another kind, missing values, no words, words that the
            vocabulary does not have.

    Example:
        >>> import torch
        >>> from distset.data.arrow_chunks import read_words, write_chunk
        >>> read_words(write_chunk(torch.tensor([[4], [0]])), words=5).tolist()
        [[4], [0]]
    """
    pa = need("pyarrow")
    table = _table(body)
    column = table.column(0).combine_chunks()
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    numbers = column.flatten() if lists else column
    if table.num_columns != 1 or not pa.types.is_integer(numbers.type):
        raise ValueError(f"body: has the columns {_kinds(table)}, wanted one column of integers, or of lists of integers")
    _check_whole(column, numbers)
    found = numbers.to_numpy(zero_copy_only=False)
    if len(found) == 0:
        raise ValueError("body: has no words in its lists, wanted at least one")
    for strange in (found.min(), found.max()):
        if not 0 <= int(strange) < words:
            raise ValueError(f"body: has the word {strange}, wanted numbers of the model's vocabulary, 0 to {words - 1}")
    return torch.from_numpy(found.astype(np.int64)).unsqueeze(-1)


def _table(body: bytes) -> Any:
    pa = need("pyarrow")
    try:
        reader = pa.ipc.open_file(body) if body[:6] == b"ARROW1" else pa.ipc.open_stream(body)
        table = reader.read_all()
        table.validate(full=True)  # lengths and offsets are the sender's
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0] or "it is empty"
        raise ValueError(f"body: is no Arrow stream or file: {reason}") from error
    if table.num_rows == 0 or table.num_columns == 0:
        raise ValueError(f"body: has {table.num_rows} rows of {table.num_columns} columns, wanted at least one element")
    return table


def _check_whole(*parts: Any) -> None:
    if any(part.null_count for part in parts):
        raise ValueError("body: has missing values; drop those elements or fill them")


def _kinds(table: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in table.schema)


def _one_length(column: Any) -> bool:
    """Whether a column has lists, all as long as the first."""
    pa = need("pyarrow")
    if pa.types.is_fixed_size_list(column.type):
        return column.type.list_size > 0
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return False
    lengths = column.value_lengths()
    return lengths.null_count == 0 and lengths[0].as_py() > 0 and len(lengths.unique()) == 1
