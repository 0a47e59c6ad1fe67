"""What the experiments on sets of points, pixels and words share: whole-set networks as encoders, and partitions.

References as in `distset.encoders` and `distset.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from distset.blocks import PMA, SAB, DiffEM
from distset.encode import encode_set
from distset.encoders import UMBC, ChunkEncoder, Features, Sweeps
from distset.encoders.pooling import accumulable
from distset.seeds import generator_for
from distset.sets import Chunk, ChunkedSet, InMemory
from distset.states import Mean, Softmax

__all__ = [
    "FittedMixture",
    "LinearFeatures",
    "PerChunk",
    "SetModel",
    "Waves",
    "in_blocks",
    "partition_variance",
    "random_bounds",
    "slots_to_vector",
]


class SetModel(nn.Module):
    """A function of a set: what its encoding says.

    Args:
        encoder: of the elements, a `ChunkEncoder` or `Sweeps` of several.
        head: from the encoding to the output.
        grad: the gradient strategy of `encode_set`; `Exact()` if None.
    """

    def __init__(self, encoder: ChunkEncoder | Sweeps, head: nn.Module, grad: Any = None) -> None:
        super().__init__()
        self.encoder, self.head, self.grad = encoder, head, grad

    def forward(self, set: ChunkedSet, *, seed: int | None = None) -> Any:
        return self.head(encode_set(self.encoder, set, grad=self.grad, seed=seed))


class PerChunk(ChunkEncoder):
    """A set network that is not mini-batch consistent: applied to every chunk on its own, and averaged over the chunks.

    In one chunk this is the network itself. In several it is what one does for want of better, and its value depends on
    the partition (Willette et al. 2023, figure 3): train it on whole sets, or on subsets that fit.

    Args:
        network: from ``(*, N, D)`` to a tensor of fixed shape, ``(*, D_out)`` or ``(*, K, D_out)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def encode(self, chunk: Chunk, query: Any) -> Mean:
        if chunk.mask is not None:
            raise ValueError("set: got a mask, wanted sets of one size for a network that sees each chunk as a whole")
        pooled = accumulable(self.network(chunk.elements))
        return Mean(pooled, torch.ones(pooled.shape[:-1], dtype=pooled.dtype, device=pooled.device))


class LinearFeatures(Features):
    r"""`Features` that end in a linear layer, for UMBC: sweeps without a graph do not apply that layer to the elements.

    With :math:`x_i = W h_i + b` logits are :math:`k^\top x_i = (W^\top k)^\top h_i + k^\top b` and weighted sums
    :math:`\sum_i w_i x_i = W \sum_i w_i h_i + b \sum_i w_i`: the same state at a multiplication a slot instead of one an
    element. Where gradients are on, the layer is applied as written.

    Args:
        extractor: layers, the last of which is an `nn.Linear`.
        encoder: a `UMBC`; one that does not fold its keys gets no faster.
    """

    def __init__(self, extractor: nn.Sequential, encoder: UMBC) -> None:
        super().__init__(extractor, encoder)
        if not isinstance(extractor[-1], nn.Linear):
            raise ValueError(f"extractor: ends in {type(extractor[-1]).__name__}, wanted a linear layer")

    def encode(self, chunk: Chunk, query: Any) -> Softmax:
        encoder, layers = cast(UMBC, self.encoder), cast(nn.Sequential, self.extractor)
        if torch.is_grad_enabled() or not encoder.fold:
            return encoder.encode(self.features(chunk), query)
        *others, last = cast(list[Any], list(layers))
        h = chunk.elements
        for layer in others:
            h = layer(h)
        hidden = chunk._replace(elements=h)
        shift = last.weight.new_zeros(last.out_features) if last.bias is None else last.bias
        constant = query.keys @ shift.unsqueeze(-1)
        keys = query.keys @ last.weight
        if encoder.activation == "softmax":  # a constant of a slot moves the shift alone
            state = encoder.encode(hidden, query._replace(keys=keys))
            state = state._replace(shift=state.shift + constant)
        else:
            bias = constant if query.bias is None else query.bias + constant
            state = encoder.encode(hidden, query._replace(keys=keys, bias=bias))
        return state._replace(total=state.total @ last.weight.mT + state.mass * shift)


