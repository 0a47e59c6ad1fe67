"""Image completion: images as sets of pixels, as the parts of a problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distset.data.celeba import celeba_faces
from distset.data.idx_images import read_idx_folder
from distset.seeds import generator_for, seed_for
from distset.sets import InMemory
from distset.task import LazyExamples
from distset.tasks.completion import Images, context_of, gaussian_nll, pixel_places
from distset.train import Example, Parts

__all__ = ["faces", "grey_images"]

CONTEXTS = (100, 200, 300, 400, 500)
GROUP = 50
"""Validation and test images completed at once."""


def grey_images(
    path: str,
    *,
    images: Sequence[int] = (50_000, 100, 500),
    side: int = 32,
    contexts: Sequence[int] = CONTEXTS,
    chunk_size: int | None = 100,
    seed: int = 0,
) -> Parts:
    """Images of a folder of idx files such as MNIST, with a black border up to ``side`` pixels (32: 1,024 as in CelebA).

    Args:
        path: the folder.
        images: how many to train, validate (the last ones of the training file) and test.
        side: rows and columns, at least those of the images.
        contexts: sizes of the context that validation and test images are completed from.
        chunk_size: pixels a chunk of those contexts.
        seed: of the contexts.
    """
    train, test = read_idx_folder(path, "train").images, read_idx_folder(path, "test").images
    if images[0] + images[1] > len(train) or images[2] > len(test):
        raise ValueError(
            f"images: got {list(images)}, wanted at most {len(train)} to train and validate, {len(test)} to test"
        )
    border = side - train.shape[-1]
    if border < 0:
        raise ValueError(f"side: got {side}, wanted at least the {train.shape[-1]} of the images")
    around = (border // 2, border - border // 2) * 2
    parts = [train[: images[0]], train[len(train) - images[1] :], test[: images[2]]]
    return _parts([F.pad(part, around).unsqueeze(-1) for part in parts], contexts, chunk_size, seed)


def faces(
    path: str,
    *,
    images: Sequence[int] = (20_000, 200, 1000),
    side: int = 32,
    contexts: Sequence[int] = CONTEXTS,
    chunk_size: int | None = 100,
    seed: int = 0,
) -> Parts:
    """The first faces of each part of CelebA, scaled to ``side`` pixels; see `distset.data.celeba` for the files."""
    parts = [
        (celeba_faces(path, part, count=count, side=side) * 255).round().to(torch.uint8)
        for part, count in zip(("train", "val", "test"), images, strict=True)
    ]
    return _parts(parts, contexts, chunk_size, seed)


class _Pixels(LazyExamples):
    """Images uint8 ``(M, H, W, C)`` as sets of pixels (place, value), made when they are asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.places = images, pixel_places(*images.shape[1:3])

    def __len__(self) -> int:
        return len(self.images)

    def elements(self, index: slice) -> Tensor:
        """``(B, H W, 2 + C)``"""
        values = self.images[index].flatten(1, 2).float() / 255
        return torch.cat([self.places.expand(len(values), -1, -1), values], -1)

    def example(self, index: int) -> Example:
        return Example(InMemory(self.elements(slice(index, index + 1))[0], name=f"image-{index}"), None)


def _parts(images: Sequence[Tensor], contexts: Sequence[int], chunk_size: int | None, seed: int) -> Parts:
    pixels = images[0].shape[1] * images[0].shape[2]
    if not contexts or not 1 <= min(contexts) <= max(contexts) <= pixels:
        raise ValueError(f"contexts: got {list(contexts)}, wanted sizes from 1 to the {pixels} pixels of an image")
    train, val, test = map(_Pixels, images)
    return Parts(
        train,
        _contexts(val, contexts, chunk_size, seed_for(seed, "val")),
        _contexts(test, contexts, chunk_size, seed_for(seed, "test")),
        {"shape": list(images[0].shape[1:])},
        {"loss_of_mean_image": _mean_image(train, test)},
    )


def _contexts(part: _Pixels, contexts: Sequence[int], chunk_size: int | None, seed: int) -> list[Example]:
    """Every group of images with every size of context."""
    found = []
    for start in range(0, len(part), GROUP):
        elements = part.elements(slice(start, start + GROUP))
        for size in contexts:
            given = context_of(elements, size, generator_for(seed, start, size))
            set = InMemory(given, chunk_size, name=f"images-{start}-{size}")
            found.append(Example(set, Images(elements[..., 2:], size)))
    return found


def _mean_image(train: _Pixels, test: _Pixels) -> float:
    """The loss of the mean and deviation of every pixel over the training images, whatever the context."""
    some = train.elements(slice(0, 2000))[..., 2:]
    deviation = some.std(0, correction=0).clamp_min(0.1)
    output = torch.cat([some.mean(0), deviation], -1)
    return float(gaussian_nll(output, test.elements(slice(0, len(test)))[..., 2:]).mean())
