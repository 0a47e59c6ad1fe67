"""Small folders in the layout of published image sets; every image has one grey value of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def grey(path: Path, value: int, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * len(mode) if mode == "RGB" else value).save(path, quality=100)


def write_celeba(folder: Path, parts: Sequence[int], seed: int = 0) -> np.ndarray:
    """Face i, grey 4 i, of part ``parts[i]`` (0 train, 1 val, 2 test); gives the attributes, -1 and 1 ``(faces, 4)``."""
    has = np.random.default_rng(seed).integers(0, 2, (len(parts), 4)) * 2 - 1
    names = [f"{i + 1:06}.jpg" for i in range(len(parts))]
    for i, name in enumerate(names):
        grey(folder / "img_align_celeba" / name, 4 * i, (178, 218))
    rows = [f"{name} {' '.join(f'{value:2}' for value in row)} " for name, row in zip(names, has)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(len(parts)), "Bald Bangs Smiling Young ", *rows, ""]))
    lines = [f"{name} {part}" for name, part in zip(names, parts)]
    (folder / "list_eval_partition.txt").write_text("\n".join([*lines, ""]))
    return has


def write_cub(folder: Path, species: Sequence[int]) -> None:
    """Bird i, grey 4 i, of ``species[i]`` from 1; every seventh photo has one channel, as some of the real ones."""
    images, labels = [], []
    for i, kind in enumerate(species):
        name = f"{kind:03}.Species_{kind}/Species_{kind}_{i:04}_{9000 + i}.jpg"
        grey(folder / "images" / name, 4 * i, (50 + i, 40), "L" if i % 7 == 0 else "RGB")
        images.append(f"{i + 1} {name}\n")
        labels.append(f"{i + 1} {kind}\n")
    (folder / "images.txt").write_text("".join(images))
    (folder / "image_class_labels.txt").write_text("".join(labels))
