"""Camelyon16 as it is downloaded: slides of lymph nodes with and without metastases, and the official test set."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from distset.data.readers.files import naming
from distset.data.slides.source import ENDINGS, SlidePlan, Slides
from distset.data.splits import Split, hold_out
from distset.seeds import seed_for

__all__ = ["camelyon16"]

LABELS = ("normal", "tumor")


def camelyon16(
    path: str | Path,
    *,
    mpp: float = 0.5,
    patch_size: int = 256,
    overlap: float = 0.0,
    least_tissue: float = 0.25,
    slide_mpp: float | None = None,
    quality: int = 90,
    reader: str = "auto",
    threads: int = 1,
    val: float = 0.2,
    seed: int = 0,
    leave_out: Sequence[str] = (),
) -> Slides:
    """The slides of Camelyon16 with their labels, its official test set, and sets to choose on held out of the rest.

    The folder is laid out as published: ``training/normal/normal_001.tif``, ``training/tumor/tumor_001.tif``,
    ``testing/images/test_001.tif`` and ``testing/reference.csv``, whose first two fields are a slide and Normal or Tumor.

    Args:
        path: the folder.
        mpp, patch_size, overlap, least_tissue, slide_mpp, quality, reader, threads: see `SlidePlan`.
        val: share of the training slides to choose on (early stopping, threshold), stratified.
        seed: of that choice.
        leave_out: slides not to use, such as ones known to be labelled wrongly.

    Raises:
        ValueError: for folders or files that are missing, a test slide without a label, a slide to leave out that is not
            there.

    References:
        Ehteshami Bejnordi et al.: Diagnostic assessment of deep learning algorithms for detection of lymph node metastases
        in women with breast cancer. JAMA 2017. https://camelyon16.grand-challenge.org
    """
    root = Path(path)
    train = {label: _slides(root / "training" / label) for label in LABELS}
    test = _slides(root / "testing" / "images")
    files = {file.stem: file for group in (*train.values(), test) for file in group}
    if unknown := [name for name in leave_out if name not in files]:
        raise ValueError(f"leave_out: {root} holds no slide {unknown[0]!r}, wanted names such as {next(iter(files))!r}")
    labels = {file.stem: label for label, group in train.items() for file in group}
    labels |= _reference(root / "testing" / "reference.csv", [file.stem for file in test])
    files = {name: file for name, file in files.items() if name not in leave_out}
    learned = {name: labels[name] for group in train.values() for name in (f.stem for f in group) if name in files}
    rest, chosen = hold_out(learned, share=val, seed=seed_for(seed, "val"))
    split = Split(rest, chosen, [file.stem for file in test if file.stem in files])
    plan = SlidePlan(mpp, patch_size, overlap, least_tissue, slide_mpp, quality=quality, reader=reader, threads=threads)
    return Slides(files, plan, labels=labels, splits=[split])


def _slides(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.glob("*") if file.suffix.lower() in ENDINGS)
    if not found:
        raise ValueError(
            f"path: {folder} holds no slides, wanted the layout of Camelyon16: training/normal, training/tumor, "
            f"testing/images and testing/reference.csv"
        )
    return found


def _reference(file: Path, wanted: Sequence[str]) -> dict[str, str]:
    """The labels of the test slides."""
    if not file.is_file():
        raise ValueError(f"path: {file} is missing, wanted the labels of the test slides")
    with naming(file), open(file, newline="", encoding="utf-8-sig") as lines:
        rows = [row for row in csv.reader(lines) if len(row) > 1]
    found = {Path(row[0].strip()).stem: row[1].strip().lower() for row in rows}
    if missing := [name for name in wanted if found.get(name) not in LABELS]:
        said = found.get(missing[0])
        raise ValueError(f"{file}: says {said!r} of {missing[0]!r} (and {len(missing) - 1} more), wanted Normal or Tumor")
    return {name: found[name] for name in wanted}
