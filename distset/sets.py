"""Sets as sequences of chunks: where the elements live is the set's business and nobody else's.

``ChunkedSet.map(fn, *args, ids=None)`` calls ``fn(chunk, *args)`` chunk by chunk and yields what it leaves behind;
``merge`` and ``sum`` fold those into one state or one gradient. A set in memory, on disk, over a process group or on
actors differs in these three methods only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distset.states import merge_tree

__all__ = ["Chunk", "ChunkedSet", "InMemory", "added", "chunk_bounds", "pad_sets"]


class Chunk(NamedTuple):
    """Some elements of a set (or of a batch of sets).

    Attributes:
        elements: ``(*, N, *element)``, with ``element_ndim`` dimensions an element (1 a vector, 3 an image).
        mask: bool ``(*, N)``, True where there is an element; None where all are.
        id: the chunk's place in the set, which its seed and its place in the merge tree follow.
        start: the position of the chunk's first element in the set.
        element_ndim: dimensions of one element.
    """

    elements: Tensor
    mask: Tensor | None = None
    id: int = 0
    start: int = 0
    element_ndim: int = 1

    @property
    def size(self) -> int:
        """Elements in the chunk, padding included."""
        return self.elements.shape[-self.element_ndim - 1]

    @property
    def batch_shape(self) -> torch.Size:
        return self.elements.shape[: -self.element_ndim - 1]

    def counts(self, dtype: torch.dtype) -> Tensor:
        """The number of elements, ``(*)``."""
        if self.mask is not None:
            return self.mask.sum(-1, dtype=dtype)
        return torch.full(self.batch_shape, self.size, dtype=dtype, device=self.elements.device)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Chunk:
        """The chunk on ``device``, floating-point elements as ``dtype`` (if given)."""
        dtype = dtype if self.elements.is_floating_point() else None
        ahead = device.type != "cpu"  # nothing on a CPU would wait for what a GPU has yet to send
        elements = self.elements.to(device=device, dtype=dtype, non_blocking=ahead)
        mask = None if self.mask is None else self.mask.to(device, non_blocking=ahead)
        return self._replace(elements=elements, mask=mask)


class ChunkedSet(ABC):
    """A set (or a batch of sets, chunked alike) as a sequence of chunks."""

    name: str = ""
    batch_shape: torch.Size = torch.Size()

    @property
    @abstractmethod
    def sizes(self) -> Sequence[int]:
        """The number of elements of each chunk, padding included."""

    @abstractmethod
    def map(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Iterator[Any]:
        """Yield ``fn(chunk, *args)`` for the chunks ``ids`` (ascending; all of them if None)."""

    def merge(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Any:
        """The states ``fn(chunk, *args)`` merged in the fixed tree."""
        return merge_tree(self.map(fn, *args, ids=ids))

    def sum(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> list[Tensor | None]:
        """The tuples of tensors ``fn(chunk, *args)`` added up one by one; None counts as zero."""
        return added(iter(self.map(fn, *args, ids=ids)))

    def whole(self) -> Chunk:
        """All elements as one chunk, for sets that fit in memory; no copy where they are in one."""
        chunks = list(self.map(_itself))
        if len(chunks) == 1:
            return chunks[0]
        axis = -chunks[0].element_ndim - 1
        masks = [chunk.mask for chunk in chunks if chunk.mask is not None]
        return chunks[0]._replace(
            elements=torch.cat([chunk.elements for chunk in chunks], axis), mask=torch.cat(masks, -1) if masks else None
        )

    def coarser(self, factor: int) -> ChunkedSet:
        """The same set with ``factor`` successive chunks in one, where that costs nothing; else the set itself."""
        return self

    @property
    def num_chunks(self) -> int:
        return len(self.sizes)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __repr__(self) -> str:
        named = f" {self.name!r}" if self.name else ""
        return f"<{type(self).__name__}{named}: {len(self):,} elements in {self.num_chunks:,} chunks>"


class InMemory(ChunkedSet):
    """A set, or a batch of sets, held in one tensor.

    Args:
        elements: ``(*, N, *element)``.
        chunk_size: elements a chunk; all in one chunk if None.
        mask: bool ``(*, N)``, True where there is an element (see `pad_sets`).
        bounds: instead of ``chunk_size``, the chunks' borders ``0 = b_0 < b_1 < ... < b_m = N``.
        element_ndim: dimensions of one element: 1 for vectors, 3 for images.
        name: shown in errors and used for seeds.

    Raises:
        ValueError: for an empty set, a wrong mask, a chunk size below 1, bounds that do not cover the set.

    Example:
        >>> import torch
        >>> from distset import InMemory
        >>> InMemory(torch.zeros(1000, 16), chunk_size=256)
        <InMemory: 1,000 elements in 4 chunks>
    """

    def __init__(
        self,
        elements: Tensor,
        chunk_size: int | None = None,
        *,
        mask: Tensor | None = None,
        bounds: Sequence[int] | None = None,
        element_ndim: int = 1,
        name: str = "",
    ) -> None:
        if not isinstance(elements, Tensor):
            raise ValueError(
                f"elements: got {type(elements).__name__}, wanted a tensor (*, N, D); torch.as_tensor makes one"
            )
        if elements.dim() < element_ndim + 1:
            raise ValueError(
                f"elements: got shape {tuple(elements.shape)}, wanted (*, N, ...) with {element_ndim} dimensions an "
                f"element; pass element_ndim= if an element is not a vector"
            )
        self.batch_shape = elements.shape[: -element_ndim - 1]
        size = elements.shape[-element_ndim - 1]
        if size == 0 or elements.numel() == 0:
            raise ValueError(f"elements: got an empty set of shape {tuple(elements.shape)}; a set needs an element")
        if mask is not None:
            _check_mask(mask, (*self.batch_shape, size))
        if bounds is not None and chunk_size is not None:
            raise ValueError("bounds: got bounds and chunk_size, wanted one of them")
        self.elements, self.mask, self.element_ndim, self.name = elements, mask, element_ndim, name
        self.bounds = chunk_bounds(size, chunk_size) if bounds is None else _check_bounds(bounds, size)

    @property
    def sizes(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.bounds)]

    def chunk(self, index: int) -> Chunk:
        start, stop = self.bounds[index], self.bounds[index + 1]
        elements = self.elements.narrow(-self.element_ndim - 1, start, stop - start)
        mask = None if self.mask is None else self.mask[..., start:stop]
        return Chunk(elements, mask, index, start, self.element_ndim)

    def coarser(self, factor: int) -> InMemory:
        bounds = [*self.bounds[:-1:factor], self.bounds[-1]]
        return InMemory(self.elements, bounds=bounds, mask=self.mask, element_ndim=self.element_ndim, name=self.name)

    def map(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Iterator[Any]:
        for index in range(self.num_chunks) if ids is None else ids:
            yield fn(self.chunk(index), *args)


def chunk_bounds(size: int, chunk_size: int | None) -> list[int]:
    """The borders ``[0, c, 2c, ..., size]`` of chunks of ``chunk_size`` elements, the last one shorter.

    Raises:
        ValueError: if ``chunk_size`` is below 1.
    """
    if chunk_size is None:
        return [0, size]
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, wanted at least 1 element a chunk (None: all in one)")
    return [*range(0, size, chunk_size), size]


def pad_sets(sets: Sequence[Tensor], *, value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pad small sets ``(N_b, *element)`` to one batch.

    Returns:
        ``elements (B, max N_b, *element)`` and the bool mask ``(B, max N_b)``.

    Raises:
        ValueError: for no sets, an empty set, or elements of different shapes.

    Example:
        >>> import torch
        >>> from distset import pad_sets
        >>> elements, mask = pad_sets([torch.ones(2, 3), torch.ones(4, 3)])
        >>> elements.shape, mask.sum(-1).tolist()
        (torch.Size([2, 4, 3]), [2, 4])
    """
    if not sets:
        raise ValueError("sets: got none, wanted at least one set to pad")
    shapes = {tuple(s.shape[1:]) for s in sets}
    if len(shapes) > 1:
        raise ValueError(f"sets: got elements of shapes {sorted(shapes)}, wanted one shape in all sets of a batch")
    empty = [i for i, s in enumerate(sets) if len(s) == 0]
    if empty:
        raise ValueError(f"sets: set {empty[0]} of the batch is empty; a set needs an element")
    elements = torch.nn.utils.rnn.pad_sequence(list(sets), batch_first=True, padding_value=value)
    lengths = torch.tensor([len(s) for s in sets], device=elements.device)
    return elements, torch.arange(elements.shape[1], device=elements.device) < lengths.unsqueeze(-1)


