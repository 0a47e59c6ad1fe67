"""The published bag classifiers as pairs of an encoder and a head, each by its own arguments.

UMBC, slot set encoders, DeepSets, AB-MIL (gated and plain), DS-MIL and the max-instance model; references stand in
`distset.encoders`. All stream exactly: any set size, the gradient strategy of your choice. Arguments they share:

* ``dim``: width of an element (or of its features); ``outputs``: logits, one for two classes. Both follow from the data.
* ``width``: of the encoder and the hidden layers; ``dropout``: in the head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distset.blocks import MLP, SetTransformer
from distset.encoders import (
    DSMIL,
    SSE,
    UMBC,
    AttentionPool,
    ChunkEncoder,
    DeepSets,
    HierarchicalSSE,
    MaxInstance,
    Parallel,
    Sweeps,
)

__all__ = ["DualStreamHead", "abmil", "deepsets", "dsmil", "hierarchical_sse", "max_instance", "sse", "umbc", "umbc_mil"]

Parts = tuple[ChunkEncoder | Sweeps, nn.Module]
"""An encoder and the head that follows it."""


def umbc(
    dim: int,
    outputs: int,
    *,
    slots: int = 16,
    width: int = 128,
    heads: int = 4,
    activation: str = "softmax",
    random_slots: bool = False,
    residual: bool = False,
    layer_norm: bool = True,
    attention_blocks: int = 0,
    dropout: float = 0.0,
) -> Parts:
    """UMBC; the head is a Set Transformer of ``attention_blocks`` blocks over the slots, or where 0 an MLP of all slots."""
    encoder = UMBC(
        dim,
        slots,
        dim_out=width,
        heads=heads,
        activation=activation,
        random_slots=random_slots,
        residual=residual,
        layer_norm=layer_norm,
    )
    if attention_blocks:
        return encoder, SetTransformer(width, outputs, blocks=attention_blocks, heads=heads, dropout=dropout)
    return encoder, nn.Sequential(nn.Flatten(-2), MLP(slots * width, width, outputs, dropout=dropout))


def umbc_mil(
    dim: int,
    outputs: int,
    *,
    slots: int = 16,
    width: int = 128,
    heads: int = 4,
    activation: str = "softmax",
    random_slots: bool = False,
    residual: bool = False,
    layer_norm: bool = True,
    attention_blocks: int = 0,
    dropout: float = 0.0,
) -> Parts:
    """UMBC beside the largest instance logit, both trained on the bag's label in one sweep; UMBC predicts.

    References:
        Willette et al.: Scalable set encoding with universal mini-batch consistency and unbiased full set gradient
        approximation. ICML 2023, section 5.4 and appendix H.
    """
    bag, head = umbc(
        dim, outputs, slots=slots, width=width, heads=heads, activation=activation, random_slots=random_slots,
        residual=residual, layer_norm=layer_norm, attention_blocks=attention_blocks, dropout=dropout,
    )  # fmt: skip
    assert isinstance(bag, ChunkEncoder)
    return Parallel(bag, MaxInstance(nn.Linear(dim, outputs))), WithInstances(head)


def sse(
    dim: int,
    outputs: int,
    *,
    slots: int = 16,
    width: int = 128,
    heads: int = 4,
    activation: str = "slot-sigmoid",
    pool: str = "mean",
    normalize: bool = True,
    dropout: float = 0.0,
) -> Parts:
    """Slot set encoder, slots pooled, and an MLP."""
    encoder = SSE(
        dim,
        slots,
        dim_out=width,
        heads=heads,
        activation=activation,
        pool=pool,
        normalize=normalize,
        layer_norm=True,
    )
    return encoder, MLP(width, width, outputs, dropout=dropout)


def hierarchical_sse(
    dim: int, outputs: int, *, slots: Sequence[int] = (32, 8), width: int = 128, heads: int = 4, dropout: float = 0.0
) -> Parts:
    """A stack of slot set encoders, ``slots`` from the elements upwards; the last one pools."""
    if not slots:
        raise ValueError("slots: got none, wanted the number of slots of each layer")
    pools = [None] * (len(slots) - 1) + ["mean"]
    layers = [
        SSE(dim if level == 0 else width, count, dim_out=width, heads=heads, pool=pool, normalize=True, layer_norm=True)
        for level, (count, pool) in enumerate(zip(slots, pools))
    ]
    return HierarchicalSSE(*layers), MLP(width, width, outputs, dropout=dropout)


def deepsets(dim: int, outputs: int, *, width: int = 128, pool: str = "mean", dropout: float = 0.0) -> Parts:
    """An element network, pooled by sum, mean, max or min, and an MLP."""
    return DeepSets(MLP(dim, width, width), pool), MLP(width, width, outputs, dropout=dropout)


def abmil(dim: int, outputs: int, *, width: int = 128, heads: int = 1, gated: bool = True, dropout: float = 0.0) -> Parts:
    """Attention pooling, plain or gated, and a linear classifier, as published."""
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(heads * dim, outputs))
    return AttentionPool(dim, width, heads=heads, gated=gated), head


def dsmil(dim: int, outputs: int, *, width: int = 128, dropout: float = 0.0) -> Parts:
    """Dual-stream MIL: two sweeps over the bag; the bag stream predicts, both are trained."""
    return DSMIL(dim, outputs, width), DualStreamHead(dim, outputs, dropout)


def max_instance(dim: int, outputs: int, *, width: int = 128, dropout: float = 0.0) -> Parts:
    """The largest instance logit of each class."""
    return MaxInstance(MLP(dim, width, outputs, dropout=dropout)), nn.Identity()


class WithInstances(nn.Module):
    """Logits of the bag by ``head``, and beside them those of its instances."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        bag, instances = streams
        return self.head(bag), instances


class DualStreamHead(nn.Module):
    """DS-MIL's bag classifier: logits from the bag vectors ``(C, D)``, and the instance scores ``(C,)`` beside them."""

    def __init__(self, dim: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bag = nn.Sequential(nn.Flatten(-2), nn.Dropout(dropout), nn.Linear(outputs * dim, outputs))

    def forward(self, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        scores, bags = streams
        return self.bag(bags), scores
