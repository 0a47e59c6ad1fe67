"""Where in an image the elements lie that a set got its score from: heat-maps as PNG, patches as GeoJSON.

Positions are those of the patches' upper left corners in pixels of the full-resolution image (level 0). A heat-map takes
the memory of its picture, whatever the number of patches, so it is drawn from one stream.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from distset.report.plots import save

__all__ = ["GeoJson", "Heatmap", "load_image"]

NAMESPACE = uuid.UUID("5b1f0c9e-3b8d-4b39-9a7e-3f1f1e0f6a55")
EMPTY = np.nan


class Heatmap:
    """Values of patches on the plane of an image, averaged where patches overlap.

    Args:
        origin, size: the area in level-0 pixels, ``(x, y)`` of its corner and ``(width, height)``.
        patch: ``(width, height)`` of a patch in level-0 pixels.
        longest: the picture's longer side in pixels; larger areas are scaled down.

    Raises:
        ValueError: for an area or a patch without extent.
    """

    def __init__(
        self,
        size: tuple[float, float],
        patch: tuple[float, float],
        *,
        origin: tuple[float, float] = (0, 0),
        longest: int = 1600,
    ) -> None:
        if min(*size, *patch) <= 0:
            raise ValueError(f"size, patch: got {size} and {patch}, wanted widths and heights above 0")
        self.origin, self.size, self.patch = origin, size, patch
        self.scale = min(1.0, longest / max(size))
        self.shape = tuple(max(1, round(side * self.scale)) for side in reversed(size))
        self._sums = np.zeros((2, self.shape[0] + 1, self.shape[1] + 1))  # values and counts, as differences
        self._pixels: NDArray | None = None

    @classmethod
    def around(cls, corners: NDArray, patch: tuple[float, float], *, longest: int = 1600) -> Heatmap:
        """A heat-map of the area that patches at ``corners (N, 2)`` cover."""
        low, high = corners.min(0), corners.max(0) + patch
        return cls(tuple(high - low), patch, origin=tuple(low), longest=longest)

    def add(self, corners: NDArray, values: NDArray) -> None:
        """Patches at ``corners (N, 2)`` with ``values (N)``."""
        rows, columns = self._spans(corners)
        for layer, amount in enumerate((values, np.ones(len(values)))):
            for row, column, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
                np.add.at(self._sums[layer], (rows[row], columns[column]), sign * amount)

    def paste(self, corners: NDArray, patches: NDArray) -> None:
        """Patches ``(N, C, H, W)`` of uint8 as the background, where there is no image of the whole."""
        if self._pixels is None:
            self._pixels = np.full((*self.shape, 3), 255, np.uint8)
        rows, columns = self._spans(corners)
        for i, patch in enumerate(patches):
            area = slice(rows[0][i], rows[1][i]), slice(columns[0][i], columns[1][i])
            height, width = area[0].stop - area[0].start, area[1].stop - area[1].start
            shown = Image.fromarray(_rgb(patch)).resize((width, height), Image.Resampling.BILINEAR)
            self._pixels[area] = np.asarray(shown)

    @property
    def background(self) -> NDArray | None:
        """What was pasted, ``(H, W, 3)`` uint8."""
        return self._pixels

    def values(self) -> NDArray:
        """The mean value at each pixel, ``(H, W)``; nan where no patch is."""
        sums, counts = self._sums[:, :-1, :-1].cumsum(1).cumsum(2)
        counts = counts.round()
        return np.where(counts > 0, sums / np.maximum(counts, 1), EMPTY)

    def draw(
        self, path: Path, *, title: str, label: str, signed: bool, image: NDArray | None = None, note: str = ""
    ) -> None:
        """The heat-map over the image, beside the image itself.

        Args:
            path: of the PNG.
            title: above the picture.
            label: of the colour bar.
            signed: red above 0 and blue below it; else percentiles from dark to bright.
            image: of the area, ``(H, W, 3)`` of any resolution; what was pasted if None.
            note: a second line under the title.
        """
        values = self.values()
        behind = self._pixels if image is None else image
        colors, shown = _colors(values, signed, clear=behind is not None)
        panels = 1 if behind is None else 2
        aspect = self.shape[0] / self.shape[1]
        width = min(5.6, 8.0 / aspect)
        figure = Figure(
            figsize=(panels * width + 1.1, width * aspect + 0.9), dpi=160, layout="constrained", facecolor="white"
        )
        axes = np.atleast_1d(figure.subplots(1, panels))
        extent = (0, self.size[0], self.size[1], 0)
        for axis in axes:
            axis.set_axis_off()
            if behind is not None:
                axis.imshow(behind, extent=extent, interpolation="antialiased")
            axis.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
        axes[-1].imshow(shown, extent=extent, interpolation="nearest")
        axes[0].set_title(title + (f"\n{note}" if note else ""), loc="left", fontsize=10)
        bar = figure.colorbar(colors, ax=list(axes), fraction=0.04, pad=0.015, shrink=0.85)
        bar.set_label(label, fontsize=9)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        save(figure, path)

    def _spans(self, corners: NDArray) -> tuple[tuple[NDArray, NDArray], tuple[NDArray, NDArray]]:
        """First and end rows, first and end columns of patches in the picture; at least one pixel each."""
        spans = []
        for axis, limit in ((1, self.shape[0]), (0, self.shape[1])):
            start = (np.asarray(corners, np.float64)[:, axis] - self.origin[axis]) * self.scale
            first = np.clip(np.floor(start + 1e-6), 0, limit - 1).astype(np.int64)
            end = np.clip(np.round(start + self.patch[axis] * self.scale), first + 1, limit).astype(np.int64)
            spans.append((first, end))
        return spans[0], spans[1]


class GeoJson:
    """Patches as a GeoJSON FeatureCollection that QuPath (0.4 and later) opens, written chunk by chunk.

    Each patch is a closed rectangle in level-0 pixels: a detection with its measurements, and a classification where one is
    given. Drop the file on the image in QuPath; *Measure > Show measurement maps* colours the patches by a measurement.

    Args:
        path: of the file, which appears when it is complete.
        patch: ``(width, height)`` in level-0 pixels.
        name: of the set; makes the patches' ids.
        colors: RGB of each classification.
    """

    def __init__(
        self, path: Path, *, patch: tuple[float, float], name: str, colors: Mapping[str, tuple[int, int, int]] | None = None
    ) -> None:
        self.path, self.patch, self.name, self.colors = path, patch, name, colors or {}
        self._draft = path.with_name(path.name + ".tmp")
        self._count = 0

    def __enter__(self) -> GeoJson:
        self._file = open(self._draft, "w")
        self._file.write('{"type": "FeatureCollection", "features": [')
        return self

    def add(
        self, corners: NDArray, measurements: Mapping[str, NDArray], classifications: Sequence[str | None] | None = None
    ) -> None:
        """Patches at ``corners (N, 2)`` with ``{name: (N)}``."""
        width, height = self.patch
        columns = {name: np.asarray(column, np.float64).tolist() for name, column in measurements.items()}
        for i, (x, y) in enumerate(np.asarray(corners, np.float64).tolist()):
            ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
            properties: dict[str, Any] = {"objectType": "detection", "isLocked": True}
            if classifications is not None and (kind := classifications[i]) is not None:
                properties["classification"] = {"name": kind, "color": list(self.colors.get(kind, (128, 128, 128)))}
            properties["measurements"] = {name: column[i] for name, column in columns.items()}
            feature = {
                "type": "Feature",
                "id": str(uuid.uuid5(NAMESPACE, f"{self.name}\x1f{self._count}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": properties,
            }
            self._file.write((",\n" if self._count else "\n") + json.dumps(feature))
            self._count += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.write("\n]}\n")
        self._file.close()
        if kind is None:
            os.replace(self._draft, self.path)
        else:
            self._draft.unlink()


def load_image(path: Path, longest: int = 1600) -> tuple[NDArray, tuple[int, int]]:
    """An image, or a slide's thumbnail, as ``(H, W, 3)`` uint8 of at most ``longest`` pixels a side, and its level-0 size.

    Slides are read with openslide where it is installed.

    Raises:
        ValueError: for a file that is not there or that does not read as an image.
    """
    if not Path(path).is_file():
        raise ValueError(f"image: found no file {path}")
    try:
        import openslide

        if openslide.OpenSlide.detect_format(path) is not None:
            with openslide.OpenSlide(path) as slide:
                size = slide.dimensions
                return np.asarray(slide.get_thumbnail((longest, longest)).convert("RGB")), size
    except ImportError:
        pass
    except openslide.OpenSlideError as error:
        raise ValueError(f"image: {path} does not read as a slide ({error}); is it cut off?") from error
    try:
        with Image.open(path) as picture:
            shown = picture.convert("RGB")
            shown.thumbnail((longest, longest))
            return np.asarray(shown), picture.size
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image: {path} does not read ({error}); for a slide, pip install openslide-python openslide-bin"
        ) from error


def _colors(values: NDArray, signed: bool, clear: bool) -> tuple[ScalarMappable, NDArray]:
    """The colour scale, and the picture ``(H, W, 4)``: the clearer the weaker where ``clear``, else on plain grey."""
    there = np.isfinite(values)
    if signed:
        reach = float(np.quantile(np.abs(values[there]), 0.99)) if there.any() else 1.0
        norm, cmap = Normalize(-(reach or 1.0), reach or 1.0), colormaps["RdBu_r"]
        scaled = np.asarray(norm(np.where(there, values, 0.0)))
        strength = np.abs(2 * scaled - 1)
    else:
        norm, cmap = Normalize(0, 100), colormaps["inferno"]
        _, rank = np.unique(values[there], return_inverse=True)
        scaled = np.zeros(values.shape)
        scaled[there] = rank / max(rank.max(initial=0), 1)
        strength = scaled
    picture = cmap(np.clip(scaled, 0, 1))
    if clear:
        picture[..., 3] = np.where(there, 0.15 + 0.65 * np.clip(strength, 0, 1), 0)
    else:
        picture[~there] = 0.85, 0.85, 0.85, 1
    return ScalarMappable(norm, cmap), picture


def _rgb(patch: NDArray) -> NDArray:
    """``(C, H, W)`` of 1 or 3 channels to ``(H, W, 3)`` uint8."""
    pixels = np.moveaxis(np.asarray(patch, np.uint8), 0, -1)
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels[..., :3])
