"""Image bytes (JPEG, PNG) to tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from distset.data.schema import need

__all__ = ["decode", "image_shape"]


def image_shape(data: bytes, where: str) -> tuple[int, int, int]:
    """``(C, H, W)`` as `decode` gives it, from the header alone.

    Raises:
        ValueError: for bytes that are not an image, or one of more than 8 bits a channel, naming ``where`` they came from.
    """
    pil = need("PIL.Image")
    try:
        with pil.open(io.BytesIO(data)) as image:
            return (_channels(image.mode, where), image.height, image.width)
    except (OSError, pil.DecompressionBombError) as error:
        raise ValueError(f"{where}: holds bytes that are not an image ({error})") from error


def decode(images: Sequence[bytes], where: str, pool: Executor | None = None) -> Tensor:
    """Decode images of one size to uint8 ``(N, C, H, W)``; RGB, or one channel where the file is grey.

    Raises:
        ValueError: for bytes that are not an image, naming ``where`` they came from.
    """
    if pool is None or len(images) < 2:
        return torch.from_numpy(np.stack([_decode_one(data, where) for data in images]))
    return torch.from_numpy(np.stack(list(pool.map(_decode_one, images, [where] * len(images)))))


def _decode_one(data: bytes, where: str) -> np.ndarray:
    pil = need("PIL.Image")
    try:
        with pil.open(io.BytesIO(data)) as image:
            grey = _channels(image.mode, where) == 1
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(f"{where}: holds an image that does not decode ({error})") from error
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _channels(mode: str, where: str) -> int:
    if mode == "F" or mode.startswith("I"):
        raise ValueError(f"{where}: holds an image of mode {mode}, whose values 8 bits would cut; scale it to 0..255 first")
    return 1 if mode in ("1", "L") else 3
