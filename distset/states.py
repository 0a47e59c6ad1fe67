"""What a chunk leaves behind: small mergeable states, and the fixed tree they are merged in.

A state is a NamedTuple of tensors with three views of itself:

* ``merge(other)``: the state of the union of two disjoint chunks (associative, commutative);
* ``value()``: the statistic, a tensor;
* ``summands(total)``: what this chunk *adds* to the state ``total`` of the whole set once it is re-based on the
  statistics of ``total`` (the softmax shift, the attained maximum). Re-based, merging is a sum, so one cotangent at
  ``total`` serves every chunk: this is what makes gradients at the memory of one chunk possible.

``total.with_sums(sums)`` puts tensors that carry a gradient in the place of the sums, and ``log_mass()`` weighs a chunk:
``exp(log_mass - total.log_mass)`` is its share of the whole, an entry of the state (of the attention, of the elements).

States are kept in float32, or float64 where the inputs are, whatever the precision of the inputs.

Shapes: ``*`` batch, ``K`` slots or heads, ``D`` width, ``N`` elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Max", "Mean", "Product", "Softmax", "State", "Sum", "TopK", "merge_nodes", "merge_siblings", "merge_tree"]


class State(Protocol):
    """The protocol of a mergeable state; see the module's docstring."""

    def merge(self, other: Any) -> Any: ...
    def value(self) -> Any: ...
    def summands(self, total: Any) -> tuple[Tensor, ...]: ...
    def with_sums(self, sums: tuple[Tensor, ...]) -> Any: ...
    def log_mass(self) -> Tensor: ...


class Sum(NamedTuple):
    """The sum of an element function, ``total (*, D)`` or ``(*, K, D)``; ``n (*)`` elements."""

    total: Tensor
    n: Tensor

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total, self.n + other.n)

    def value(self) -> Tensor:
        return self.total

    def summands(self, total: Sum) -> tuple[Tensor, ...]:
        return (self.total,)

    def with_sums(self, sums: tuple[Tensor, ...]) -> Sum:
        return self._replace(total=sums[0])

    def log_mass(self) -> Tensor:
        return self.n.log()


class Mean(NamedTuple):
    """The mean of an element function: ``total (*, D)`` over ``n (*)`` elements."""

    total: Tensor
    n: Tensor

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.n + other.n)

    def value(self) -> Tensor:
        return self.total / self.n.unsqueeze(-1)

    def summands(self, total: Mean) -> tuple[Tensor, ...]:
        return (self.total,)

    def with_sums(self, sums: tuple[Tensor, ...]) -> Mean:
        return self._replace(total=sums[0])

    def log_mass(self) -> Tensor:
        return self.n.log()


class Softmax(NamedTuple):
    r"""Softmax attention over the elements, exact for any logits.

    ``total = sum_i exp(a_i - shift) v_i`` of shape ``(*, K, D)`` and ``mass = sum_i exp(a_i - shift)``, ``(*, K, 1)``; the
    ``shift (*, K, 1)``, which has no gradient, is the maximum of ``a``, or near enough that both stay in range. The value
    ``total / mass`` is the softmax-weighted mean of ``v``. A chunk without elements (all masked) has ``mass = 0`` and the
    lowest finite ``shift``.
    """

    total: Tensor
    mass: Tensor
    shift: Tensor

    def merge(self, other: Softmax) -> Softmax:
        shift = torch.maximum(self.shift, other.shift)
        ours, theirs = torch.exp(self.shift - shift), torch.exp(other.shift - shift)
        total = torch.addcmul(self.total * ours, other.total, theirs)
        return Softmax(total, torch.addcmul(self.mass * ours, other.mass, theirs), shift)

    def value(self) -> Tensor:
        return self.total / self.mass

    def summands(self, total: Softmax) -> tuple[Tensor, ...]:
        scale = torch.exp(self.shift - total.shift)
        return self.total * scale, self.mass * scale

    def with_sums(self, sums: tuple[Tensor, ...]) -> Softmax:
        return self._replace(total=sums[0], mass=sums[1])

    def log_mass(self) -> Tensor:
        return (self.mass.log() + self.shift).squeeze(-1)


class Max(NamedTuple):
    """The running maximum ``top (*, D)`` of an element function and the number of elements ``ties`` that attain it.

    The gradient is divided evenly among ties, wherever they lie, as ``torch.amax`` does within one tensor.
    """

    top: Tensor
    ties: Tensor

    def merge(self, other: Max) -> Max:
        top = torch.maximum(self.top, other.top)
        ties = self.ties * (self.top == top) + other.ties * (other.top == top)
        return Max(top, ties)

    def value(self) -> Tensor:
        return self.top

    def summands(self, total: Max) -> tuple[Tensor, ...]:
        attained = self.top == total.top
        return (torch.where(attained, self.top * (self.ties / total.ties), 0.0),)

    def with_sums(self, sums: tuple[Tensor, ...]) -> Max:
        return self._replace(top=sums[0])

    def log_mass(self) -> Tensor:
        return self.top


