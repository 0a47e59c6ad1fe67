"""Who works on which chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["MAP_ELEMENTS", "runs", "wanted_ids"]

MAP_ELEMENTS = 16_384
"""Elements of a piece of work whose results come back one by one; those of a few pieces are held at a time."""


def runs(count: int, parts: int) -> list[range]:
    """Cut ``range(count)`` into ``parts`` contiguous runs of about equal length, empty ones where there are too few.

    Each border is moved, by a sixteenth of a run at most, to the multiple of the highest power of two there is. A run then
    holds a number of whole nodes of the merge tree that does not grow with it, 3 on average and at most 12: so many states
    go up.

    Example:
        >>> runs(122, 2), runs(2, 3)
        ([range(0, 64), range(64, 122)], [range(0, 1), range(1, 1), range(1, 2)])
    """
    borders = [_roundest(count * i / parts, count / (16 * parts)) for i in range(parts)]
    return [range(start, stop) for start, stop in pairwise([*borders, count])]


def _roundest(ideal: float, slack: float) -> int:
    """The multiple of the highest power of two within ``slack`` of ``ideal``; the nearest whole number if there is none."""
    unit = 1 << int(ideal + slack).bit_length()
    while unit > 1:
        candidate = round(ideal / unit) * unit
        if abs(candidate - ideal) <= slack:
            return candidate
        unit //= 2
    return int(ideal + 0.5)


def wanted_ids(count: int, ids: Sequence[int] | None) -> Sequence[int]:
    """The chunks that a call is about: ``ids``, as a range (which takes next to no bytes) where they follow each other."""
    if ids is None:
        return range(count)
    run = range(ids[0], ids[0] + len(ids)) if len(ids) else range(0)
    return run if list(ids) == list(run) else list(ids)
