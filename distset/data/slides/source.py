"""Whole-slide images as a source of sets: tissue, grid, patches as JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distset.data.bag import Bag, NothingToStore
from distset.data.readers.files import bag_files, naming
from distset.data.schema import need
from distset.data.slides.grid import Cut, plan_grid
from distset.data.slides.reading import Slide
from distset.data.slides.spool import Spool
from distset.data.slides.tissue import tissue_mask
from distset.data.splits import Split

__all__ = ["ENDINGS", "Patches", "SlidePlan", "Slides", "slides"]

ENDINGS = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu", ".dcm")


class SlidePlan(NamedTuple):
    """How slides are cut.

    Attributes:
        mpp: micrometres a pixel of a patch; the level that comes closest from below is read, and resampled where it is more
            than 5 % off.
        patch_size: edge of a patch in its own pixels.
        overlap: share of a patch's edge that it has in common with the next, 0 to below 1.
        least_tissue: the smallest share of a patch that is tissue, above 0 to 1.
        slide_mpp: micrometres a pixel of level 0, for slides that do not say it; None makes them an error.
        overview: edge in pixels of the picture in which tissue is looked for, at most.
        least_saturation: the lowest threshold of the saturation, of 255; see `tissue_mask`.
        quality: of the JPEG.
        reader: see `Slide`.
        threads: that read and encode one slide's patches.
    """

    mpp: float = 0.5
    patch_size: int = 256
    overlap: float = 0.0
    least_tissue: float = 0.25
    slide_mpp: float | None = None
    overview: int = 1024
    least_saturation: int = 15
    quality: int = 90
    reader: str = "auto"
    threads: int = 1

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        for name in ("mpp", "patch_size", "least_tissue", "overview", "quality", "threads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted a number above 0")
        if not 0 <= self.overlap < 1 or self.least_tissue > 1 or self.quality > 100:
            raise ValueError(
                f"overlap, least_tissue, quality: got {self.overlap}, {self.least_tissue}, {self.quality}, wanted shares of "
                f"0 to below 1 and above 0 to 1, and 1 to 100"
            )
        if self.slide_mpp is not None and not 0 < self.slide_mpp < 1e3:
            raise ValueError(f"slide_mpp: got {self.slide_mpp}, wanted micrometres a pixel, such as 0.25")


class Patches(NamedTuple):
    """The patches of an opened slide.

    Attributes:
        coords: upper left corners ``(N, 2)``, x and y in pixels of level 0.
        pixels: gives them in order, each ``(size, size, 3)`` uint8; anew each time it is called.
        extra: what a store keeps of the slide; see `Bag`.
    """

    coords: np.ndarray
    pixels: Callable[[], Iterator[np.ndarray]]
    extra: dict[str, Any]


def slides(
    path: str | Path,
    *,
    mpp: float = 0.5,
    patch_size: int = 256,
    overlap: float = 0.0,
    least_tissue: float = 0.25,
    slide_mpp: float | None = None,
    overview: int = 1024,
    least_saturation: int = 15,
    quality: int = 90,
    reader: str = "auto",
    threads: int = 1,
) -> Slides:
    """The slides of a folder, folders below included; one set a slide, named by its path without its ending.

    Args:
        path: the folder.
        mpp, patch_size, overlap, least_tissue, slide_mpp, overview, least_saturation, quality, reader, threads: see
            `SlidePlan`.

    Raises:
        ValueError: for a path that is no folder or holds no slides, values out of range.
    """
    plan = SlidePlan(mpp, patch_size, overlap, least_tissue, slide_mpp, overview, least_saturation, quality, reader, threads)
    return Slides(bag_files(path, ENDINGS), plan)


class Slides:
    """A `Source` of slides; see `slides`.

    Args:
        files: ``{set_id: file}``.
        plan: how they are cut.
        labels: ``{set_id: label}`` where they are known.
        splits: that the slides come with, one a fold.
    """

    apart = True  # each slide is work enough to be written on its own, by any number of workers

    def __init__(
        self,
        files: Mapping[str, Path],
        plan: SlidePlan = SlidePlan(),  # noqa: B008
        *,
        labels: Mapping[str, str] | None = None,
        splits: Iterable[Split] = (),
    ) -> None:
        plan.check()
        self.files, self.plan, self.labels = dict(files), plan, dict(labels or {})
        self.splits: list[Split] = list(splits)

    @property
    def ids(self) -> list[str]:
        return list(self.files)

    def size(self, set_id: str) -> int:
        """Bytes of the slide's file: about the work that it takes."""
        file = self.files[set_id]
        return file.stat().st_size if file.is_file() else 0

    def read(self, set_id: str) -> Bag:
        """The slide's patches, as JPEG.

        Raises:
            ValueError: for a slide that does not read.
            NothingToStore: for one without tissue.
        """
        with self.open(set_id) as patches:
            spool = Spool((3, self.plan.patch_size, self.plan.patch_size))
            for data in _in_threads(self._encode, patches.pixels(), self.plan.threads):
                spool.append(data)
        return self.bag(set_id, spool, patches)

    def bag(self, set_id: str, elements: Any, patches: Patches) -> Bag:
        """A bag of ``elements``, one a patch."""
        return Bag(set_id, elements, patches.coords, label=self.labels.get(set_id), extra=patches.extra)

    @contextmanager
    def open(self, set_id: str) -> Iterator[Patches]:
        """The slide's patches, to be read while the context is open; raises as `read` does."""
        file, plan = self.files[set_id], self.plan
        with ExitStack() as stack:
            with naming(file):  # and not what is done with the patches
                slide = stack.enter_context(Slide(file, reader=plan.reader, mpp=plan.slide_mpp))
                cut, corners, tissue = self._look(slide)
            extra = {
                "image": str(file.resolve()),
                "patch_size": cut.extent,
                "coords_unit": "px",
                "anchor": "corner",
                "mpp": round(cut.mpp, 6),
                "slide_mpp": slide.mpp,
                "slide_size": list(slide.levels[0][:2]),
                "tissue": round(tissue, 4),
            }
            coords = np.rint(corners * cut.downsample).astype(np.float64)
            yield Patches(coords, lambda: _pixels(slide, cut, corners, plan.threads), extra)

    def _look(self, slide: Slide) -> tuple[Cut, np.ndarray, float]:
        """How to cut it, the corners of the patches in pixels of the level to read, and the share of tissue."""
        plan = self.plan
        cut = Cut.of(slide.levels, slide.mpp, mpp=plan.mpp, size=plan.patch_size, overlap=plan.overlap)
        picture, scale = slide.overview(plan.overview)
        mask = tissue_mask(picture, least=plan.least_saturation)
        corners = plan_grid(cut, slide.levels[cut.level], mask, scale, plan.least_tissue)
        _check_found(corners, mask, cut, slide)
        slide.trust(cut.level, corners, cut.side)
        return cut, corners, float(mask.mean())

    def _encode(self, pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        need("PIL.Image").fromarray(pixels).save(file, "JPEG", quality=self.plan.quality)
        return file.getvalue()


def _check_found(corners: np.ndarray, mask: np.ndarray, cut: Cut, slide: Slide) -> None:
    if len(corners):
        return
    width, height, _ = slide.levels[0]
    if min(width, height) < cut.extent:
        raise NothingToStore(f"{width} x {height} pixels are less than one patch, which spans {cut.extent:g}")
    raise NothingToStore(
        f"no patch has enough tissue ({mask.mean():.1%} of the slide is); lower least_tissue or least_saturation if there "
        f"is some"
    )


def _pixels(slide: Slide, cut: Cut, corners: np.ndarray, threads: int) -> Iterator[np.ndarray]:
    image = need("PIL.Image")

    def one(corner: np.ndarray) -> np.ndarray:
        with naming(slide.path):
            pixels = slide.read(cut.level, int(corner[0]), int(corner[1]), cut.side, cut.side)
        if cut.side == cut.size:
            return pixels
        smaller = image.fromarray(pixels).resize((cut.size, cut.size), image.Resampling.BICUBIC)
        return np.asarray(smaller)

    return _in_threads(one, iter(corners), threads)


def _in_threads(fn: Callable[[Any], Any], items: Iterator[Any], threads: int) -> Iterator[Any]:
    """``fn`` of each item in order, by several threads, a few items ahead and never more."""
    if threads == 1:
        yield from map(fn, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: Sequence[Any] = [pool.submit(fn, item) for item in islice(items, 4 * threads)]
        while waiting:
            first, *rest = waiting
            yield first.result()
            waiting = [*rest, *(pool.submit(fn, item) for item in islice(items, 1))]
