r"""The rivals for bags: AB-MIL, DS-MIL, the max-instance head. References as in `distset.encoders`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distset.encoders.base import ChunkEncoder, Sweeps
from distset.encoders.pooling import accumulable, check_width, max_state, softmax_state, wide
from distset.sets import Chunk
from distset.states import Max, Softmax, TopK

__all__ = ["DSMIL", "AttentionPool", "CriticalAttention", "CriticalInstances", "MaxInstance"]


class AttentionPool(ChunkEncoder):
    r"""AB-MIL pooling [4], plain :math:`a_i = w^\top \tanh(V x_i)` (eq. 8) or gated
    :math:`w^\top(\tanh(V x_i) \odot \sigma(U x_i))` (eq. 9), softmax over the elements.

    The attention of an element looks at that element alone, so the pooling is a mergeable softmax state and streams
    exactly, with exact gradients: nothing of AB-MIL needs the whole bag in memory.

    Args:
        dim: width of an element.
        hidden: width of the attention network.
        heads: attention distributions; their pooled vectors are concatenated.
        gated: eq. 9 instead of eq. 8.

    Returns (of `encode_set`):
        ``(*, heads * dim)``.
    """

    def __init__(self, dim: int, hidden: int = 128, *, heads: int = 1, gated: bool = True) -> None:
        super().__init__()
        self.to_tanh = nn.Linear(dim, hidden)
        self.to_gate = nn.Linear(dim, hidden) if gated else None
        self.score = nn.Linear(hidden, heads)

    def encode(self, chunk: Chunk, query: Any) -> Softmax:
        check_width(chunk.elements, self.to_tanh.in_features)
        h = torch.tanh(self.to_tanh(chunk.elements))
        if self.to_gate is not None:
            h = h * torch.sigmoid(self.to_gate(chunk.elements))
        return softmax_state(accumulable(self.score(h)).mT, chunk.elements, chunk.mask, True)

    def readout(self, state: Softmax, query: Any) -> Tensor:
        return state.value().flatten(-2)


class MaxInstance(ChunkEncoder):
    """The max-instance head of [1] eq. 18, :math:`\\max_i g(x_i)`, as a running maximum: no list of all features.

    Args:
        score: a network from ``(*, N, D)`` to ``(*, N, C)`` instance logits.

    Returns (of `encode_set`):
        ``(*, C)``.
    """

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def encode(self, chunk: Chunk, query: Any) -> Max:
        return max_state(accumulable(self.score(chunk.elements)), chunk)


class CriticalInstances(ChunkEncoder):
    """The first stream of DS-MIL [5]: for each class the element of highest score, with its features.

    Returns (of `encode_set`):
        scores ``(*, C)`` and features ``(*, C, D)``.
    """

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def encode(self, chunk: Chunk, query: Any) -> TopK:
        scores_CN = accumulable(self.score(chunk.elements)).mT
        if chunk.mask is not None:
            scores_CN = scores_CN.masked_fill(~chunk.mask.unsqueeze(-2), -torch.inf)
        features = accumulable(chunk.elements).unsqueeze(-3).expand(*scores_CN.shape, -1)
        ids = torch.arange(chunk.start, chunk.start + chunk.size, device=scores_CN.device)
        return TopK.of(scores_CN, features, ids.expand(scores_CN.shape), 1)

    def readout(self, state: TopK, query: Any) -> tuple[Tensor, Tensor]:
        return state.scores.squeeze(-1), state.payload.squeeze(-2)


class CriticalAttention(ChunkEncoder):
    """The second stream of DS-MIL [5]: attention of every element to the critical instances, which come as condition."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(hidden)
        self.to_query = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.Tanh())
        self.to_value = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())

    def query(self, batch_shape: torch.Size, generator: torch.Generator, condition: Any = None) -> tuple[Any, ...]:
        scores, features = condition
        return scores, self.to_query(features) * self.scale

    def encode(self, chunk: Chunk, query: Any) -> Softmax:
        logits_CN = wide(query[1], self.to_query(chunk.elements).mT)
        return softmax_state(logits_CN, self.to_value(chunk.elements), chunk.mask, True)

    def readout(self, state: Softmax, query: Any) -> tuple[Tensor, Tensor]:
        return query[0], state.value()


class DSMIL(Sweeps):
    """Dual-stream MIL [5]: instance scores with their critical instances, then attention to those.

    What streams: the instance stream (a top-1 state) in one sweep, and the attention (a softmax state) in a second one.
    What does not: both in *one* sweep, since an element's attention needs the critical instance of the whole bag.

    Args:
        dim: width of an element.
        classes: C.
        hidden: width of the query network.

    Returns (of `encode_set`):
        instance scores ``(*, C)`` and bag vectors ``(*, C, dim)``.
    """

    def __init__(self, dim: int, classes: int = 1, hidden: int = 128) -> None:
        super().__init__(CriticalInstances(nn.Linear(dim, classes)), CriticalAttention(dim, hidden))
