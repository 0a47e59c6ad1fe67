"""Folders of image patches: one folder a bag, one image file an element."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distset.data.bag import Bag
from distset.data.readers.files import FileSource, files_below

__all__ = ["ImageFiles", "patches"]

ENDINGS = (".jpg", ".jpeg", ".png")


class ImageFiles:
    """The bytes of image files, read when they are asked for; see `Encoded`."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def take(self, positions: Sequence[int]) -> list[bytes]:
        return [self._files[position].read_bytes() for position in positions]


def patches(path: str | Path, *, folder_is_label: bool = False, coords: str | None = r"(\d+)[_x,-](\d+)$") -> FileSource:
    """Bags of JPEG or PNG files; their bytes are stored as they are, and decoded on reading.

    A folder with images in it is a bag, named by its path below ``path``. All patches must have one size.

    Args:
        path: the folder of folders.
        folder_is_label: take the name of the folder above a bag's as its label (``single/tumour/slide-7/*.jpg``).
        coords: a regular expression whose two groups are x and y at the end of a file's name without its ending
            (``slide-7_1024_512.jpg``); used where it fits all of a bag's files. None for no coordinates.

    Raises:
        ValueError: for a path that is no folder, or holds no folder of images.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"path: {root} is not a folder, wanted one with a folder of images for each bag")
    pattern = None if coords is None else re.compile(coords)
    folders = sorted({file.parent for file in files_below(root) if file.suffix.lower() in ENDINGS} - {root})
    if not folders:
        raise ValueError(f"path: {root} holds no folder with {', '.join(ENDINGS)} files, wanted one for each bag")

    def read(set_id: str, folder: Path) -> Bag:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
        label = folder.parent.name if folder_is_label else None
        extra = {"coords_unit": "px", "anchor": "corner", "folder": str(folder.resolve())}
        return Bag(set_id, ImageFiles(files), _coords(files, pattern), label=label, extra=extra)

    return FileSource({folder.relative_to(root).as_posix(): folder for folder in folders}, read)


def _coords(files: Sequence[Path], pattern: re.Pattern[str] | None) -> np.ndarray | None:
    if pattern is None:
        return None
    found = [pattern.search(file.stem) for file in files]
    if not all(found):
        return None
    return np.array([[float(number) for number in match.groups()] for match in found if match])
