"""Pixels of whole-slide images: openslide reads every format it knows, tifffile the tiles of TIFFs, several times faster.

The fast path proves itself: before a slide is read by its tiles, a few of the regions to be read are compared with what
openslide gives. Formats whose tiles overlap, are missing or are coloured in a way of their own are read by openslide.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distset.data.schema import need

__all__ = ["Level", "Slide"]

log = logging.getLogger("distset")
READERS = ("auto", "openslide", "tifffile")
CACHE_BYTES = 192 * 2**20  # of decoded tiles, so that patches across tile borders do not decode them again
DECODERS_DIFFER = 1.0  # mean difference in grey levels that two JPEG decoders may have


class Level(NamedTuple):
    """One resolution of a slide: its size in pixels and how many pixels of level 0 one of them spans."""

    width: int
    height: int
    downsample: float


class Slide:
    """An opened slide; a context manager.

    Args:
        path: in any format that openslide reads: Aperio, Hamamatsu, Philips, Leica, generic tiled TIFF, ...
        reader: "auto" reads by tiles where that gives openslide's pixels (see `trust`), "tifffile" raises where it does not,
            "openslide" never does.
        mpp: micrometres a pixel of level 0, for slides that do not say it.

    Attributes:
        levels: from the finest to the coarsest.
        mpp: as the slide says it, else as given.

    Raises:
        ValueError: for a file that is not a slide, that does not say its resolution where none is given, an unknown reader.
    """

    def __init__(self, path: str | Path, *, reader: str = "auto", mpp: float | None = None) -> None:
        if reader not in READERS:
            raise ValueError(f"reader: got {reader!r}, wanted one of {', '.join(READERS)}")
        self.path, self.reader = Path(path), reader
        openslide = need("openslide", "slides")
        if not self.path.is_file():
            raise ValueError(f"{path}: found no such file")
        try:
            self._slide = openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:
            raise ValueError(f"{path}: does not open as a slide ({error}); is it broken, or of another format?") from error
        sizes = zip(self._slide.level_dimensions, self._slide.level_downsamples)
        self.levels = [Level(width, height, downsample) for (width, height), downsample in sizes]
        self._tiles: _Tiles | None = None
        try:
            self.mpp = self._resolution(mpp)
        except ValueError:
            self.close()
            raise

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The region ``(height, width, 3)`` uint8 at ``x, y`` in pixels of ``level``; white where the slide has none."""
        if self._tiles is not None and self._tiles.has(level):
            return self._tiles.read(level, x, y, width, height)
        return self._by_openslide(level, x, y, width, height)

    def trust(self, level: int, corners: np.ndarray, side: int) -> None:
        """Read ``level`` by its tiles from now on, if squares of ``side`` pixels at some of ``corners`` come out alike.

        Raises:
            ValueError: for the reader "tifffile", where they do not, or the level has no tiles that it reads.
        """
        if self.reader == "openslide":
            return
        self._tiles = _Tiles.of(self.path, self.levels)
        why = None if self._tiles.has(level) else "its tiles are of a kind that is not read directly"
        for x, y in corners[np.unique(np.linspace(0, len(corners) - 1, 3).astype(int))]:
            if why is None and not self._alike(level, int(x), int(y), side):
                why = "its tiles are not what openslide shows"
        if why is not None:
            self._tiles.close()
            self._tiles = None
            if self.reader == "tifffile":
                raise ValueError(f"{self.path}: {why}; use reader=auto or reader=openslide")
            log.info("%s: read by openslide, %s", self.path, why)

    def overview(self, longest: int) -> tuple[np.ndarray, float]:
        """The whole slide ``(height, width, 3)`` in at most ``longest`` pixels a side, and the pixels of level 0 that one of
        them spans. It is read block by block: a slide without coarse levels does not fit in memory."""
        image = need("PIL.Image")
        level = next((i for i, at in enumerate(self.levels) if max(at[:2]) <= longest), len(self.levels) - 1)
        width, height, downsample = self.levels[level]
        factor = -(-max(width, height) // longest)
        rows, columns = -(-height // factor), -(-width // factor)
        picture = np.empty((rows, columns, 3), np.uint8)
        step = max(1, 2048 // factor)
        for top in range(0, rows, step):
            for left in range(0, columns, step):
                high, wide = min(step, rows - top), min(step, columns - left)
                region = self._by_openslide(level, left * factor, top * factor, wide * factor, high * factor)
                picture[top : top + high, left : left + wide] = image.fromarray(region).reduce(factor)
        return picture, factor * downsample

    def close(self) -> None:
        if self._tiles is not None:
            self._tiles.close()
        self._slide.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resolution(self, given: float | None) -> float:
        said = [self._slide.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        found = [float(value) for value in said if value is not None and 0 < float(value) < 1e3]
        if len(found) == 2 and abs(found[0] / found[1] - 1) > 0.02:
            raise ValueError(f"{self.path}: its pixels are {found[0]} x {found[1]} micrometres, wanted square ones")
        if not found and given is None:
            raise ValueError(
                f"{self.path}: does not say how many micrometres a pixel spans; give it for all such slides by "
                f"slide_mpp=0.25 (0.25 is usual for a 40x objective, 0.5 for 20x)"
            )
        return sum(found) / len(found) if found else float(given or 0)

    def _by_openslide(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        downsample = self.levels[level].downsample
        corner = round(x * downsample), round(y * downsample)
        try:
            pixels = np.asarray(self._slide.read_region(corner, level, (width, height)))
        except need("openslide", "slides").OpenSlideError as error:
            raise ValueError(f"{self.path}: does not read at {corner} of level {level} ({error})") from error
        alpha = pixels[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(pixels[..., :3])
        return (pixels[..., :3] * (alpha / 255.0) + (255.0 - alpha)).round().astype(np.uint8)

    def _alike(self, level: int, x: int, y: int, side: int) -> bool:
        assert self._tiles is not None
        try:
            ours = self._tiles.read(level, x, y, side, side)
        except Exception as error:  # a foreign file makes its parser raise anything
            log.debug("%s: %s", self.path, error)
            return False
        theirs = self._by_openslide(level, x, y, side, side)
        return float(np.abs(ours.astype(np.int16) - theirs).mean()) <= DECODERS_DIFFER


class _Tiles:
    """Levels of a TIFF by their tiles, the last ones kept; may be read by several threads."""

    def __init__(self, path: Path, pages: dict[int, Any], file: Any) -> None:
        self._pages, self._file = pages, file
        self._descriptor = os.open(path, os.O_RDONLY)
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached, self._lock = 0, threading.Lock()

    @staticmethod
    def of(path: Path, levels: Sequence[Level]) -> _Tiles:
        """Those levels whose tiles can be read one by one; none of a file that is no TIFF."""
        try:
            tifffile = need("tifffile", "slides")
            file = tifffile.TiffFile(path)
        except Exception:  # no TIFF, a broken one, or tifffile is not there
            return _Tiles(path, {}, None)
        found = {(page.imagewidth, page.imagelength): page for page in file.pages if _is_plain(page)}
        pages = {i: found[at.width, at.height] for i, at in enumerate(levels) if (at.width, at.height) in found}
        return _Tiles(path, pages, file)

    def has(self, level: int) -> bool:
        return level in self._pages

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        page = self._pages[level]
        wide, high = page.tilewidth, page.tilelength
        region = np.full((height, width, 3), 255, np.uint8)
        last_row = -(-page.imagelength // high) - 1
        last_column = -(-page.imagewidth // wide) - 1
        for row in range(max(y // high, 0), min((y + height - 1) // high, last_row) + 1):
            for column in range(max(x // wide, 0), min((x + width - 1) // wide, last_column) + 1):
                tile = self._tile(level, row * (last_column + 1) + column)
                if tile is None:
                    continue
                top, left = row * high, column * wide
                bottom, right = min(top + high, page.imagelength), min(left + wide, page.imagewidth)
                area = slice(max(top, y), min(bottom, y + height)), slice(max(left, x), min(right, x + width))
                part = tile[area[0].start - top : area[0].stop - top, area[1].start - left : area[1].stop - left]
                region[area[0].start - y : area[0].stop - y, area[1].start - x : area[1].stop - x] = part
        return region

    def close(self) -> None:
        os.close(self._descriptor)
        if self._file is not None:
            self._file.close()

    def _tile(self, level: int, number: int) -> np.ndarray | None:
        """A decoded tile; None for one that the file leaves out."""
        with self._lock:
            if (level, number) in self._cache:
                self._cache.move_to_end((level, number))
                return self._cache[level, number]
        page = self._pages[level]
        length = page.databytecounts[number]
        if length == 0:
            return None
        data = os.pread(self._descriptor, length, page.dataoffsets[number])
        if len(data) < length:
            raise ValueError(f"tile {number} of level {level} is cut off; the file is broken")
        tile = page.decode(data, number, jpegtables=page.jpegtables)[0]
        tile = tile.reshape(tile.shape[-3:])
        with self._lock:
            if (level, number) not in self._cache:
                self._cache[level, number] = tile
                self._cached += tile.nbytes
            while self._cached > CACHE_BYTES:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return tile


def _is_plain(page: Any) -> bool:
    """Whether a page is made of tiles of interleaved RGB bytes."""
    return (
        bool(page.is_tiled)
        and page.samplesperpixel == 3
        and page.dtype == np.uint8
        and page.planarconfig == 1
        and page.imagedepth == 1
    )
