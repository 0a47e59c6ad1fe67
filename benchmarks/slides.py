"""Cutting slides into a store of JPEG patches, against reading the same patches with openslide and keeping nothing.

    python -m benchmarks.slides [--full] [--slide FILE]

The slide is made of the pixels of a real one where ``--slide`` names it (any that openslide reads), else of noise with the
grain of tissue: a pyramid of JPEG tiles of 256 pixels. "openslide" reads each patch at the places that the ingestion found
and turns it to RGB, as every script does; "ingestion" is all of `ingest_parts`: overview, tissue, grid, reading, encoding,
shuffling, writing, index. Both on one core, in turns, best of several rounds. Reading off the tiles' grid, and reading by
openslide alone (``reader=openslide``), are shown beside it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import report, table
from benchmarks.timing import best_times
from distset.data import Store, ingest_parts
from distset.data.slides import SlidePlan, Slides

PATCH, MPP = 256, 0.5


def texture(edge: int, seed: int = 0) -> np.ndarray:
    """Pink and purple at three grains, about as hard on JPEG as tissue is."""
    from scipy.ndimage import zoom

    generator = np.random.default_rng(seed)
    grain = sum(zoom(generator.random((edge // step, edge // step)), step, order=1) for step in (4, 16, 64)) / 3
    colours = np.array([[235, 200, 220], [90, 40, 120]])
    pixels = colours[0] + grain[..., None] * (colours[1] - colours[0])
    return (pixels + generator.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)


def real_pixels(file: Path, edge: int) -> np.ndarray:
    """The middle of a slide's finest level, repeated to a square."""
    from distset.data.slides import Slide

    with Slide(file, mpp=MPP) as slide:
        width, height, _ = slide.levels[0]
        side = min(width, height, 2048) // PATCH * PATCH
        square = slide.read(0, (width - side) // 2, (height - side) // 2, side, side)
    times = -(-edge // side)
    return np.tile(square, (times, times, 1))[:edge, :edge]


def write_slide(path: Path, pixels: np.ndarray) -> None:
    import tifffile

    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(4):
            step = 2**level
            file.write(
                pixels[::step, ::step],
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                subfiletype=min(level, 1),
                resolution=(1e4 / (MPP * step),) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def readers(slide: Path, store: Store, folder: Path) -> dict[str, Callable[[], object]]:
    """One function a way."""
    import openslide

    corners = store.open("slide").coords()
    assert corners is not None
    in_order = corners[store.open("slide").rows().argsort()].int().tolist()

    def plain() -> None:
        with openslide.OpenSlide(slide) as opened:
            for x, y in in_order:
                np.asarray(opened.read_region((x, y), 0, (PATCH, PATCH)).convert("RGB"))

    def ingestion(**how: object) -> None:
        target = folder / "again"
        shutil.rmtree(target, ignore_errors=True)
        ingest_parts(Slides({"slide": slide}, SlidePlan(mpp=MPP, patch_size=PATCH, **how)), target)  # type: ignore[arg-type]

    return {
        "openslide, nothing kept": plain,
        "ingestion": ingestion,
        "ingestion, off the tiles' grid": lambda: ingestion(overlap=0.1),
        "ingestion, reader=openslide": lambda: ingestion(reader="openslide"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="a slide of four times as many patches, more rounds")
    parser.add_argument("--slide", type=Path, help="a slide whose pixels to use")
    args = parser.parse_args()
    torch.set_num_threads(1)
    edge = 12_288 if args.full else 5120
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels = texture(edge) if args.slide is None else real_pixels(args.slide, edge)
        write_slide(folder / "slide.tif", pixels)
        del pixels
        plan = SlidePlan(mpp=MPP, patch_size=PATCH)
        store = ingest_parts(Slides({"slide": folder / "slide.tif"}, plan), folder / "store")
        offset = ingest_parts(Slides({"slide": folder / "slide.tif"}, plan._replace(overlap=0.1)), folder / "offset")
        patches = {"ingestion, off the tiles' grid": offset.info.num_elements}
        ways = readers(folder / "slide.tif", store, folder)
        seconds = best_times(ways, rounds=5 if args.full else 3, seconds=20)
        bytes_a_patch = sum(store.info.shards.values()) / store.info.num_elements
    rate = {way: patches.get(way, store.info.num_elements) / seconds[way] for way in ways}
    against = rate["openslide, nothing kept"]
    table([{"way": way, "patches/s": rate[way], "of openslide": rate[way] / against} for way in ways])
    figures = {
        **{f"{way} (patches/s)": value for way, value in rate.items()},
        "patches": store.info.num_elements,
        "bytes a patch": round(bytes_a_patch),
        "pixels": "made" if args.slide is None else args.slide.name,
    }
    return report("slides", figures, {"ingestion against openslide": (rate["ingestion"] / against, ">=", 0.8)})


if __name__ == "__main__":
    raise SystemExit(main())
