"""A set as a reader hands it over, and the source it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distset.data.schema import DTYPES
from distset.data.splits import Split

__all__ = ["Bag", "Encoded", "NothingToStore", "Source", "raw_rows"]


class Bag(NamedTuple):
    """One set on its way into a store.

    Attributes:
        set_id: its name, unique in the store.
        elements: ``(N, *element)`` as a numpy array, a memory map or a tensor; or `Encoded` image files.
        coords: ``(N, 2)`` x and y of each element; None where there are none.
        instance_labels: ``(N,)`` integers; None where there are none.
        label: the set's class; None leaves it to the label table.
        case_id: the patient (or other group) it belongs to; None leaves it to the label table, or to the set's own id.
        extra: what else is known of the set, as JSON has it: ``image``, ``patch_size``, ``coords_unit``, attributes.
    """

    set_id: str
    elements: Any
    coords: np.ndarray | None = None
    instance_labels: np.ndarray | None = None
    label: str | None = None
    case_id: str | None = None
    extra: Mapping[str, Any] = {}


@runtime_checkable
class Source(Protocol):
    """Where sets come from.

    ``ids`` are in a fixed order, so that a killed ingest can be picked up where it stopped; ``splits`` are those the data
    comes with, one a fold, empty where there are none.
    """

    @property
    def splits(self) -> Sequence[Split]: ...

    @property
    def ids(self) -> Sequence[str]: ...

    def read(self, set_id: str) -> Bag: ...


class Encoded(Protocol):
    """Images as the bytes of their files."""

    def __len__(self) -> int: ...

    def take(self, positions: Sequence[int]) -> list[bytes]: ...


class NothingToStore(ValueError):
    """What was read is whole and has no elements, such as a slide without tissue."""


def dtype_name(dtype: Any) -> str:
    """The name of a numpy or torch dtype."""
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


def raw_rows(elements: Any, positions: np.ndarray, dtype: str, set_id: str) -> Tensor:
    """The rows at ``positions`` as a contiguous tensor of ``dtype``, checked to be finite.

    Raises:
        ValueError: for rows with NaN or infinite values, or that do not fit ``dtype``.
    """
    if isinstance(elements, Tensor):
        rows = elements[torch.from_numpy(positions)]
    else:
        rows = torch.from_numpy(np.ascontiguousarray(elements[positions], elements.dtype.newbyteorder("=")))
    _check_finite(rows, positions, set_id, "not finite", "fix or drop these rows")
    wanted = DTYPES[dtype]
    if rows.dtype == wanted:
        return rows.contiguous()
    cast = rows.to(wanted)
    _check_finite(cast, positions, set_id, f"too large for {dtype}", "ingest with dtype=float32")
    return cast.contiguous()


def _check_finite(rows: Tensor, positions: np.ndarray, set_id: str, what: str, advice: str) -> None:
    if not rows.is_floating_point() or bool(rows.isfinite().all()):
        return
    bad = (~rows.isfinite().flatten(1).all(1)).numpy()
    raise ValueError(
        f"set {set_id!r}: row {int(positions[bad].min())} is {what} (and {int(bad.sum()) - 1} more of the {len(bad)} rows "
        f"looked at); {advice}"
    )
