"""The colon bags: patches around the nuclei of H&E images, positive where a nucleus is epithelial."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from distset.data.bag import Bag
from distset.data.readers.files import FileSource, naming
from distset.data.schema import need

__all__ = ["colon"]


def colon(path: str | Path, *, patch_size: int = 27) -> FileSource:
    """One bag an image, one uint8 patch ``(3, patch_size, patch_size)`` a nucleus, with its position and, as the instance
    label, whether it is epithelial. Patches at the border continue the image by reflection.

    Args:
        path: the folder of ``img<N>.png``, ``nuclei.csv`` (``image,x,y,class``; x the column, y the row, 1-based) and
            ``labels.csv`` (``image,y``).
        patch_size: edge of a patch in pixels; odd, so that the nucleus is its centre.

    Raises:
        ValueError: for missing files or columns, an even patch size.

    References:
        Sirinukunwattana et al.: Locality sensitive deep learning for detection and classification of nuclei in routine
        colon cancer histology images. IEEE TMI 2016.
        Ilse, Tomczak, Welling: Attention-based deep multiple instance learning. ICML 2018. arXiv:1802.04712
    """
    folder = Path(path)
    if patch_size < 1 or patch_size % 2 == 0:
        raise ValueError(f"patch_size: got {patch_size}, wanted an odd number of pixels")
    nuclei: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for row in _rows(folder / "nuclei.csv", "image", "x", "y", "class"):
        nuclei[row["image"]].append((float(row["x"]) - 1, float(row["y"]) - 1, int(row["class"] == "epithelial")))
    labels = {row["image"]: row["y"] for row in _rows(folder / "labels.csv", "image", "y")}

    def read(set_id: str, file: Path) -> Bag:
        found = np.array(nuclei[set_id.removeprefix("img")])
        with need("PIL.Image").open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        patches = cut(pixels, found[:, :2], patch_size)
        extra = {"patch_size": patch_size, "coords_unit": "px", "anchor": "center", "image": str(file.resolve())}
        label = labels[set_id.removeprefix("img")]
        return Bag(set_id, patches, found[:, :2], found[:, 2].astype(np.int32), label=label, extra=extra)

    with naming(folder):
        files = {f"img{name}": folder / f"img{name}.png" for name in sorted(nuclei, key=int)}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise ValueError(f"path: {len(missing)} images are missing, the first is {missing[0]}")
    return FileSource(files, read)


def cut(pixels: np.ndarray, centres: np.ndarray, size: int) -> np.ndarray:
    """Patches ``(N, C, size, size)`` of an image ``(H, W, C)`` around ``centres (N, 2)``, x and y of pixels from 0."""
    half = size // 2
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((half, half), (half, half), (0, 0)), mode="reflect").transpose(2, 0, 1)
    x = np.clip(np.rint(centres[:, 0]).astype(int), 0, width - 1)
    y = np.clip(np.rint(centres[:, 1]).astype(int), 0, height - 1)
    return np.stack([padded[:, top : top + size, left : left + size] for left, top in zip(x, y)])


def _rows(file: Path, *columns: str) -> list[dict[str, str]]:
    with naming(file), open(file, newline="") as lines:
        reader = csv.DictReader(lines)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise ValueError(f"lacks the columns {', '.join(sorted(missing))}, has {', '.join(reader.fieldnames or ())}")
        return list(reader)
