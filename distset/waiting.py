"""How long this process waited for elements: what a slow disk or network costs a training step.

Sets that read from elsewhere count the time until a chunk is in memory; whoever wants to know takes the difference of two
looks at `waited`. It is wall-clock time, and no part of any result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Stopwatch", "counted", "page_in", "waited"]

PAGE = 4096

T = TypeVar("T")
_seconds = 0.0


def waited() -> float:
    """Seconds that `counted` iterators of this process took to give their items, all in all."""
    return _seconds


def counted(chunks: Iterator[T]) -> Iterator[T]:
    """The same items; the time that each took to come is added to `waited`."""
    global _seconds
    while True:
        start = time.perf_counter()
        try:
            chunk = next(chunks)
        except StopIteration:
            return
        finally:
            _seconds += time.perf_counter() - start
        yield chunk


def page_in(elements: Tensor) -> Tensor:
    """Read a byte of every page of a mapped tensor, so that its way from the disk is over when this returns."""
    elements.reshape(-1).view(torch.uint8)[::PAGE].sum()
    return elements


class Stopwatch:
    """Time since it was made, and the part of it that was waited for elements."""

    def __init__(self) -> None:
        self._start, self._waited = time.perf_counter(), waited()

    def read(self) -> tuple[float, float]:
        """Seconds, and seconds of waiting among them."""
        return time.perf_counter() - self._start, waited() - self._waited
