"""CelebA as offers of faces: a majority that shares two attributes, and odd ones that have neither.

The folder is the one that the data set's own archives make: ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt`` and
``list_eval_partition.txt``.

References:
    Liu, Luo, Wang, Tang 2015, "Deep Learning Face Attributes in the Wild", ICCV.
    Zaheer et al. 2017 and Ou et al. 2022 (offers of 8 with 2 or 3 odd ones).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distset.data.schema import need
from distset.offers import Offers
from distset.seeds import seed_for

__all__ = ["celeba_faces", "celeba_offers"]

PARTS = {"train": "0", "val": "1", "test": "2"}


def celeba_offers(
    path: str | Path, part: str, *, sets: int, size: int = 8, chosen: tuple[int, int] = (2, 3), side: int = 32, seed: int = 0
) -> Offers:
    """Offers of ``size`` faces of ``part``, as flat values ``(sets, size, 3 side side)`` in [0, 1].

    Raises:
        ValueError: for a folder without the files, a part that does not exist.
    """
    if part not in PARTS:
        raise ValueError(f"part: got {part!r}, wanted one of {', '.join(PARTS)}")
    folder = Path(path)
    names, has = _attributes(folder, PARTS[part])
    faces = torch.empty(sets, size, 3 * side * side)  # filled in place: a list of so many would need twice the memory
    picked = np.zeros((sets, size), dtype=bool)
    for b in range(sets):
        rng = np.random.default_rng(seed_for(seed, "faces", part, b))
        count = int(rng.integers(chosen[0], chosen[1] + 1))
        both, neither = _pools(has, rng, size - count, count)
        picked[b, rng.choice(size, count, replace=False)] = True
        row = np.empty(size, dtype=np.int64)
        row[picked[b]] = rng.choice(neither, count, replace=False)
        row[~picked[b]] = rng.choice(both, size - count, replace=False)
        for place, i in enumerate(row):
            faces[b, place] = _face(folder / "img_align_celeba" / names[i], side)
    return Offers(faces, torch.tensor(picked), rule="faces without two attributes of the others")


def celeba_faces(path: str | Path, part: str, *, count: int | None = None, side: int = 32) -> Tensor:
    """The first ``count`` faces of ``part`` (all of them if None), values ``(count, side, side, 3)`` in [0, 1].

    Raises:
        ValueError: for a folder without the files, a part that does not exist.
    """
    if part not in PARTS:
        raise ValueError(f"part: got {part!r}, wanted one of {', '.join(PARTS)}")
    folder = Path(path)
    names, _ = _attributes(folder, PARTS[part])
    faces = [_face(folder / "img_align_celeba" / name, side) for name in names[:count]]
    return torch.stack(faces).view(-1, 3, side, side).permute(0, 2, 3, 1).contiguous()


def _attributes(folder: Path, part: str) -> tuple[list[str], np.ndarray]:
    """File names of the part and their attributes, bool ``(faces, attributes)``."""
    files = [folder / name for name in ("list_attr_celeba.txt", "list_eval_partition.txt")]
    if missing := [file.name for file in [*files, folder / "img_align_celeba"] if not file.exists()]:
        raise ValueError(f"path: {folder} has no {', '.join(missing)}, wanted the unpacked archives of CelebA")
    own = {name for name, code in (line.split() for line in files[1].read_text().splitlines() if line) if code == part}
    rows = [line.split() for line in files[0].read_text().splitlines()[2:] if line]
    kept = [row for row in rows if row[0] in own]
    return [row[0] for row in kept], np.array([[value == "1" for value in row[1:]] for row in kept])


def _pools(has: np.ndarray, rng: np.random.Generator, many: int, few: int) -> tuple[np.ndarray, np.ndarray]:
    """Faces with both of two attributes, and faces with neither; pairs that cannot fill an offer are drawn again."""
    for _ in range(1000):
        first, second = rng.choice(has.shape[1], 2, replace=False)
        both = np.flatnonzero(has[:, first] & has[:, second])
        neither = np.flatnonzero(~has[:, first] & ~has[:, second])
        if len(both) >= many and len(neither) >= few:
            return both, neither
    raise ValueError(f"path: no two attributes are shared by {many} faces and missing in {few}; are there enough faces?")


def _face(path: Path, side: int) -> Tensor:
    image = need("PIL.Image").open(path).convert("RGB").resize((side, side))
    return torch.tensor(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1).reshape(-1)
