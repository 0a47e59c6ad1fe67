"""Images to retrieve by class: classes met in training, and others held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distset.data.idx_images import read_idx_folder
from distset.data.schema import need
from distset.seeds import generator_for
from distset.sets import InMemory
from distset.train import Example, Parts

__all__ = ["birds", "digits"]


def digits(
    path: str, *, held_out: Sequence[int] = (5, 6, 7, 8, 9), images: int = 10_000, tested: int = 1000, seed: int = 0
) -> Parts:
    """Images of a folder of idx files (MNIST, Fashion-MNIST).

    Training and validation have the classes that are not ``held_out``, the test part has those alone: a network that has
    only learned the names of its classes retrieves nothing there.

    Args:
        path: of the folder.
        held_out: classes of the test part.
        images: to train on.
        tested: to validate on, and to test on.
        seed: of their choice.
    """
    train, test = read_idx_folder(path, "train"), read_idx_folder(path, "test")
    known = ~torch.isin(train.labels, torch.tensor(held_out))
    seen, fresh = ~torch.isin(test.labels, torch.tensor(held_out)), torch.isin(test.labels, torch.tensor(held_out))
    pools = [(train, known, images, 1), (test, seen, tested, None), (test, fresh, tested, None)]
    parts = []
    for place, (pool, mask, count, group) in enumerate(pools):
        own = _draw(mask, count, seed, place)
        parts.append(_examples(pool.images[own].unsqueeze(1).float() / 255, pool.labels[own], group))
    first, second, third = parts
    return Parts(first, second, third, {"shape": (1, *train.images.shape[1:])})


def birds(path: str, *, side: int = 64, tested: int = 1000, seed: int = 0) -> Parts:
    """CUB-200-2011 as published: the first 100 species to train on, the others to test on.

    The folder is that of the data set's own archive: ``images.txt``, ``image_class_labels.txt``, ``images/``.

    Raises:
        ValueError: for a folder without these files, an image without a label.
    """
    folder = Path(path)
    if missing := [name for name in ("images.txt", "image_class_labels.txt", "images") if not (folder / name).exists()]:
        raise ValueError(f"path: {folder} has no {', '.join(missing)}, wanted the unpacked archive CUB_200_2011")
    name_of, species_of = (_by_number(folder / name) for name in ("images.txt", "image_class_labels.txt"))
    if missing := [number for number in name_of if number not in species_of]:
        raise ValueError(f"path: {folder}/image_class_labels.txt lacks image {missing[0]} of images.txt; is it whole?")
    names, labels = list(name_of.values()), torch.tensor([int(species_of[number]) for number in name_of])
    rows = [_draw(labels <= 100, len(labels), seed, 0), _draw(labels > 100, len(labels), seed, 1)]
    cut = max(1, len(rows[0]) // 10)
    chosen = [(rows[0][cut:], 1), (rows[0][:cut][:tested], None), (rows[1][:tested], None)]
    parts = [
        _examples(torch.stack([_photo(folder / "images" / names[i], side) for i in own.tolist()]), labels[own], group)
        for own, group in chosen
    ]
    first, second, third = parts
    return Parts(first, second, third, {"shape": (3, side, side)})


def _by_number(path: Path) -> dict[str, str]:
    """Lines of an image's number and something of it."""
    return dict(line.split() for line in path.read_text().splitlines() if line)


def _draw(mask: Tensor, count: int, seed: int, place: int) -> Tensor:
    rows = mask.nonzero().squeeze(-1)
    return rows[torch.randperm(len(rows), generator=generator_for(seed, "images", place))[:count]]


def _examples(images: Tensor, labels: Tensor, group: int | None) -> list[Example]:
    """Sets of ``group`` images, or all in one."""
    size = len(images) if group is None else group
    return [
        Example(InMemory(images[i : i + size], element_ndim=3, name=f"images-{i}"), labels[i : i + size])
        for i in range(0, len(images), size)
    ]


def _photo(path: Path, side: int) -> Tensor:
    image = need("PIL.Image").open(path).convert("RGB").resize((side, side))
    return torch.tensor(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
