r"""Why a set got its score: attention and signed contribution of every element, in one stream.

An element is a set of one: its state, re-based on the state of the whole set, is what it added to it. So for any
encoder, and at the memory of one chunk,

.. math:: \text{attention}_{ik} = e^{\log m_{ik} - \log m_k}, \qquad
          \text{contribution}_{ic} = \Big\langle \frac{\partial\, \text{score}_c}{\partial s}, s_i \Big\rangle,
          \qquad s = \sum_i s_i,

with :math:`m` the masses of states and :math:`s_i` the element's summands. The attention of each slot sums to 1 over
the set. A contribution is the derivative of the score in the weight with which the element enters the sums: above zero
where more of it would raise the score. Where the pooling divides by its weights (softmax), contributions sum to 0, for
each element is held against the mean of the set; where it does not (sum, mean), they are shares of the score itself.

`score_alone` asks another question: the score of each element as a set of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distset.encode import _Inputs, _Precision, encode_set, encode_state
from distset.encoders import ChunkEncoder, Sweeps
from distset.seeds import generator_for, seed_for
from distset.sets import Chunk, ChunkedSet
from distset.states import Max, Product, TopK

__all__ = ["Explanation", "explain_set", "score_alone"]

BUDGET = 2**22
"""Numbers that the states of the elements worked on at once may hold: 16 MiB in float32."""

Score = Callable[[Any], Tensor]
"""What is explained: from an encoding, with any batch dimensions, to scores ``(*, C)``."""


class Explanation(NamedTuple):
    """What is said about the elements of one chunk.

    Attributes:
        start: position of the first of them in the set.
        attention: shares ``(N, K)``; a column for each slot and head, or each entry of a maximum.
        contribution: ``(N, C)``, signed; a column for each score.
    """

    start: int
    attention: Tensor
    contribution: Tensor


def explain_set(
    encoder: ChunkEncoder | Sweeps, set: ChunkedSet, score: Score, *, seed: int | None = None, condition: Any = None
) -> Iterator[Explanation]:
    """Attention and contribution of every element, chunk by chunk.

    Two sweeps over the set: one for its state, one for its elements; a third one where a maximum is pooled. Of an encoder
    with several `Sweeps` the last one is explained, with what the earlier ones found held fixed.

    Args:
        encoder: in evaluation mode.
        set: one set (no batch dimensions), in memory or not. Elements that are masked out get 0.
        score: from the encoding to the scores ``(C)`` to explain, such as a classifier's logits.
        seed, condition: as in `encode_set`.

    Returns:
        An iterator of `Explanation`, by ascending position.

    Raises:
        ValueError: for an encoder in training mode, a batch of sets, scores that are not ``(C)``.

    Example:
        >>> import torch
        >>> from distset import AttentionPool, InMemory
        >>> from distset.explain import explain_set
        >>> encoder, head = AttentionPool(8).eval(), torch.nn.Linear(8, 2)
        >>> bag = InMemory(torch.randn(1000, 8), chunk_size=256)
        >>> parts = list(explain_set(encoder, bag, head))
        >>> [part.start for part in parts], parts[0].contribution.shape
        ([0, 256, 512, 768], torch.Size([256, 2]))
        >>> round(sum(part.attention.sum().item() for part in parts), 3)
        1.0
    """
    _check(encoder, set)
    seed = 0 if seed is None else seed
    stages = _stages(encoder, seed)
    for stage, stage_seed in stages[:-1]:
        with torch.no_grad():
            condition = encode_set(stage, set, seed=stage_seed, condition=condition)
    stage, stage_seed = stages[-1]
    with torch.no_grad():
        total, query = encode_state(stage, set, seed=stage_seed, condition=condition)
    cotangents = _cotangents(lambda state: score(stage.readout(state, query)), total)
    precision = _Precision.current(_Inputs.of(stage, query))
    if _maxima(total):
        attained = set.merge(_chunk_maxima, stage, query, precision, _width(cotangents))
        total = _with_maxima(total, list(attained.states))
    return set.map(_explain_chunk, stage, query, total, cotangents, precision)


def score_alone(
    encoder: ChunkEncoder | Sweeps, set: ChunkedSet, score: Score, *, seed: int | None = None, condition: Any = None
) -> Iterator[Tensor]:
    """The score of every element as a set of its own, chunk by chunk: ``(N, C)``, in one sweep.

    Arguments as in `explain_set`. Everything that is drawn per set (random slots) is the same for all elements.
    """
    _check(encoder, set)
    stages = _stages(encoder, 0 if seed is None else seed)
    precision = _Precision.current(_Inputs.of(encoder, ()))
    return set.map(_score_chunk, stages, score, condition, precision)


def _stages(encoder: ChunkEncoder | Sweeps, seed: int) -> list[tuple[ChunkEncoder, int]]:
    """The encoders of each sweep with the seeds that `encode_set` gives them."""
    if (stages := getattr(encoder, "stages", None)) is None:
        return [(cast(ChunkEncoder, encoder), seed)]
    return [(stage, seed_for(seed, "stage", number)) for number, stage in enumerate(stages)]


@torch.enable_grad()  # also within the caller's no_grad
def _cotangents(score: Score, total: Any) -> list[Tensor]:
    """The derivatives of the scores in each of the state's sums: ``(C, *sum)``, one tensor a sum."""
    sums = tuple(s.detach().requires_grad_() for s in total.summands(total))
    scores = score(total.with_sums(sums))
    if scores.dim() != 1:
        raise ValueError(f"score: got scores of shape {tuple(scores.shape)}, wanted (C): one number a score, for one set")
    grads = [torch.autograd.grad(one, sums, retain_graph=True, materialize_grads=True) for one in scores]
    return [torch.stack(column) for column in zip(*grads)]


