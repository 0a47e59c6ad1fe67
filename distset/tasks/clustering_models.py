"""The models of amortized clustering as pairs of an encoder and a head, each by its own arguments.

Element networks, widths and depths follow the published code: two linear layers for an element, 128 wide, and three layers
after the set. Every head ends with a mixture, ``(*, K, 1 + 2 D)``. Arguments they share:

* ``dim`` of a point, ``components`` K of a mixture: both follow from the data;
* ``width`` of all layers; ``heads`` of attention.

DeepSets, SSE, its hierarchy and UMBC with anything after it are mini-batch consistent. `set_transformer`, `fspool` and
`diffem` are not (see `PerChunk`): train them on whole sets.
"""

from __future__ import annotations

from torch import nn

from distset.blocks import ISAB, MLP, PMA, SAB, FSPool
from distset.encoders import UMBC, ChunkEncoder, DeepSets, Features, HierarchicalSSE
from distset.tasks.set_models import FittedMixture, LinearFeatures, PerChunk, in_blocks

__all__ = [
    "deepsets",
    "diffem",
    "fspool",
    "hierarchical_sse",
    "set_transformer",
    "sse",
    "umbc_diffem",
    "umbc_fspool",
    "umbc_set_transformer",
]

Parts = tuple[ChunkEncoder, nn.Module]


def deepsets(dim: int, components: int, *, width: int = 128) -> Parts:
    """Mean of the elements' features, and an MLP to all components."""
    first, act, last = _element(dim, width)
    # The mean of a linear layer is the layer of the mean: it is applied once, after pooling.
    return in_blocks(DeepSets(nn.Sequential(first, act))), nn.Sequential(last, _to_components(width, dim, components))


def sse(dim: int, components: int, *, width: int = 128, heads: int = 4, activation: str = "slot-sigmoid") -> Parts:
    """Slot set encoder; its slots are the components, each through the same MLP."""
    head = MLP(width, width, width, width, 1 + 2 * dim, activation=nn.ReLU())
    return _slots(dim, components, width, heads, activation), head


def hierarchical_sse(dim: int, components: int, *, width: int = 128, heads: int = 4, layers: int = 4) -> Parts:
    """Slot set encoders stacked; the last slots are the components."""
    stack = [
        UMBC(width, components, heads=heads, activation="slot-sigmoid", residual=True, layer_norm=True)
        for _ in range(layers)
    ]
    encoder = in_blocks(Features(_element(dim, width), HierarchicalSSE(*stack)))
    return encoder, nn.Linear(width, 1 + 2 * dim)


def umbc_set_transformer(
    dim: int,
    components: int,
    *,
    width: int = 128,
    heads: int = 4,
    activation: str = "softmax",
    blocks: int = 3,
    random_slots: bool = False,
) -> Parts:
    """UMBC with a slot for each component, then self-attention between the slots."""
    head = nn.Sequential(*(SAB(width, heads=heads, layer_norm=False) for _ in range(blocks)), nn.Linear(width, 1 + 2 * dim))
    return _slots(dim, components, width, heads, activation, random_slots), head


def umbc_fspool(dim: int, components: int, *, width: int = 128, heads: int = 4, activation: str = "softmax") -> Parts:
    """UMBC, then featurewise sort pooling of the slots."""
    head = nn.Sequential(FSPool(width), _to_components(width, dim, components))
    return _slots(dim, components, width, heads, activation), head


def umbc_diffem(dim: int, components: int, *, width: int = 128, heads: int = 4, activation: str = "softmax") -> Parts:
    """UMBC, then one step of differentiable expectation-maximization on the slots."""
    head = nn.Sequential(FittedMixture(width, components=components, steps=1), _to_components(width, dim, components))
    return _slots(dim, components, width, heads, activation), head


def set_transformer(
    dim: int, components: int, *, width: int = 128, heads: int = 4, points: int = 16, blocks: int = 3
) -> Parts:
    """Induced self-attention of the elements, pooled to one vector a component, self-attention between those."""
    network = nn.Sequential(ISAB(dim, points, dim_out=width, heads=heads), PMA(width, components, heads=heads))
    head = nn.Sequential(*(SAB(width, heads=heads) for _ in range(blocks)), nn.Linear(width, 1 + 2 * dim))
    return PerChunk(network), head


def fspool(dim: int, components: int, *, width: int = 128) -> Parts:
    """Featurewise sort pooling of the elements, and an MLP to all components."""
    return PerChunk(nn.Sequential(_element(dim, width), FSPool(width))), _to_components(width, dim, components)


def diffem(dim: int, components: int, *, width: int = 128) -> Parts:
    """Three steps of differentiable expectation-maximization on the elements, and an MLP to all components."""
    network = nn.Sequential(_element(dim, width), FittedMixture(width, components=components))
    return PerChunk(network), _to_components(width, dim, components)


def _element(dim: int, width: int) -> nn.Sequential:
    return MLP(dim, width, width, activation=nn.ReLU(inplace=True))


def _slots(dim: int, slots: int, width: int, heads: int, activation: str, random_slots: bool = False) -> ChunkEncoder:
    pool = UMBC(
        width, slots, heads=heads, activation=activation, residual=True, layer_norm=True, random_slots=random_slots
    )  # fmt: skip
    return in_blocks(LinearFeatures(_element(dim, width), pool))


def _to_components(width: int, dim: int, components: int) -> nn.Module:
    return nn.Sequential(
        MLP(width, width, width, width, components * (1 + 2 * dim), activation=nn.ReLU()),
        nn.Unflatten(-1, (components, 1 + 2 * dim)),
    )
