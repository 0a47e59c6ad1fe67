"""Labelled images in the idx format of MNIST and its kin."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["LabelledImages", "read_idx", "read_idx_folder"]

FILES = {"train": "train", "test": "t10k"}


class LabelledImages(NamedTuple):
    """Images uint8 ``(N, H, W)`` and their class numbers ``(N)``."""

    images: Tensor
    labels: Tensor

    def pixels(self) -> Tensor:
        """Flat grey values in [0, 1], ``(N, H W)``."""
        return self.images.flatten(1).float() / 255


def read_idx_folder(path: str | Path, part: str) -> LabelledImages:
    """The ``"train"`` or ``"test"`` part of a folder with ``train-images-idx3-ubyte.gz`` and the like, packed or not.

    Raises:
        ValueError: for a part that does not exist, a folder without the files, images and labels of different numbers.
    """
    if part not in FILES:
        raise ValueError(f"part: got {part!r}, wanted one of {', '.join(FILES)}")
    images = read_idx(_find(Path(path), f"{FILES[part]}-images-idx3-ubyte"))
    labels = read_idx(_find(Path(path), f"{FILES[part]}-labels-idx1-ubyte"))
    if len(images) != len(labels):
        raise ValueError(f"path: {path} has {len(images)} {part} images and {len(labels)} labels, wanted as many")
    return LabelledImages(images, labels.long())


def read_idx(path: str | Path) -> Tensor:
    """One idx file of unsigned bytes, packed by gzip or not.

    Raises:
        ValueError: for a file that is none, that ends too early, or that cannot be unpacked.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(bytes([0, 0, 8, 2]) + bytes([0, 0, 0, 2]) + bytes([0, 0, 0, 3]) + bytes(range(6)))
        ...     file.flush()
        ...     read_idx(file.name)
        tensor([[0, 1, 2],
                [3, 4, 5]], dtype=torch.uint8)
    """
    opened = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"path: {path} cannot be unpacked ({error}), wanted a file packed by gzip; fetch it again"
        ) from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"path: {path} is no idx file of bytes (it starts with {content[:4]!r})")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"path: {path} ends in its header of {start} bytes; it is not whole")
    shape = np.frombuffer(content, ">u4", content[3], offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != math.prod(shape):
        raise ValueError(f"path: {path} holds {len(values):,} bytes for shape {tuple(shape)}; it is not whole")
    return torch.from_numpy(values.reshape(shape).copy())


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise ValueError(f"path: {folder} has no {name}.gz, wanted a folder with the idx files of a data set such as MNIST")
