"""The protocol of a set encoder, and encoders made of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from distset.encoders.stream import Stream
from distset.sets import Chunk
from distset.states import Product

__all__ = ["ChunkEncoder", "Features", "Parallel", "Sweeps"]


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

    def stream(self, *, element_ndim: int = 1, seed: int = 0) -> Stream:
        """A running encoding that takes chunks as they come; see `distset.encoders.stream.Stream`."""
        return Stream(self, element_ndim=element_ndim, seed=seed)


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


class Sweeps(nn.Module):
    """Encoders that need several sweeps over the set: each stage's query is conditioned on the readout before it."""

    def __init__(self, *stages: ChunkEncoder) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
