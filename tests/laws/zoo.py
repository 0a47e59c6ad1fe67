"""Every encoder that distset ships, small, for tests that hold for all of them."""

from torch import nn

from distset import (
    DSMIL,
    SSE,
    UMBC,
    AttentionPool,
    DeepSets,
    Features,
    HierarchicalSSE,
    MaxInstance,
    Parallel,
)
from distset.encoders import ACTIVATIONS

DIM = 5


def encoders() -> dict[str, nn.Module]:
    """Name -> encoder of vectors of width `DIM`."""
    zoo: dict[str, nn.Module] = {
        f"deepsets-{pool}": DeepSets(nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, 4)), pool)
        for pool in ("sum", "mean", "max", "min")
    }
    for activation in ACTIVATIONS:
        for fold in (True, False):
            zoo[f"umbc-{activation}-{'folded' if fold else 'projected'}"] = UMBC(
                DIM, 3, dim_out=4, heads=2, activation=activation, fold=fold, residual=True, random_slots=True
            )
    zoo["umbc-layer-norm"] = UMBC(DIM, 3, layer_norm=True, residual=True)
    zoo["umbc-unnormalised"] = UMBC(DIM, 3, activation="sigmoid", normalize=False, fold=True)
    zoo["sse"] = SSE(DIM, 3, random_slots=True)
    zoo["sse-sigmoid"] = SSE(DIM, 3, activation="sigmoid")
    zoo["sse-max"] = SSE(DIM, 3, pool="max", normalize=True)
    zoo["hierarchical-sse"] = HierarchicalSSE(SSE(DIM, 4, pool=None), SSE(DIM, 3, pool=None), SSE(DIM, 2))
    zoo["ab-mil"] = AttentionPool(DIM, 4, gated=False, heads=2)
    zoo["gated-ab-mil"] = AttentionPool(DIM, 4)
    zoo["ds-mil"] = DSMIL(DIM, classes=2, hidden=4)
    zoo["max-instance"] = MaxInstance(nn.Linear(DIM, 2))
    zoo["extractor-and-two"] = Features(
        nn.Sequential(nn.Linear(DIM, 6), nn.Tanh()), Parallel(UMBC(6, 2), MaxInstance(nn.Linear(6, 2)))
    )
    return zoo


def with_dropout() -> nn.Module:
    """Dropout in the extractor, random slots, residual: everything random that an encoder may have."""
    extractor = nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Dropout(0.4))
    return Features(extractor, UMBC(6, 3, random_slots=True, residual=True, layer_norm=True))