class TopK(NamedTuple):
    """The ``k`` elements of highest score and what they carry.

    ``scores (*, k)`` in descending order, ``payload (*, k, D)``, ``ids (*, k)`` the elements' positions in the set
    (unique), by which ties are broken: the lower id wins. Slots that are not filled hold ``-inf``, 0 and the largest id.
    """

    scores: Tensor
    payload: Tensor
    ids: Tensor

    def merge(self, other: TopK) -> TopK:
        k = max(self.scores.shape[-1], other.scores.shape[-1])
        return TopK.of(
            torch.cat([self.scores, other.scores], -1),
            torch.cat([self.payload, other.payload], -2),
            torch.cat([self.ids, other.ids], -1),
            k,
        )

    @staticmethod
    def of(scores: Tensor, payload: Tensor, ids: Tensor, k: int) -> TopK:
        """The top ``k`` of ``scores (*, N)``, with ``payload (*, N, D)`` and ``ids (*, N)``."""
        missing = k - scores.shape[-1]
        if missing > 0:
            scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
            payload = torch.nn.functional.pad(payload, (0, 0, 0, missing))
            ids = torch.nn.functional.pad(ids, (0, missing), value=torch.iinfo(ids.dtype).max)
        by_id = ids.sort(dim=-1, stable=True).indices
        by_score = scores.gather(-1, by_id).sort(dim=-1, descending=True, stable=True).indices
        order = by_id.gather(-1, by_score)[..., :k]
        picked = payload.gather(-2, order.unsqueeze(-1).expand(*order.shape, payload.shape[-1]))
        return TopK(scores.gather(-1, order), picked, ids.gather(-1, order))

    def value(self) -> tuple[Tensor, Tensor]:
        return self.scores, self.payload

    def summands(self, total: TopK) -> tuple[Tensor, ...]:
        mine = total.ids.unsqueeze(-1) == self.ids.unsqueeze(-2)  # (*, k of total, k of this chunk)
        mine = mine & self.scores.isfinite().unsqueeze(-2)
        scores = torch.where(mine, self.scores.unsqueeze(-2), 0.0).sum(-1)
        return scores, mine.to(self.payload.dtype) @ self.payload

    def with_sums(self, sums: tuple[Tensor, ...]) -> TopK:
        scores = torch.where(self.scores.isfinite(), sums[0], self.scores)  # nobody adds to a slot that is not filled
        return self._replace(scores=scores, payload=sums[1])

    def log_mass(self) -> Tensor:
        return self.scores[..., 0]


class Product(NamedTuple):
    """Several states of the same chunk, merged each on its own."""

    states: tuple[Any, ...]

    def merge(self, other: Product) -> Product:
        return Product(tuple(a.merge(b) for a, b in zip(self.states, other.states, strict=True)))

    def value(self) -> tuple[Any, ...]:
        return tuple(state.value() for state in self.states)

    def summands(self, total: Product) -> tuple[Tensor, ...]:
        pairs = zip(self.states, total.states, strict=True)
        return tuple(tensor for mine, whole in pairs for tensor in mine.summands(whole))

    def with_sums(self, sums: tuple[Tensor, ...]) -> Product:
        parts, start = [], 0
        for state in self.states:
            width = len(state.summands(state))
            parts.append(state.with_sums(sums[start : start + width]))
            start += width
        return Product(tuple(parts))

    def log_mass(self) -> Tensor:
        masses = [state.log_mass() for state in self.states]
        batch = min((mass.shape for mass in masses), key=len)
        return torch.cat([mass.reshape(*batch, -1) for mass in masses], -1)


S = TypeVar("S", bound=State)


Node = tuple[int, int, S]
"""A node ``(level, position, state)`` of the merge tree: chunks ``position * 2**level`` up to the next node's first."""


def merge_siblings(nodes: Iterable[Node[S]]) -> list[Node[S]]:
    """Merge nodes of the fixed binary tree over chunk ids, given by ascending position, as far as siblings meet.

    Only siblings are merged, so a node's bits do not depend on who computed it, and a contiguous run of chunks, each a
    node ``(0, id, state)``, leaves O(log run) nodes behind: what a worker sends up.
    """
    merged: list[Node[S]] = []
    for level, position, state in nodes:
        while merged and position % 2 == 1 and merged[-1][:2] == (level, position - 1):
            state = merged.pop()[2].merge(state)
            level, position = level + 1, position // 2
        merged.append((level, position, state))
    return merged


def merge_nodes(nodes: Iterable[Node[S]]) -> S:
    """Merge nodes that cover chunks 0 to the last, by ascending position; the ragged end is folded from the right.

    Raises:
        ValueError: if there are no nodes.
    """
    merged = merge_siblings(nodes)
    if not merged:
        raise ValueError("states: got no state to merge, wanted at least one chunk; the set is empty")
    total = merged[-1][2]
    for _, _, state in reversed(merged[:-1]):
        total = state.merge(total)
    return total


def merge_tree(states: Iterable[S]) -> S:
    """Merge the states of chunks 0, 1, 2, ... in the fixed tree; memory is O(log chunks) states.

    Raises:
        ValueError: if there are no states.
    """
    return merge_nodes((0, id, state) for id, state in enumerate(states))
