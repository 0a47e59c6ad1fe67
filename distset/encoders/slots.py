r"""Attention from slots to elements: UMBC, slot set encoders and their hierarchy.

Shapes: ``*`` batch, ``N`` elements, ``D`` width of an element, ``K`` slots, ``H`` heads, ``d = D_out / H``. References as in
`distset.encoders`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.encoders.base import ChunkEncoder
from distset.encoders.pooling import check_in, check_width, softmax_state, streamed_fits, streamed_softmax_state, wide
from distset.kernels import fused_pool, fused_pool_fits
from distset.sets import Chunk
from distset.states import Softmax

__all__ = ["ACTIVATIONS", "SSE", "UMBC", "HierarchicalSSE", "Slots"]

ACTIVATIONS = ("softmax", "sigmoid", "slot-sigmoid", "slot-softmax", "slot-exp")


class Slots(NamedTuple):
    """The query of `UMBC`: what the slots become before they meet an element.

    Attributes:
        projected: the slots' queries ``(*, K, D_out)``, which the residual adds to the pooled values.
        keys: folded ``(*, H K, D)`` or per head ``(*, H, K, d)``, scaled by ``1/sqrt(d)``.
        bias: of the logits where keys are folded, ``(*, H K, 1)``; None without.
    """

    projected: Tensor
    keys: Tensor
    bias: Tensor | None


class UMBC(ChunkEncoder):
    r"""Universally mini-batch consistent attention from slots to elements, [1] eq. 3 to 6.

    .. math:: \hat a_{ki} = \frac{(s_k W_q)(x_i W_k)^\top}{\sqrt d}, \qquad
              z_k = \frac{\sum_i w_{ki}\, x_i W_v}{\sum_i w_{ki}}

    with the weights of Table 15: ``softmax`` :math:`w = e^{\hat a}`; ``sigmoid`` :math:`\sigma(\hat a)`; ``slot-sigmoid``,
    ``slot-softmax`` :math:`\sigma(\hat a)`, :math:`e^{\hat a}` over their sum over the slots; ``slot-exp``
    :math:`e^{\hat a}` over its maximum over the slots. Every weight is kept as :math:`e^{\log w}` and normalised over the
    elements as a softmax with a running maximum, so all five are exact for any logits: no clamp, no epsilon.

    One head with few slots: :math:`W_k` is folded into the slots and :math:`W_v` applied after pooling, an exact
    re-association that saves both projections of every element; chosen by multiplications unless ``fold`` says.

    Args:
        dim: width D of an element.
        slots: K.
        dim_out: width of a pooled slot; ``dim`` if None.
        heads: H, divides ``dim_out``.
        activation: one of the five above.
        random_slots: draw :math:`s = \mu + \mathrm{softplus}(\rho)\,\epsilon` once per set and step (in evaluation from
            seed 0 unless told otherwise); else learned slots.
        residual: add the slots' queries to the pooled values; their gradient is plain, never scaled.
        layer_norm: normalise slots before, pooled values after.
        normalize: divide by the sum of weights over the elements. Only False for a weight that is bounded without it.
        fold: True, False, or None to choose by cost.

    Returns (of `encode_set`):
        ``(*, K, dim_out)``.

    Raises:
        ValueError: for an unknown activation, sizes below 1, heads that do not divide ``dim_out``, unnormalised softmax.

    Example:
        >>> import torch
        >>> from distset import UMBC, InMemory, encode_set
        >>> encoder = UMBC(dim=8, slots=4, heads=2, random_slots=True)
        >>> x = torch.randn(3, 100, 8)  # a batch of three sets
        >>> whole = encode_set(encoder, InMemory(x), seed=1)
        >>> parts = encode_set(encoder, InMemory(x, chunk_size=7), seed=1)
        >>> whole.shape, torch.allclose(whole, parts, atol=1e-6)
        (torch.Size([3, 4, 8]), True)
    """

    def __init__(
        self,
        dim: int,
        slots: int,
        *,
        dim_out: int | None = None,
        heads: int = 1,
        activation: str = "softmax",
        random_slots: bool = False,
        residual: bool = False,
        layer_norm: bool = False,
        normalize: bool = True,
        fold: bool | None = None,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        check_in("activation", activation, ACTIVATIONS)
        if min(dim, dim_out, slots, heads) < 1 or dim_out % heads:
            raise ValueError(
                f"dim, dim_out, slots, heads: got {dim}, {dim_out}, {slots} and {heads}, wanted at least 1 each, heads "
                f"dividing {dim_out}"
            )
        if not normalize and activation in ("softmax", "slot-exp"):
            raise ValueError(f"normalize: got False with {activation!r}, whose weights are unbounded; keep True")
        self.slots, self.heads, self.width = slots, heads, dim_out // heads
        self.activation, self.residual, self.normalize = activation, residual, normalize
        self.mu = nn.Parameter(torch.randn(slots, dim) / math.sqrt(dim))
        self.rho = nn.Parameter(torch.full((slots, dim), -1.0)) if random_slots else None
        self.to_query = nn.Linear(dim, dim_out)
        # Over elements a softmax does not see a constant of its slot: a key bias would never get a gradient.
        self.to_key = nn.Linear(dim, dim_out, bias=activation != "softmax")
        self.to_value = nn.Linear(dim, dim_out)
        self.norm_slots = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.norm_pooled = nn.LayerNorm(dim_out) if layer_norm else nn.Identity()
        # Multiplications an element: folded H K (D + D); projected D_out (D + D) + K (D_out + D_out).
        self.fold = heads * slots * dim <= dim_out * (dim + slots) if fold is None else fold
        self.block = 65_536 if self.fold and activation == "softmax" else 4096  # the faster form needs no room for logits

    def query(self, batch_shape: torch.Size, generator: torch.Generator, condition: Any = None) -> Slots:
        slots: Tensor = self.mu
        if self.rho is not None:
            noise = torch.randn((*batch_shape, *slots.shape), generator=generator, dtype=slots.dtype)
            slots = slots + F.softplus(self.rho) * noise.to(slots.device)
        projected = self.to_query(self.norm_slots(slots))
        heads_HKd = self._split(projected) / math.sqrt(self.width)
        if not self.fold:
            return Slots(projected, heads_HKd, None)
        weight = self.to_key.weight.view(self.heads, self.width, -1)
        bias = None
        if self.to_key.bias is not None:
            bias = (heads_HKd @ self.to_key.bias.view(self.heads, self.width, 1)).flatten(-3, -2)
        return Slots(projected, (heads_HKd @ weight).flatten(-3, -2), bias)

    def encode(self, chunk: Chunk, query: Slots) -> Softmax:
        x_ND = chunk.elements
        check_width(x_ND, query.keys.shape[-1] if self.fold else self.to_key.in_features)
        if self.fold:
            if self._plain_sweep(chunk):
                if fused_pool_fits(query.keys, x_ND):
                    return Softmax(*fused_pool(query.keys, x_ND))
                if streamed_fits(query.keys, x_ND):
                    return streamed_softmax_state(query.keys, x_ND)
            logits_KN = wide(query.keys, x_ND.mT)
            if query.bias is not None:
                logits_KN = logits_KN + query.bias
            return softmax_state(self._log_weights(logits_KN), x_ND, chunk.mask, self.normalize)
        keys_HNd, values_HNd = self._split(self.to_key(x_ND)), self._split(self.to_value(x_ND))
        logits_HKN = wide(query.keys, keys_HNd.mT)
        mask = None if chunk.mask is None else chunk.mask.unsqueeze(-2)
        return softmax_state(self._log_weights(logits_HKN), values_HNd, mask, self.normalize)

    def _plain_sweep(self, chunk: Chunk) -> bool:
        """Whether this is a softmax over all elements without a graph, for which there are faster forms."""
        return self.activation == "softmax" and chunk.mask is None and not torch.is_grad_enabled()

    def _log_weights(self, logits_KN: Tensor) -> Tensor:
        """The logarithm of the weights before normalisation over the elements."""
        if self.activation == "softmax":
            return logits_KN
        if self.activation == "sigmoid":
            return F.logsigmoid(logits_KN)
        shape = logits_KN.shape
        by_head = logits_KN.unflatten(-2, (self.heads, self.slots)) if self.fold else logits_KN
        if self.activation == "slot-sigmoid":
            by_head = F.logsigmoid(by_head)
        if self.activation == "slot-exp":
            return (by_head - by_head.amax(-2, keepdim=True)).reshape(shape)
        return (by_head - by_head.logsumexp(-2, keepdim=True)).reshape(shape)

    def readout(self, state: Softmax, query: Slots) -> Tensor:
        pooled = (state.value() if self.normalize else state.total).to(query.projected.dtype)
        if self.fold:
            pooled = pooled.unflatten(-2, (self.heads, self.slots))
            pooled = pooled @ self.to_value.weight.view(self.heads, self.width, -1).mT
            bias = self.to_value.bias.view(self.heads, 1, self.width)
            if not self.normalize:  # the bias of a value counts once per unit of weight
                bias = bias * state.mass.unflatten(-2, (self.heads, self.slots))
            pooled = pooled + bias
        z = pooled.transpose(-3, -2).flatten(-2)
        if self.residual:
            z = z + query.projected
        return self.norm_pooled(z)

    def _split(self, x: Tensor) -> Tensor:
        """``(*, M, D_out)`` to heads ``(*, H, M, d)``."""
        return x.unflatten(-1, (self.heads, self.width)).transpose(-3, -2)


class SSE(UMBC):
    r"""Slot set encoder [2]: slot-sigmoid attention, unnormalised over the elements, slots pooled to one vector.

    Args:
        dim, slots, dim_out, heads, activation, random_slots, layer_norm: as in `UMBC`.
        pool: over the slots: ``"mean"``, ``"sum"``, ``"max"``, or None to keep them.
        normalize: divide by the sum of weights (as the published UMBC code does for its SSE; Table 15 of [1] does not).

    Returns (of `encode_set`):
        ``(*, dim_out)``, or ``(*, K, dim_out)`` where ``pool`` is None.
    """

    def __init__(
        self,
        dim: int,
        slots: int,
        *,
        dim_out: int | None = None,
        heads: int = 1,
        activation: str = "slot-sigmoid",
        pool: str | None = "mean",
        random_slots: bool = False,
        layer_norm: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__(
            dim,
            slots,
            dim_out=dim_out,
            heads=heads,
            activation=activation,
            random_slots=random_slots,
            layer_norm=layer_norm,
            normalize=normalize,
        )
        check_in("pool", pool, ("mean", "sum", "max", None))
        self.pool = pool

    def readout(self, state: Softmax, query: Slots) -> Tensor:
        z = super().readout(state, query)
        if self.pool is None:
            return z
        return z.amax(-2) if self.pool == "max" else getattr(z, self.pool)(-2)


class HierarchicalSSE(ChunkEncoder):
    """A stack of slot set encoders [2, sec. 3.3]: the first sees the set, each further one the slots before it.

    Args:
        first: an `SSE` (or any `UMBC`) that keeps its slots.
        rest: encoders of the ``(*, K, D)`` slots before them; the last one may pool.
    """

    def __init__(self, first: UMBC, *rest: UMBC) -> None:
        super().__init__()
        self.first, self.rest = first, nn.ModuleList(rest)

    def query(self, batch_shape: torch.Size, generator: torch.Generator, condition: Any = None) -> tuple[Any, ...]:
        return tuple(layer.query(batch_shape, generator, condition) for layer in self._layers())

    def encode(self, chunk: Chunk, query: Any) -> Any:
        return self.first.encode(chunk, query[0])

    def readout(self, state: Any, query: Any) -> Tensor:
        z = self.first.readout(state, query[0])
        for layer, layer_query in zip(self._layers()[1:], query[1:], strict=True):
            z = layer.readout(layer.encode(Chunk(z), layer_query), layer_query)
        return z

    def _layers(self) -> list[UMBC]:
        return [self.first, *cast(Iterable[UMBC], self.rest)]