@torch.no_grad()
def _explain_chunk(
    chunk: Chunk, encoder: nn.Module, query: Any, total: Any, cotangents: Sequence[Tensor], precision: _Precision
) -> Explanation:
    attention, contribution = [], []
    for state in _states_of_one(chunk, encoder, query, precision, _width(cotangents)):
        attention.append(_attention(state, total))
        pairs = zip(state.summands(total), cotangents, strict=True)
        parts = [mine.flatten(1) @ cotangent.flatten(1).mT for mine, cotangent in pairs]
        contribution.append(sum(parts[1:], start=parts[0]))
    return Explanation(chunk.start, torch.cat(attention), torch.cat(contribution))


@torch.no_grad()
def _chunk_maxima(chunk: Chunk, encoder: nn.Module, query: Any, precision: _Precision, width: int) -> Product:
    """The maxima of the elements as they come out one by one, whose bits need not be those they have in a chunk."""
    found: list[Max] = []
    for state in _states_of_one(chunk, encoder, query, precision, width):
        tops = [Max(m.top.amax(0), (m.ties * (m.top == m.top.amax(0))).sum(0)) for m in _maxima(state)]
        found = [a.merge(b) for a, b in zip(found, tops)] if found else tops
    return Product(tuple(found))


def _maxima(state: Any) -> list[Max]:
    if isinstance(state, Product):
        return [maximum for part in state.states for maximum in _maxima(part)]
    return [state] if isinstance(state, Max) else []


def _with_maxima(state: Any, maxima: list[Max]) -> Any:
    """The state with its maxima replaced, in order."""
    if isinstance(state, Product):
        return Product(tuple(_with_maxima(part, maxima) for part in state.states))
    return maxima.pop(0) if isinstance(state, Max) else state


@torch.no_grad()
def _score_chunk(
    chunk: Chunk, stages: Sequence[tuple[ChunkEncoder, int]], score: Score, condition: Any, precision: _Precision
) -> Tensor:
    scores = []
    for singles in _sets_of_one(chunk, width=BUDGET // 256):
        found, placed = condition, precision.place(singles)
        for stage, seed in stages:
            query = stage.query(torch.Size(), generator_for(seed, "query"), found)
            with precision.context():
                state = stage(placed, query)
            found = stage.readout(state, query)
        scores.append(score(found))
    return torch.cat(scores)


def _states_of_one(chunk: Chunk, encoder: nn.Module, query: Any, precision: _Precision, width: int) -> Iterator[Any]:
    """The states of the elements of a chunk, some at once, each of about ``width`` numbers."""
    for singles in _sets_of_one(chunk, width):
        with precision.context():
            state = encoder(precision.place(singles), query)
        yield _numbered(state)


def _width(cotangents: Sequence[Tensor]) -> int:
    return sum(tensor[0].numel() for tensor in cotangents)


def _sets_of_one(chunk: Chunk, width: int) -> Iterator[Chunk]:
    """The elements of a chunk as batches of single-element sets, as many at once as `BUDGET` allows."""
    at_once = max(1, BUDGET // max(width, 1))
    for start in range(0, chunk.size, at_once):
        elements = chunk.elements[start : start + at_once].unsqueeze(1)
        mask = None if chunk.mask is None else chunk.mask[start : start + at_once].unsqueeze(1)
        yield chunk._replace(elements=elements, mask=mask, start=chunk.start + start)


def _numbered(state: Any) -> Any:
    """A batch of sets of one shares its first position: give each element its own, where the state keeps positions."""
    if isinstance(state, Product):
        return Product(tuple(_numbered(part) for part in state.states))
    if not isinstance(state, TopK):
        return state
    place = torch.arange(len(state.ids), device=state.ids.device).view(-1, *[1] * (state.ids.dim() - 1))
    filled = state.ids != torch.iinfo(state.ids.dtype).max
    return state._replace(ids=torch.where(filled, state.ids + place, state.ids))


def _attention(state: Any, total: Any) -> Tensor:
    """The elements' shares of each entry of the whole: ``(N, K)``."""
    if isinstance(state, Product):
        return torch.cat([_attention(*pair) for pair in zip(state.states, total.states)], -1)
    if isinstance(state, Max):  # whoever attains it, in equal parts
        share = torch.where(state.top == total.top, state.ties / total.ties, 0.0)
    elif isinstance(state, TopK):  # whoever is among them, in equal parts
        mine = (total.ids.unsqueeze(-1) == state.ids.unsqueeze(-2)) & state.scores.isfinite().unsqueeze(-2)
        share = mine.any(-1).sum(-1) / total.scores.isfinite().sum(-1)
    else:
        share = (state.log_mass() - total.log_mass()).exp()
    return share.reshape(len(share), -1)


def _check(encoder: ChunkEncoder | Sweeps, set: ChunkedSet) -> None:
    if not isinstance(set, ChunkedSet):
        raise ValueError(f"set: got {type(set).__name__}, wanted a ChunkedSet; wrap a tensor as InMemory(x, chunk_size=...)")
    if encoder.training:
        raise ValueError(
            "encoder: it is in training mode, whose dropout would change from sweep to sweep; call .eval() first"
        )
    if set.batch_shape:
        raise ValueError(f"set: got a batch of shape {tuple(set.batch_shape)}, wanted one set; explain them one by one")
