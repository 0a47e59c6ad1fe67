"""Deep Sets: sums, means and extrema of an element network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distset.encoders.base import ChunkEncoder
from distset.encoders.pooling import accumulable, check_in, max_state
from distset.sets import Chunk
from distset.states import Mean, Sum

__all__ = ["DeepSets"]


class DeepSets(ChunkEncoder):
    r"""Sum, mean, max or min of an element network, :math:`\mathrm{pool}_i\, \phi(x_i)` [3].

    Args:
        phi: a network on ``(*, N, D)``; None for the identity.
        pool: ``"sum"``, ``"mean"``, ``"max"`` or ``"min"``.

    Returns (of `encode_set`):
        ``(*, D_out)``.
    """

    def __init__(self, phi: nn.Module | None = None, pool: str = "mean") -> None:
        super().__init__()
        check_in("pool", pool, ("sum", "mean", "max", "min"))
        self.phi = nn.Identity() if phi is None else phi
        self.pool = pool

    def encode(self, chunk: Chunk, query: Any) -> Any:
        h = accumulable(self.phi(chunk.elements))
        if self.pool in ("max", "min"):
            return max_state(h if self.pool == "max" else -h, chunk)
        if chunk.mask is not None:
            h = h.masked_fill(~chunk.mask.unsqueeze(-1), 0.0)
        state = Sum if self.pool == "sum" else Mean
        return state(h.sum(-2), chunk.counts(h.dtype))

    def readout(self, state: Any, query: Any) -> Tensor:
        return -state.value() if self.pool == "min" else state.value()