class Waves(nn.Module):
    r"""The first two entries x of an element, a place in [-1, 1]², also as sines and cosines of :math:`2^j \pi x / 2`, and
    its values in [0, 1] spread over [-1, 1].

    A network of few steps tells near places apart by these; ``frequencies=0`` leaves elements as they are.

    Args:
        frequencies: F, j = 0 .. F - 1.
    """

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        if frequencies < 0:
            raise ValueError(f"frequencies: got {frequencies}, wanted 0 or more")
        self.frequencies = frequencies
        self.rates: Tensor
        self.register_buffer("rates", torch.pi / 2 * 2.0 ** torch.arange(frequencies), persistent=False)

    @property
    def added(self) -> int:
        """Entries that an element gains."""
        return 4 * self.frequencies

    def forward(self, x: Tensor) -> Tensor:
        """``(*, 2 + C)`` to ``(*, 2 + C + 4 F)``."""
        if self.frequencies == 0:
            return x
        angles = (x[..., :2].unsqueeze(-1) * self.rates).flatten(-2)
        return torch.cat([x[..., :2], 2 * x[..., 2:] - 1, angles.sin(), angles.cos()], -1)


class FittedMixture(nn.Module):
    """`DiffEM` followed by a linear layer of all its components: a set ``(*, K, dim)`` to a vector ``(*, dim_out)``.

    Args:
        dim, components, heads, steps, tau: as in `DiffEM`.
        dim_out: width of the vector; ``dim`` if None.
    """

    def __init__(
        self, dim: int, *, dim_out: int | None = None, components: int = 4, heads: int = 5, steps: int = 3, tau: float = 0.01
    ) -> None:
        super().__init__()
        self.fit = DiffEM(dim, components, heads=heads, steps=steps, tau=tau, floor=1e-3)
        self.out = nn.Linear(heads * components * (1 + 2 * dim), dim if dim_out is None else dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fit(x).flatten(-2))


def slots_to_vector(width: int, *, blocks: int = 2, heads: int = 4, layer_norm: bool = True) -> nn.Sequential:
    """A Set Transformer from slots ``(*, K, width)`` to one vector ``(*, width)``."""
    attend = [SAB(width, heads=heads, layer_norm=layer_norm) for _ in range(blocks)]
    return nn.Sequential(*attend, PMA(width, heads=heads, layer_norm=layer_norm), nn.Flatten(-2))


def in_blocks(encoder: ChunkEncoder, elements: int = 1024) -> ChunkEncoder:
    """The encoder, whose sweeps may take up to so many elements at once: small chunks cost no call of their own."""
    encoder.block = elements
    return encoder


def partition_variance(
    function: Callable[[ChunkedSet], Tensor], elements: Tensor, *, partitions: int = 100, seed: int = 0
) -> float:
    """The variance of a function of a set over random partitions of it, averaged over its entries (figure 3).

    Every partition orders the elements anew and cuts them at random.

    Args:
        function: of the set; whatever it draws must stay the same (``encode_set(..., seed=0)``). In float64 the variance of
            a consistent one is far below what any other has.
        elements: ``(N, D)``.
        partitions: how many.
        seed: of the partitions.
    """
    size = len(elements)
    values = []
    with torch.no_grad():
        for number in range(partitions):
            random = generator_for(seed, "partition", number)
            shuffled = elements[torch.randperm(size, generator=random)]
            values.append(function(InMemory(shuffled, bounds=random_bounds(size, random))))
    return float(torch.stack(values).var(0, correction=0).mean())


def random_bounds(size: int, random: torch.Generator) -> list[int]:
    """Borders of a random partition of ``size`` elements into 2 to 16 chunks."""
    cuts = int(torch.randint(1, min(16, size), (), generator=random))
    inner = 1 + torch.randperm(size - 1, generator=random)[:cuts]
    return [0, *sorted(inner.tolist()), size]
