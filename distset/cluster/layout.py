"""Who works on which chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["MAP_ELEMENTS", "runs", "wanted_ids"]

MAP_ELEMENTS = 16_384
"""Elements of a piece of work whose results come back one by one; those of a few pieces are held at a time."""


def runs(count: int, parts: int) -> list[range]:
    """Cut ``range(count)`` into ``parts`` contiguous runs of about equal length, empty ones where there are too few.

    Borders are multiples of a power of two that grows with ``count``: a run then holds a number of whole nodes of the merge
    tree that does not grow with it (at most 12), and so many states go up; lengths stay within an eighth of their mean.

    Example:
        >>> runs(122, 2), runs(2, 3)
        ([range(0, 60), range(60, 122)], [range(0, 1), range(1, 1), range(1, 2)])
    """
    unit = 1
    while unit * 16 * parts <= count:
        unit *= 2
    borders = [(2 * count * i + parts * unit) // (2 * parts * unit) * unit for i in range(parts)]
    borders = [min(border, count) for border in borders] + [count]
    return [range(start, stop) for start, stop in pairwise(borders)]


def wanted_ids(count: int, ids: Sequence[int] | None) -> Sequence[int]:
    """The chunks that a call is about: ``ids``, as a range (which takes next to no bytes) where they follow each other."""
    if ids is None:
        return range(count)
    run = range(ids[0], ids[0] + len(ids)) if len(ids) else range(0)
    return run if list(ids) == list(run) else list(ids)
