r"""The published encoders of single elements that are no vectors: images, and pairs of a drug and a protein.

Both map ``(*, N, dim)`` to ``(*, N, width)``, each element alone, and are an ``encoder`` of `published_utility` and of the
tasks of `distset.tasks.oracle`. So is any module of yours that is made from ``dim`` and ``width``.

Shapes: ``*`` batch of offers, ``N`` elements, ``L`` letters of a sequence, ``U`` sequences that differ, ``C`` channels.

References:
    [1] Ou, Xu, Su, Li, Zhao, Bian: Learning Neural Set Functions Under the Optimal Subset Oracle. NeurIPS 2022.
        https://arxiv.org/abs/2203.01693, code https://github.com/SubsetSelection/EquiVSet (``model/celebaCNN.py``,
        ``model/deepDTA.py``); the sizes below are those of the code.
    [2] Özcan, Shi, Ioannidis: Learning Set Functions with Implicit Differentiation. AAAI 2025. arXiv:2412.11239 (the same).
    [3] Öztürk, Özgür, Ozkirimli: DeepDTA: deep drug-target binding affinity prediction. Bioinformatics 34, 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DeepDTA", "ImageCNN"]

LENGTHS, LETTERS = (100, 1000), (41, 20)
AT_ONCE = 256
"""Sequences that go through the convolutions together."""


class ImageCNN(nn.Module):
    """Square images as flat values in [0, 1] (or bytes) to codes, the network of [1] for CelebA.

    Values are moved to [-1, 1]; convolutions of 32, 64 and 128 channels with kernels of 3, 4 and 5, all of stride 2, each
    with ReLU; the maximum over the image; Linear(128, width). Published for 3 x 64 x 64 and a width of 256.

    Args:
        dim: values of an image, ``side * side`` for grey ones and ``3 * side * side`` for coloured ones (channels first).
        width: of the code.

    Raises:
        ValueError: for a ``dim`` of no square image, or of one with fewer than 25 pixels a side.
    """

    def __init__(self, dim: int, width: int = 256) -> None:
        super().__init__()
        self.channels = 3 if dim % 3 == 0 and isqrt(dim // 3) ** 2 * 3 == dim else 1
        self.side = isqrt(dim // self.channels)
        if self.channels * self.side**2 != dim or self.side < 25:
            raise ValueError(
                f"encoder: got elements of {dim} values, wanted square images of 1 or 3 channels and at least 25 pixels a "
                f"side as flat values; ImageCNN is for data=celeba and data=odd_images"
            )
        self.convolutions = nn.Sequential(
            nn.Conv2d(self.channels, 32, 3, stride=2), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 128, 5, stride=2), nn.ReLU(),
        )  # fmt: skip
        self.out = nn.Linear(128, width)

    def forward(self, elements: Tensor) -> Tensor:
        values = elements if elements.is_floating_point() else elements.to(self.out.weight.dtype) / 255
        pictures = 2 * values.reshape(-1, self.channels, self.side, self.side) - 1
        features = self.convolutions(pictures).amax((-2, -1))
        return self.out(features).reshape(*elements.shape[:-1], -1)


class DeepDTA(nn.Module):
    """Pairs of a drug and a protein, as coded letters, to codes: the network of [1] for BindingDB, after [3].

    The letters of each sequence as one-hot channels, three convolutions with ReLU (`_Letters`), the maximum over the
    sequence, a Linear to 256; the two side by side go through a Linear to ``width``. Drugs: 41 letters, at most 100 of them,
    kernels of 4, 6 and 8; proteins: 20 letters, at most 1,000, kernels of 4, 8 and 12.

    A sequence that occurs in many pairs of the offers is encoded once. The maximum is over windows within the sequence, so
    that a code does not depend on how far it was padded (in the published one it does).

    Args:
        dim: letters of a pair, padding included: the sum of ``lengths``.
        width: of the code.
        lengths: letters of a drug and of a protein. An element is the drug's codes and then the protein's: 0 at padding,
            1 to 41 (20) a letter, one more for a letter that is not among them (see `distset.data.affinities.letter_codes`).

    Raises:
        ValueError: for another ``dim``; for elements that are no codes.
    """

    def __init__(self, dim: int, width: int = 256, *, lengths: Sequence[int] = LENGTHS) -> None:
        super().__init__()
        if dim != sum(lengths):
            raise ValueError(
                f"encoder: got elements of {dim} numbers, wanted the coded letters of a drug and a protein, "
                f"{lengths[0]} + {lengths[1]}; DeepDTA is for data=compounds data.examples.features=sequences"
            )
        self.lengths = list(lengths)
        self.drug, self.protein = _Letters(LETTERS[0], (4, 6, 8)), _Letters(LETTERS[1], (4, 8, 12))
        self.out = nn.Linear(512, width)

    def forward(self, elements: Tensor) -> Tensor:
        drugs, proteins = elements.split(self.lengths, -1)
        return self.out(torch.cat([self.drug(drugs), self.protein(proteins)], -1))


class _Letters(nn.Module):
    """Coded sequences ``(*, L)`` to ``(*, 256)``: one-hot, convolutions of 32, 64 and 96 channels, maximum, linear."""

    def __init__(self, letters: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.letters, self.field = letters, sum(kernels) - len(kernels) + 1
        channels = (letters, 32, 64, 96)
        self.convolutions = nn.ModuleList(nn.Conv1d(a, b, k) for a, b, k in zip(channels, channels[1:], kernels))
        self.out = nn.Linear(96, 256)

    def forward(self, codes: Tensor) -> Tensor:
        sequences_UL, which = torch.unique(self._checked(codes).flatten(0, -2), dim=0, return_inverse=True)
        found = torch.cat([self._code(part) for part in sequences_UL.split(AT_ONCE)])
        return found[which].reshape(*codes.shape[:-1], -1)

    def _code(self, sequences_UL: Tensor) -> Tensor:
        weight = self.out.weight
        # a row for padding, the letters, and one for others: those of no letter have no channel
        one_hot = F.pad(torch.eye(self.letters, dtype=weight.dtype, device=weight.device), (0, 0, 1, 1))
        x_UCL = F.embedding(sequences_UL.int(), one_hot).mT
        x_UCL = F.pad(x_UCL, (0, max(0, self.field - x_UCL.shape[-1])))
        for convolution in self.convolutions:
            x_UCL = F.relu(convolution(x_UCL))
        windows = ((sequences_UL > 0).sum(-1) - self.field + 1).clamp_min(1)
        beyond = torch.arange(x_UCL.shape[-1], device=windows.device) >= windows.unsqueeze(-1)
        return self.out(x_UCL.masked_fill(beyond.unsqueeze(-2), 0.0).amax(-1))  # 0 is the least after a ReLU

    def _checked(self, codes: Tensor) -> Tensor:
        whole = codes.to(torch.uint8)
        if not torch.equal(whole.to(codes.dtype), codes) or int(whole.max()) > self.letters + 1:
            raise ValueError(
                f"elements: got numbers from {float(codes.min()):.3g} to {float(codes.max()):.3g}, wanted whole ones from 0 "
                f"to {self.letters + 1}, the codes of letters; use data.examples.features=sequences"
            )
        return whole
