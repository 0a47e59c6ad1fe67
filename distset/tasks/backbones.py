"""Feature extractors that go inside the encoder: elements ``(M, *element)`` to features ``(M, D)``, trained end to end.

Each is a function of the element's shape and its own settings, so that a configuration need not repeat what the data says.
None has BatchNorm in training mode: with it, an element's features would depend on which others share its chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distset.sets import Chunk, ChunkedSet
from distset.tasks.resnet import ResNet18, load_published
from distset.train import World

__all__ = ["Dihedral", "Pixels", "Standardise", "auto", "cnn", "external", "mlp", "resnet18", "standardise"]


class Pixels(nn.Module):
    """Bytes 0..255 to normalised floats, ``(x / 255 - mean) / std`` by channel.

    Args:
        channels: of the images.
        mean, std: one number for all channels, or one each.
    """

    def __init__(self, channels: int, mean: float | Sequence[float] = 0.5, std: float | Sequence[float] = 0.5) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        for name, figures in (("mean", mean), ("std", std)):
            value = torch.as_tensor(figures, dtype=torch.float32).expand(channels)
            self.register_buffer(name, value.reshape(channels, 1, 1).clone(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std


class Standardise(nn.Module):
    """Features to mean 0 and deviation 1, by the statistics of the training elements (see `fit`); features that do not
    vary are only centred."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def fit(self, sets: Iterable[ChunkedSet]) -> None:
        """Measure mean and deviation over all elements in one sweep; each process reads the sets it is given."""
        total = torch.zeros(2 * len(self.mean) + 1, dtype=torch.float64)
        for set in sets:
            total += torch.cat(set.merge(_moments))
        World().add_up([total])
        n, first, second = total[0], *total[1:].view(2, -1)
        variance = (second / n - (first / n) ** 2).clamp_min(0)
        flat = variance <= 1e-12 * (second / n)
        self.mean.copy_(first / n)
        self.std.copy_(torch.where(flat, 1.0, variance.sqrt()))


class _Moments(NamedTuple):
    n: Tensor
    first: Tensor
    second: Tensor

    def merge(self, other: _Moments) -> _Moments:
        return _Moments(*(a + b for a, b in zip(self, other)))


def _moments(chunk: Chunk) -> _Moments:
    x = chunk.elements.double()
    return _Moments(torch.tensor([float(chunk.size)], dtype=torch.float64), x.sum(0), x.square().sum(0))


def auto(shape: Sequence[int]) -> nn.Module:
    """`cnn` for images, `mlp` for vectors."""
    return cnn(shape) if len(shape) == 3 else mlp(shape)


def standardise(shape: Sequence[int]) -> nn.Module:
    """Vectors as they are, standardised."""
    return Standardise(_dim(shape))


def mlp(shape: Sequence[int], *, width: int = 128, dropout: float = 0.0) -> nn.Module:
    """Standardised vectors through one hidden layer's worth of features, as most users of frozen features do."""
    dim = _dim(shape)
    return nn.Sequential(Standardise(dim), nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout))


def cnn(
    shape: Sequence[int],
    *,
    widths: Sequence[int] = (16, 32),
    dim: int = 64,
    dropout: float = 0.0,
    group_norm: bool = True,
    dihedral: bool = False,
) -> nn.Module:
    """A small convolutional network for small images: blocks of 3x3 convolution, GroupNorm, ReLU and 2x2 pooling.

    Args:
        shape: ``(channels, height, width)``, bytes.
        widths: channels of each block; each halves the image.
        dim: width of the features.
        group_norm: off where the level of a colour tells something, as with stains.
        dihedral: turn and mirror each training image at random, for images without an upright side.
    """
    channels, height, width = _image(shape)
    if min(height, width) >> len(widths) == 0:
        raise ValueError(f"widths: got {len(widths)} blocks, too many halvings for images of {height} x {width}")
    layers: list[nn.Module] = [Pixels(channels), *([Dihedral()] if dihedral else [])]
    for before, after in zip([channels, *widths], widths):
        norm = [nn.GroupNorm(min(4, after), after)] if group_norm else []
        layers += [nn.Conv2d(before, after, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2)]
    flat = widths[-1] * (height >> len(widths)) * (width >> len(widths))
    layers += [nn.Flatten(), nn.Dropout(dropout), nn.Linear(flat, dim), nn.ReLU()]
    return nn.Sequential(*layers)


class Dihedral(nn.Module):
    """One of the eight turns and mirrorings of the square for each image, while training.

    It draws from torch's default generators, which `encode_set` seeds for each chunk, so a replayed chunk sees the same.
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return images
        which = torch.randint(8, (len(images), 1, 1, 1), device=images.device)
        images = torch.where(which % 2 == 1, images.flip(-1), images)
        images = torch.where(which // 2 % 2 == 1, images.flip(-2), images)
        return torch.where(which >= 4, images.mT, images) if images.shape[-1] == images.shape[-2] else images


def external(
    shape: Sequence[int],
    *,
    module: nn.Module,
    mean: float | Sequence[float] = (0.485, 0.456, 0.406),
    std: float | Sequence[float] = (0.229, 0.224, 0.225),
    frozen: bool = False,
) -> nn.Module:
    """Anybody's network on images, such as a timm or torchvision model without its classifier.

    Args:
        module: ``(M, channels, height, width)`` normalised floats to ``(M, D)``; its configuration names any callable by its
            dotted path (``module: {_target_: timm.create_model, model_name: resnet18, num_classes: 0, pretrained: true}``).
        mean, std: of the normalisation, ImageNet's unless told.
        frozen: not trained, and kept in eval mode, where BatchNorm is a fixed function.
    """
    return nn.Sequential(Pixels(_image(shape)[0], mean, std), Frozen(module) if frozen else module)


def resnet18(
    shape: Sequence[int],
    *,
    weights: str | None = None,
    frozen: bool = False,
    projection: int | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dihedral: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """`distset.tasks.resnet.ResNet18` on patches of 33 pixels and more.

    Args:
        shape: ``(channels, height, width)``, bytes.
        weights: file of published SimCLR weights; None for random ones.
        frozen: not trained.
        projection: width of the projection head to keep (the Camelyon16 weights have one of 256); None for the 512 features
            before it.
        mean, std: of the normalisation; the published weights want colours from 0 to 1 as they are.
        dihedral: turn and mirror each training image at random.
        dropout: of the features.
    """
    channels, height, width = _image(shape)
    if min(height, width) < 33:
        raise ValueError(
            f"backbone: got images of {height} x {width}, wanted at least 33 x 33 for a ResNet18; use backbone=cnn"
        )
    network = ResNet18(channels, projection)
    if weights is not None:
        load_published(network, weights)
    network.requires_grad_(not frozen)  # and no wrapper: frozen or not, the weights have the same names
    augment = [Dihedral()] if dihedral else []
    return nn.Sequential(Pixels(channels, mean, std), *augment, network, nn.Dropout(dropout))


class Frozen(nn.Module):
    """A network that is not trained and stays in eval mode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            return self.module(x)


def _dim(shape: Sequence[int]) -> int:
    if len(shape) != 1:
        raise ValueError(f"backbone: is for vectors, but elements have shape {tuple(shape)}; images need backbone=cnn")
    return shape[0]


def _image(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(
            f"backbone: is for images (channels, height, width), but elements have shape {tuple(shape)}; vectors take "
            f"backbone=mlp, backbone=standardise or backbone=none"
        )
    return shape[0], shape[1], shape[2]
