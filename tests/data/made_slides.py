"""Slides to test with: pale glass, discs of pink tissue, spots of tumour in it; tiled pyramids that openslide reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

PINK, PURPLE, GLASS = (200, 120, 175), (95, 50, 130), 243


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def picture(
    size: tuple[int, int], tissue: Sequence[float] | None, tumour: Sequence[float] | None = None, seed: int = 0
) -> np.ndarray:
    """``(height, width, 3)`` of a slide of ``size`` (width, height); tissue and tumour are discs (x, y, radius)."""
    generator = np.random.default_rng(seed)
    width, height = size
    pixels = np.full((height, width, 3), GLASS, np.float32)
    for shape, colour in ((tissue, PINK), (tumour, PURPLE)):
        if shape is not None:
            pixels[disc(height, width, *shape)] = colour
    return (pixels + generator.normal(0, 2, (height, width, 1)) + 12 * texture(height, width)).clip(0, 255).astype(np.uint8)


def texture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (np.sin(rows / 5 + columns / 11) * np.sin(columns / 7 - rows / 23))[..., None]


def write_slide(
    path: Path,
    pixels: np.ndarray,
    *,
    mpp: float | None = 0.5,
    levels: int = 2,
    tile: int = 128,
    compression: str = "zlib",
) -> Path:
    """A tiled pyramid, each level half the one before, with its resolution where ``mpp`` is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            step = 2**level
            resolution = {} if mpp is None else {"resolution": (1e4 / (mpp * step),) * 2, "resolutionunit": "CENTIMETER"}
            file.write(
                half(pixels, step),
                tile=(tile, tile),
                photometric="rgb",
                compression=compression,
                subfiletype=min(level, 1),
                metadata=None,
                **resolution,
            )
    return path


def half(pixels: np.ndarray, step: int) -> np.ndarray:
    height, width = pixels.shape[0] // step * step, pixels.shape[1] // step * step
    return pixels[:height, :width].reshape(height // step, step, width // step, step, 3).mean((1, 3)).astype(np.uint8)
