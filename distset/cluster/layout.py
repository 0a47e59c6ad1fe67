"""Who works on which chunks."""

from __future__ import annotations

from itertools import pairwise

__all__ = ["runs"]


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
