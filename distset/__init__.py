"""distset: deep functions of sets that do not fit in memory."""

from distset.blocks import ISAB, MAB, MLP, PMA, SAB, DiffEM, FSPool, SetTransformer
from distset.encode import Exact, Full, Sampled, Subset, encode_set, encode_state
from distset.encoders import (
    DSMIL,
    SSE,
    UMBC,
    AttentionPool,
    ChunkEncoder,
    DeepSets,
    Features,
    HierarchicalSSE,
    MaxInstance,
    Parallel,
    Sweeps,
)
from distset.encoders.stream import Stream
from distset.sets import Chunk, ChunkedSet, InMemory, pad_sets

__all__ = [
    "DSMIL",
    "ISAB",
    "MAB",
    "MLP",
    "PMA",
    "SAB",
    "SSE",
    "UMBC",
    "AttentionPool",
    "Chunk",
    "ChunkEncoder",
    "ChunkedSet",
    "DeepSets",
    "DiffEM",
    "Exact",
    "FSPool",
    "Features",
    "Full",
    "HierarchicalSSE",
    "InMemory",
    "MaxInstance",
    "Parallel",
    "Sampled",
    "SetTransformer",
    "Stream",
    "Subset",
    "Sweeps",
    "encode_set",
    "encode_state",
    "pad_sets",
]

__version__ = "0.1.0"
