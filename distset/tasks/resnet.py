"""ResNet18 with InstanceNorm, as pathology's self-supervised weights are published, under torchvision's parameter names.

InstanceNorm looks at one image alone, so an element's features do not depend on its chunk, and the network can be trained
inside an encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet18", "load_published"]

CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Places of torchvision's children in the ``nn.Sequential`` that SimCLR's code makes of them."""


class ResNet18(nn.Module):
    """Images ``(M, channels, H, W)`` to features ``(M, 512)``, or ``(M, projection)``; ``H`` and ``W`` of 33 or more.

    Normalisation is ``InstanceNorm2d`` without parameters, as in the published networks.

    Args:
        channels: of the images.
        projection: width of SimCLR's projection head (linear, ReLU, linear) after the features; None for no head.

    References:
        He, Zhang, Ren, Sun: Deep residual learning for image recognition. CVPR 2016.
        Li, Li, Eliceiri: Dual-stream multiple instance learning network for whole slide image classification with
        self-supervised contrastive learning. CVPR 2021. https://github.com/binli123/dsmil-wsi
    """

    def __init__(self, channels: int = 3, projection: int | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.InstanceNorm2d(64)
        self.layer1 = nn.Sequential(_Block(64, 64, 1), _Block(64, 64, 1))
        self.layer2 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        self.layer3 = nn.Sequential(_Block(128, 256, 2), _Block(256, 256, 1))
        self.layer4 = nn.Sequential(_Block(256, 512, 2), _Block(512, 512, 1))
        self.l1 = None if projection is None else nn.Linear(512, 512)
        self.l2 = None if projection is None else nn.Linear(512, projection)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((-2, -1))
        if self.l1 is None or self.l2 is None:
            return x
        return self.l2(F.relu(self.l1(x)))


class _Block(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the size changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.InstanceNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.InstanceNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.InstanceNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        beside = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + beside)


def load_published(network: ResNet18, path: str | Path) -> None:
    """Load weights as they are published: named as torchvision's (``resnet.layer1.0.conv1.weight``) or numbered as a
    ``nn.Sequential`` (``features.4.0.conv1.weight``), behind any prefix, bare or under ``state_dict``. Heads that the
    network has not are left out.

    Raises:
        ValueError: for a file that is not there or holds no weights, a network of another shape or with BatchNorm.
    """
    weights, wanted = dict(_named(_read(Path(path)), path)), dict(network.state_dict())
    if network.l1 is None:
        weights = {name: tensor for name, tensor in weights.items() if name[:3] not in ("l1.", "l2.")}
    wrong = [name for name in weights if ".bn" in f".{name}" or ".downsample.1." in name]
    if wrong:
        raise ValueError(
            f"weights: {path} has {wrong[0]}, so its network normalises by BatchNorm; wanted InstanceNorm without "
            f"parameters. Use backbone=external for another network"
        )
    missing, more = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or more:
        heads = (
            "; leave out projection, or set it to the head's width" if any(n[:2] in ("l1", "l2") for n in missing) else ""
        )
        raise ValueError(
            f"weights: {path} lacks {_few(missing)} and has {_few(more)} besides; wanted those of a ResNet18{heads}"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"weights: {path} has {name} of shape {tuple(tensor.shape)}, wanted {tuple(wanted[name].shape)}; is it a "
                f"ResNet18 (for a projection head: of that width)?"
            )
    network.load_state_dict(weights)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"weights: found no file {path}; download it, or set weights to null")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and key errors, by what is wrong with the file
        raise ValueError(f"weights: {path} cannot be read without running code in it ({error})") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"weights: {path} holds {type(found).__name__}, wanted a dict of names and tensors")
    return found


def _named(found: Mapping[str, Any], path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The network's weights under torchvision's names; the projection head as l1 and l2."""
    first = [name for name, value in found.items() if isinstance(value, Tensor) and value.shape[1:] == (3, 7, 7)]
    if len(first) != 1 or not first[0].endswith(("conv1.weight", "0.weight")):
        raise ValueError(
            f"weights: {path} has {len(first)} first convolutions of 7x7 (names such as {_few(list(found))}), wanted one "
            f"that ends in conv1.weight or 0.weight"
        )
    numbered = not first[0].endswith("conv1.weight")
    prefix = first[0].removesuffix("0.weight" if numbered else "conv1.weight")
    outer = prefix.removesuffix("features.")
    for name, value in found.items():
        head, _, rest = name.removeprefix(prefix).partition(".")
        head = CHILDREN.get(head, "") if numbered else head
        if name.startswith(prefix) and head in CHILDREN.values():
            yield f"{head}.{rest}", value
        elif name.startswith((f"{outer}l1.", f"{outer}l2.")):
            yield name.removeprefix(outer), value


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "") if names else "nothing"
