"""Images of a folder of idx files (MNIST, Fashion-MNIST and their kin) as sets of pixels.

An image is the set of its n pixels, in order, a grey value in [0, 1] each: ``(n, 1)``. Training images come one by one,
those to validate and test in groups, ``(B, n, 1)``. As published, 10,000 of the 60,000 training images are drawn for
validation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distset.data.idx_images import LabelledImages, read_idx_folder
from distset.seeds import generator_for
from distset.sets import InMemory
from distset.task import LazyExamples
from distset.tasks.subset_knn import Labelled
from distset.train import Example, Parts

__all__ = ["ImageExamples", "images", "neighbours"]

GROUP = 500
"""Validation and test images that are looked at together."""


class ImageExamples(LazyExamples):
    """Images one by one, with their class number as target; kept as bytes until one is asked for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.bytes, self.labels = images.flatten(1), labels

    def __len__(self) -> int:
        return len(self.labels)

    def example(self, index: int) -> Example:
        pixels = self.bytes[index].float().div_(255).unsqueeze(-1)
        return Example(InMemory(pixels, name=f"image-{index}"), self.labels[index])


def images(path: str, *, train: int | None = None, val: int = 10_000, test: int | None = None, seed: int = 0) -> Parts:
    """Images with their class numbers.

    Args:
        path: a folder of idx files.
        train, test: images to use of each part; None for all. Which ones is drawn by ``seed``.
        val: training images to validate on.
        seed: of the draws.

    Raises:
        ValueError: for a folder without the files, numbers of images that it does not have.
    """
    training, validation, testing = _parts(path, train, val, test, seed)
    n = training.images[0].numel()
    mean = training.pixels().mean(0)
    a_pixel = float(F.binary_cross_entropy(mean.expand(len(testing.labels), n), testing.pixels()))
    simple = {"mean_image_nats_a_pixel": a_pixel, "mean_image_nats_an_image": n * a_pixel}
    return Parts(
        ImageExamples(*training), _groups(validation), _groups(testing), {"n": n, "width": training.images.shape[2]}, simple
    )


def neighbours(
    path: str, *, references: int | None = None, train: int | None = None, val: int = 10_000, test: int | None = None,
    seed: int = 0,
) -> Parts:  # fmt: skip
    """As `images`, where validation and test are about neighbours: training images to find come first, then queries.

    Targets of validation and test groups are `Labelled`.

    Args:
        path, train, val, test, seed: as in `images`.
        references: training images among which neighbours are looked for; None for all.

    Raises:
        ValueError: as `images`.
    """
    training, validation, testing = _parts(path, train, val, test, seed)
    most = len(training.labels)
    if references is not None and not 1 <= references <= most:
        raise ValueError(f"references: got {references:,} images, wanted 1 to {most:,}: there are no more to train on")
    found = LabelledImages(training.images[:references], training.labels[:references])
    known = [example._replace(target=Labelled(example.target, False)) for example in _groups(found)]
    asked = [
        [example._replace(target=Labelled(example.target, True)) for example in _groups(part)]
        for part in (validation, testing)
    ]
    n = training.images[0].numel()
    largest = float((testing.labels == training.labels.mode().values).float().mean())
    return Parts(ImageExamples(*training), known + asked[0], known + asked[1], {"n": n}, {"largest_class": largest})


def _parts(path: str, train: int | None, val: int, test: int | None, seed: int) -> list[LabelledImages]:
    read = {part: read_idx_folder(path, part) for part in ("train", "test")}
    order = {
        part: torch.randperm(len(found.labels), generator=generator_for(seed, part, "images"))
        for part, found in read.items()
    }
    most = len(order["train"]) - val
    for name, count, bound in (("val", val, most + val - 1), ("train", train, most), ("test", test, len(order["test"]))):
        if count is not None and not 1 <= count <= bound:
            raise ValueError(f"{name}: got {count:,} images, wanted 1 to {bound:,}: {path} has no more")
    picked = [order["train"][val:][:train], order["train"][:val], order["test"][:test]]
    return [
        LabelledImages(found.images[rows], found.labels[rows])
        for rows, found in zip(picked, (read["train"], read["train"], read["test"]))
    ]


def _groups(part: LabelledImages) -> list[Example]:
    pixels = part.pixels().unsqueeze(-1)
    return [
        Example(InMemory(group, name=f"images-{GROUP * number}"), labels)
        for number, (group, labels) in enumerate(zip(pixels.split(GROUP), part.labels.split(GROUP)))
    ]
