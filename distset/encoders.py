r"""Mini-batch consistent set encoders: a chunk in, a mergeable state out.

A `ChunkEncoder` splits the encoding of a set into three parts: ``query`` draws, once per set and step, what all chunks
share (random slots, folded projections); ``encode(chunk, query)`` is the state of one chunk; ``readout(state, query)``
is what follows the merged state (slot residual, layer norm, further layers) and sees plain gradients. Any partition of
the set gives the same value; `distset.testing.check_encoder` proves it for an encoder of your own.

Shapes: ``*`` batch, ``N`` elements, ``D`` width of an element, ``K`` slots, ``H`` heads, ``d = D_out / H``.

References:
    [1] Willette et al.: Scalable Set Encoding with Universal Mini-Batch Consistency ... ICML 2023. arXiv:2208.12401
    [2] Bruno, Willette, Lee, Hwang: Mini-Batch Consistent Slot Set Encoder for Scalable Set Encoding. NeurIPS 2021.
    [3] Zaheer et al.: Deep Sets. NeurIPS 2017. arXiv:1703.06114
    [4] Ilse, Tomczak, Welling: Attention-based Deep Multiple Instance Learning. ICML 2018. arXiv:1802.04712
    [5] Li, Li, Eliceiri: Dual-stream Multiple Instance Learning Network ... CVPR 2021. arXiv:2011.08939
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distset.kernels import HALVES, fused_pool, fused_pool_fits, wide_product
from distset.sets import Chunk
from distset.states import Max, Mean, Product, Softmax, Sum, TopK

__all__ = [
    "DSMIL", "SSE", "UMBC", "AttentionPool", "ChunkEncoder", "CriticalInstances", "DeepSets", "Features",
    "HierarchicalSSE", "MaxInstance", "Parallel", "Sweeps",
]  # fmt: skip

ACTIVATIONS = ("softmax", "sigmoid", "slot-sigmoid", "slot-softmax", "slot-exp")


class ChunkEncoder(nn.Module):
    """The base of every set encoder; subclasses give ``encode`` and, where needed, ``query`` and ``readout``.

    Attributes:
        block: sweeps without a graph may take small chunks together, up to so many elements. Only for an encoder whose
            ``encode`` draws nothing random (a chunk's dropout follows its id) and is light on memory; 0 forbids it.
    """

    block: int = 0

    def query(self, batch_shape: torch.Size, generator: torch.Generator, condition: Any = None) -> tuple[Any, ...]:
        """What all chunks share: a (named) tuple of tensors, drawn from ``generator`` where random."""
        return ()

    def encode(self, chunk: Chunk, query: Any) -> Any:
        """The state of one chunk."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(chunk, query)")

    def readout(self, state: Any, query: Any) -> Any:
        """The encoding, from the state of the whole set."""
        return state.value()

    def forward(self, chunk: Chunk, query: Any) -> Any:
        return self.encode(chunk, query)


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
        _check_in("pool", pool, ("sum", "mean", "max", "min"))
        self.phi = nn.Identity() if phi is None else phi
        self.pool = pool

    def encode(self, chunk: Chunk, query: Any) -> Any:
        h = _accumulable(self.phi(chunk.elements))
        if self.pool in ("max", "min"):
            return _max_state(h if self.pool == "max" else -h, chunk)
        if chunk.mask is not None:
            h = h.masked_fill(~chunk.mask.unsqueeze(-1), 0.0)
        state = Sum if self.pool == "sum" else Mean
        return state(h.sum(-2), chunk.counts(h.dtype))

    def readout(self, state: Any, query: Any) -> Tensor:
        return -state.value() if self.pool == "min" else state.value()


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
        ValueError: for an unknown activation, heads that do not divide ``dim_out``, unnormalised softmax.

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

    block = 8192  # fewest calls; from here on the time an element is flat

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
        _check_in("activation", activation, ACTIVATIONS)
        if slots < 1 or heads < 1 or dim_out % heads:
            raise ValueError(f"slots, heads: got {slots} and {heads}, wanted at least 1 each, heads dividing {dim_out}")
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
        if self.fold:
            if self._fusible(chunk, query):
                return Softmax(*fused_pool(query.keys, x_ND))
            logits_KN = _product(query.keys, x_ND.mT)
            if query.bias is not None:
                logits_KN = logits_KN + query.bias
            return _pool(self._log_weights(logits_KN), x_ND, chunk.mask, self.normalize)
        keys_HNd, values_HNd = self._split(self.to_key(x_ND)), self._split(self.to_value(x_ND))
        logits_HKN = _product(query.keys, keys_HNd.mT)
        mask = None if chunk.mask is None else chunk.mask.unsqueeze(-2)
        return _pool(self._log_weights(logits_HKN), values_HNd, mask, self.normalize)

    def _fusible(self, chunk: Chunk, query: Slots) -> bool:
        plain = torch.is_grad_enabled() or chunk.mask is not None or self.activation != "softmax"
        return not plain and fused_pool_fits(query.keys, chunk.elements)

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
        dim, slots, dim_out, heads, random_slots, layer_norm: as in `UMBC`.
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
            activation="slot-sigmoid",
            random_slots=random_slots,
            layer_norm=layer_norm,
            normalize=normalize,
        )
        _check_in("pool", pool, ("mean", "sum", "max", None))
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
        h = torch.tanh(self.to_tanh(chunk.elements))
        if self.to_gate is not None:
            h = h * torch.sigmoid(self.to_gate(chunk.elements))
        return _pool(_accumulable(self.score(h)).mT, chunk.elements, chunk.mask, True)

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
        return _max_state(_accumulable(self.score(chunk.elements)), chunk)


