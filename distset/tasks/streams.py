"""Sets that come piece by piece: the four streaming settings of the paper, and the encoding after each piece.

References:
    Willette et al. 2023, figures 2 and 8. https://arxiv.org/abs/2208.12401
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from distset.encoders import ChunkEncoder
from distset.seeds import generator_for
from distset.sets import Chunk

__all__ = ["STREAMS", "encodings", "stream"]

STREAMS = ("single point", "class", "chunk", "one each")


def stream(name: str, labels: Tensor, *, chunks: int = 128, seed: int = 0) -> list[Tensor]:
    """The positions of each piece of a set whose elements have classes ``labels (N)``, in the order in which they come.

    ``"single point"``: one element at a time, shuffled; ``"class"``: all of one class, then all of the next; ``"chunk"``:
    ``chunks`` random chunks; ``"one each"``: one element of every class that has some left.

    Raises:
        ValueError: for another name.
    """
    order = torch.randperm(len(labels), generator=generator_for(seed, "stream"))
    if name == "single point":
        return list(order.split(1))
    if name == "chunk":
        return list(order.tensor_split(min(chunks, len(order))))
    classes = [order[labels[order] == label] for label in labels.unique()]
    if name == "class":
        return classes
    if name == "one each":
        longest = max(len(own) for own in classes)
        return [torch.stack([own[i] for own in classes if i < len(own)]) for i in range(longest)]
    raise ValueError(f"name: got {name!r}, wanted one of {', '.join(map(repr, STREAMS))}")


def encodings(encoder: ChunkEncoder, elements: Tensor, pieces: Iterable[Tensor]) -> Iterator[Any]:
    """The encoding of what has come so far, after each piece; only the merged state is kept.

    Args:
        encoder: in eval mode.
        elements: ``(N, D)``, of which each piece names positions.
    """
    query = encoder.query(torch.Size(), generator_for(0, "query"), None)
    state = None
    with torch.no_grad():
        for number, piece in enumerate(pieces):
            part = encoder(Chunk(elements[piece], id=number), query)
            state = part if state is None else state.merge(part)
            yield encoder.readout(state, query)