def _itself(chunk: Chunk) -> Chunk:
    return chunk


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(
            f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, wanted torch.bool of shape {shape}, True where there "
            f"is an element"
        )
    if not bool(mask.any(-1).all()):
        raise ValueError("mask: a set of the batch has no element at all; drop it before batching")


def _check_bounds(bounds: Sequence[int], size: int) -> list[int]:
    ascending = all(a < b for a, b in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != size or not ascending:
        raise ValueError(f"bounds: got {list(bounds)}, wanted ascending borders from 0 to {size}")
    return list(bounds)


def added(parts: Iterator[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The sum of tuples of tensors, one by one, at least one tuple; None counts as zero."""
    first = list(next(parts))
    total: list[Tensor | None] | None = None
    for part in parts:  # of one tuple alone there is nothing to add, and no copy
        if total is None:  # a copy first: parameters that are added up have one and the same gradient
            total, first = _add_into([None] * len(first), first), []
        total = _add_into(total, part)
    return first if total is None else total


def _add_into(total: list[Tensor | None], part: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add a tuple of tensors to ``total`` in place, one by one; None counts as zero."""
    for i, new in enumerate(part):
        old = total[i]
        if new is not None:
            total[i] = new.clone(memory_format=torch.contiguous_format) if old is None else old.add_(new)
    return total
