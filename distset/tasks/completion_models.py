"""The encoders of image completion: pairs of an encoder of pixels and what pools its encoding to a code ``(*, width)``.

Arguments they share: ``dim`` of an element (place and value), ``width`` and ``frequencies`` (see `Waves`) follow from the
task; ``depth`` is the number of linear layers of an element's network, 4 as published; ``activation`` is one of
`distset.encoders.slots.ACTIVATIONS`.
"""

from __future__ import annotations

from torch import nn

from distset.blocks import ISAB, MLP, PMA, FSPool
from distset.encoders import SSE, UMBC, ChunkEncoder, DeepSets, Features
from distset.tasks.set_models import FittedMixture, LinearFeatures, PerChunk, Waves, in_blocks, slots_to_vector

__all__ = ["deepsets", "set_transformer", "sse", "umbc_diffem", "umbc_fspool", "umbc_set_transformer"]

Parts = tuple[ChunkEncoder, nn.Module]


def deepsets(dim: int, width: int, frequencies: int = 0, *, depth: int = 4) -> Parts:
    """The mean of the pixels' features: the conditional neural process as published by Garnelo et al."""
    return in_blocks(DeepSets(_element(dim, width, frequencies, depth))), nn.Identity()


def sse(
    dim: int,
    width: int,
    frequencies: int = 0,
    *,
    depth: int = 4,
    slots: int = 1,
    heads: int = 1,
    activation: str = "slot-sigmoid",
) -> Parts:
    """Slot set encoder, its slots averaged; one slot, as published. Over one slot, ``slot-...`` weights are all alike."""
    pool = SSE(width, slots, heads=heads, activation=activation, normalize=True, layer_norm=True)
    return in_blocks(Features(_element(dim, width, frequencies, depth), pool)), nn.Identity()


def umbc_set_transformer(
    dim: int,
    width: int,
    frequencies: int = 0,
    *,
    depth: int = 4,
    slots: int = 16,
    heads: int = 1,
    activation: str = "softmax",
    blocks: int = 2,
) -> Parts:
    """UMBC, then a Set Transformer over the slots."""
    encoder = _slots(dim, width, frequencies, depth, slots, heads, activation)
    return encoder, slots_to_vector(width, blocks=blocks, heads=heads)


def umbc_fspool(
    dim: int,
    width: int,
    frequencies: int = 0,
    *,
    depth: int = 4,
    slots: int = 16,
    heads: int = 1,
    activation: str = "softmax",
) -> Parts:
    """UMBC, then featurewise sort pooling of the slots."""
    return _slots(dim, width, frequencies, depth, slots, heads, activation), FSPool(width)


def umbc_diffem(
    dim: int,
    width: int,
    frequencies: int = 0,
    *,
    depth: int = 4,
    slots: int = 16,
    heads: int = 1,
    activation: str = "softmax",
) -> Parts:
    """UMBC, then a step of differentiable expectation-maximization on the slots."""
    return _slots(dim, width, frequencies, depth, slots, heads, activation), FittedMixture(width, steps=1)


def set_transformer(
    dim: int, width: int, frequencies: int = 0, *, depth: int = 4, points: int = 16, heads: int = 1
) -> Parts:
    """Induced self-attention of the pixels and pooling: not mini-batch consistent, for whole contexts."""
    network = nn.Sequential(
        _element(dim, width, frequencies, depth), ISAB(width, points, heads=heads), PMA(width, heads=heads), nn.Flatten(-2)
    )
    return PerChunk(network), nn.Identity()


def _element(dim: int, width: int, frequencies: int, depth: int) -> nn.Sequential:
    waves = Waves(frequencies)
    return nn.Sequential(waves, *MLP(dim + waves.added, *[width] * depth, activation=nn.ReLU(inplace=True)))


def _slots(dim: int, width: int, frequencies: int, depth: int, slots: int, heads: int, activation: str) -> ChunkEncoder:
    pool = UMBC(width, slots, heads=heads, activation=activation, layer_norm=True)
    return in_blocks(LinearFeatures(_element(dim, width, frequencies, depth), pool))
