"""Bytes of images in a scratch file, in whatever order they are asked for: a slide's patches may outgrow the memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distset.files import naming_full_disk

__all__ = ["Spool"]


class Spool:
    """The bytes of image files, in the order they were appended; an `Encoded`. The file is gone with the object.

    Args:
        image_shape: ``(C, H, W)`` of all of them, where that is known: then nobody looks into each.
    """

    def __init__(self, image_shape: tuple[int, int, int] | None = None) -> None:
        self.image_shape = image_shape
        self._file = tempfile.TemporaryFile(buffering=2**20)  # noqa: SIM115
        self._borders = [0]

    def append(self, data: bytes) -> None:
        with naming_full_disk(Path(tempfile.gettempdir())):
            self._file.write(data)
        self._borders.append(self._borders[-1] + len(data))

    def take(self, positions: Sequence[int]) -> list[bytes]:
        with naming_full_disk(Path(tempfile.gettempdir())):
            self._file.flush()
        descriptor, borders = self._file.fileno(), self._borders
        return [os.pread(descriptor, borders[i + 1] - borders[i], borders[i]) for i in positions]

    def __len__(self) -> int:
        return len(self._borders) - 1
