r"""Mini-batch consistent set encoders: a chunk in, a mergeable state out.

A `ChunkEncoder` splits the encoding of a set into three parts: ``query`` draws, once per set and step, what all chunks
share (random slots, folded projections); ``encode(chunk, query)`` is the state of one chunk; ``readout(state, query)``
is what follows the merged state (slot residual, layer norm, further layers) and sees plain gradients. Any partition of
the set gives the same value; `distset.testing.check_encoder` proves it for an encoder of your own.

References:
    [1] Willette et al.: Scalable Set Encoding with Universal Mini-Batch Consistency ... ICML 2023. arXiv:2208.12401
    [2] Bruno, Willette, Lee, Hwang: Mini-Batch Consistent Slot Set Encoder for Scalable Set Encoding. NeurIPS 2021.
    [3] Zaheer et al.: Deep Sets. NeurIPS 2017. arXiv:1703.06114
    [4] Ilse, Tomczak, Welling: Attention-based Deep Multiple Instance Learning. ICML 2018. arXiv:1802.04712
    [5] Li, Li, Eliceiri: Dual-stream Multiple Instance Learning Network ... CVPR 2021. arXiv:2011.08939
"""

from __future__ import annotations

from distset.encoders.bags import DSMIL, AttentionPool, CriticalAttention, CriticalInstances, MaxInstance
from distset.encoders.base import ChunkEncoder, Features, Parallel, Sweeps
from distset.encoders.deep_sets import DeepSets
from distset.encoders.slots import ACTIVATIONS, SSE, UMBC, HierarchicalSSE, Slots

__all__ = [
    "ACTIVATIONS",
    "DSMIL",
    "SSE",
    "UMBC",
    "AttentionPool",
    "ChunkEncoder",
    "CriticalAttention",
    "CriticalInstances",
    "DeepSets",
    "Features",
    "HierarchicalSSE",
    "MaxInstance",
    "Parallel",
    "Slots",
    "Sweeps",
]