class CriticalInstances(ChunkEncoder):
    """The first stream of DS-MIL [5]: for each class the element of highest score, with its features.

    Returns (of `encode_set`):
        scores ``(*, C)`` and features ``(*, C, D)``.
    """

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def encode(self, chunk: Chunk, query: Any) -> TopK:
        scores_CN = _accumulable(self.score(chunk.elements)).mT
        if chunk.mask is not None:
            scores_CN = scores_CN.masked_fill(~chunk.mask.unsqueeze(-2), -torch.inf)
        features = _accumulable(chunk.elements).unsqueeze(-3).expand(*scores_CN.shape, -1)
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
        logits_CN = _product(query[1], self.to_query(chunk.elements).mT)
        return _pool(logits_CN, self.to_value(chunk.elements), chunk.mask, True)

    def readout(self, state: Softmax, query: Any) -> tuple[Tensor, Tensor]:
        return query[0], state.value()


class Sweeps(nn.Module):
    """Encoders that need several sweeps over the set: each stage's query is conditioned on the readout before it."""

    def __init__(self, *stages: ChunkEncoder) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)


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


class Features(ChunkEncoder):
    """A feature extractor inside the encoder: elements may be images, trained end to end chunk by chunk.

    Args:
        extractor: a network on a batch of elements ``(M, *element)`` giving ``(M, D)``; no train-mode BatchNorm.
        encoder: the encoder of the features.
    """

    def __init__(self, extractor: nn.Module, encoder: ChunkEncoder) -> None:
        super().__init__()
        self.extractor, self.encoder = extractor, encoder

    def query(self, batch_shape: torch.Size, generator: torch.Generator, condition: Any = None) -> tuple[Any, ...]:
        return self.encoder.query(batch_shape, generator, condition)

    def encode(self, chunk: Chunk, query: Any) -> Any:
        return self.encoder.encode(self.features(chunk), query)

    def features(self, chunk: Chunk) -> Chunk:
        """The chunk with features as elements."""
        lead = (*chunk.batch_shape, chunk.size)
        features = self.extractor(chunk.elements.reshape(-1, *chunk.elements.shape[len(lead) :]))
        return chunk._replace(elements=features.view(*lead, -1), element_ndim=1)

    def readout(self, state: Any, query: Any) -> Any:
        return self.encoder.readout(state, query)


class Parallel(ChunkEncoder):
    """Several encoders of the same elements in one sweep; the encoding is the tuple of theirs."""

    def __init__(self, *encoders: ChunkEncoder) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def query(self, batch_shape: torch.Size, generator: torch.Generator, condition: Any = None) -> tuple[Any, ...]:
        return tuple(encoder.query(batch_shape, generator, condition) for encoder in self._each())

    def encode(self, chunk: Chunk, query: Any) -> Product:
        return Product(tuple(e.encode(chunk, q) for e, q in zip(self._each(), query, strict=True)))

    def readout(self, state: Product, query: Any) -> tuple[Any, ...]:
        return tuple(e.readout(s, q) for e, s, q in zip(self._each(), state.states, query, strict=True))

    def _each(self) -> Iterable[ChunkEncoder]:
        return cast(Iterable[ChunkEncoder], self.encoders)


def _accumulable(x: Tensor) -> Tensor:
    """States are float32, or float64 where the inputs are."""
    return x if x.dtype == torch.float64 else x.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the precision of states, whatever autocast would do: logits and sums must not be rounded to halves."""
    if b.is_cuda and b.dtype in HALVES:
        return wide_product(a, b)
    if not torch.is_autocast_enabled(a.device.type):
        return _accumulable(a) @ _accumulable(b)
    with torch.autocast(a.device.type, enabled=False):
        return _accumulable(a) @ _accumulable(b)


def _pool(log_weights_KN: Tensor, values_ND: Tensor, mask: Tensor | None, normalize: bool) -> Softmax:
    """The softmax state of values under weights given by their logarithms; unnormalised weights keep a shift of 0."""
    if mask is not None:
        log_weights_KN = log_weights_KN.masked_fill(~mask.unsqueeze(-2), -torch.inf)
        values_ND = values_ND.masked_fill(~mask.unsqueeze(-1), 0.0)
    shift = log_weights_KN.detach().amax(-1, keepdim=True)
    shift = shift.clamp_min(torch.finfo(shift.dtype).min) if normalize else torch.zeros_like(shift)
    if torch.is_grad_enabled() or log_weights_KN.dtype != shift.dtype:
        weights_KN = torch.exp(log_weights_KN - shift)
    else:  # a sweep owns its logits: no second and third tensor of their size
        weights_KN = log_weights_KN.sub_(shift).exp_()
    return Softmax(_product(weights_KN, values_ND), weights_KN.sum(-1, keepdim=True), shift)


def _max_state(h_ND: Tensor, chunk: Chunk) -> Max:
    if chunk.mask is not None:
        h_ND = h_ND.masked_fill(~chunk.mask.unsqueeze(-1), -torch.inf)
    top = h_ND.amax(-2)
    return Max(top, (h_ND == top.unsqueeze(-2)).sum(-2).to(top.dtype))


def _check_in(name: str, value: Any, wanted: tuple[Any, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, wanted))}")
