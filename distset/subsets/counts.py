r"""How many elements of a part are in the subset: windowed count pmfs, and the fixed tree they are merged in.

Under the tilt the number of chosen elements of a part is a sum of independent Bernoulli variables: its pmf is the
convolution of its halves' pmfs, and only a window of a few standard deviations holds any mass at all. Exact sampling goes
down the tree: k at the root, and at every node the count of the left half given the count of the whole,

.. math:: P(a \mid c) \propto P_{\text{left}}(a)\, P_{\text{right}}(c - a).

Node ``(level, position)`` covers the elements ``position 2^level`` to ``(position + 1) 2^level - 1`` of the set, whoever
holds them: a part of the set that does not begin or end at a node's border exports the nodes it cannot complete.

Shapes: ``B`` rows, ``M`` nodes, ``W`` width of a window, ``E`` visits of a node by a sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distset.subsets.keyed import keyed_uniform

__all__ = ["CountPmf", "CountTree", "Visits"]

# What lies outside of a window has probability below exp(-40), 4e-18, on either side.
WINDOW_EXPONENT = 40.0


class CountPmf(NamedTuple):
    """Windowed pmfs of the counts of independent parts; merging two parts convolves them.

    Attributes:
        pmf: ``(*, W)``, float64, 0 where the window is wider than what a count can be.
        low: the count at the window's first entry, int64 ``(*)``.
        mean, variance: of the counts, ``(*)``.
        size: the number of elements, int64 ``(*)``.
    """

    pmf: Tensor
    low: Tensor
    mean: Tensor
    variance: Tensor
    size: Tensor

    @staticmethod
    def of(p: Tensor, q: Tensor) -> CountPmf:
        """The counts of single elements, in the subset with probability ``p (*)``, out of it with ``q = 1 - p``."""
        zero = torch.zeros_like(p, dtype=torch.int64)
        return CountPmf(torch.stack([q, p], -1), zero, p, p * q, zero + 1)

    def merge(self, other: CountPmf) -> CountPmf:
        mean, variance = self.mean + other.mean, self.variance + other.variance
        size = self.size + other.size
        half = window(variance)
        low = (mean - half).floor().clamp_min(0).long()
        high = torch.minimum((mean + half).ceil().long(), size)
        width = int((high - low).max()) + 1 if low.numel() else 1
        return CountPmf(self._convolve(other, low, high, width), low, mean, variance, size)

    def _convolve(self, other: CountPmf, low: Tensor, high: Tensor, width: int) -> Tensor:
        wide, narrow = self.pmf.shape[-1], other.pmf.shape[-1]
        full = self.pmf.new_zeros(*self.pmf.shape[:-1], wide + narrow - 1)
        for shift in range(narrow):
            full[..., shift : shift + wide].addcmul_(self.pmf, other.pmf[..., shift : shift + 1])
        counts = low.unsqueeze(-1) + torch.arange(width, device=low.device)
        place = counts - (self.low + other.low).unsqueeze(-1)
        inside = (place >= 0) & (place < full.shape[-1]) & (counts <= high.unsqueeze(-1))
        return full.gather(-1, place.clamp(0, full.shape[-1] - 1)).where(inside, 0.0)

    def value(self) -> Tensor:
        return self.pmf

    def take(self, where: Tensor) -> CountPmf:
        """The nodes ``where`` along the last batch dimension."""
        return CountPmf(self.pmf[..., where, :], *(field[..., where] for field in self[1:]))

    def join(self, other: CountPmf) -> CountPmf:
        """The nodes of both side by side, with windows of one width."""
        width = max(self.pmf.shape[-1], other.pmf.shape[-1])
        padded = [torch.nn.functional.pad(c.pmf, (0, width - c.pmf.shape[-1])) for c in (self, other)]
        rest = [torch.cat([a, b], -1) for a, b in zip(self[1:], other[1:])]
        return CountPmf(torch.cat(padded, -2), *rest)


def window(variance: Tensor) -> Tensor:
    r"""Bennett's inequality solved for the half-width: :math:`V h(t / V) = 40`, :math:`h(x) = (1 + x) \log(1 + x) - x`.

    ``P(|K - E K| > t) <= 2 exp(-V h(t / V))`` for a sum of independent Bernoulli variables of variance V.
    """
    V = variance.clamp_min(1e-30)
    t = torch.sqrt(2 * V * WINDOW_EXPONENT) + WINDOW_EXPONENT  # above the root, where the function is convex
    for _ in range(8):  # Newton from above goes down monotonically: it never ends below the root
        growth = torch.log1p(t / V)
        t = t - (V * ((1 + t / V) * growth - t / V) - WINDOW_EXPONENT) / growth
    return t


class Visits(NamedTuple):
    """Nodes that samples visit, with the number of elements each has to choose there; all int64 ``(E,)``."""

    row: Tensor
    sample: Tensor
    position: Tensor
    chosen: Tensor

    def select(self, kept: Tensor) -> Visits:
        if bool(kept.all()):
            return self
        where = kept.nonzero().squeeze(-1)
        return Visits(*(field.index_select(0, where) for field in self))

    @staticmethod
    def cat(parts: list[Visits]) -> Visits:
        return parts[0] if len(parts) == 1 else Visits(*(torch.cat(fields) for fields in zip(*parts)))


class Level(NamedTuple):
    """The nodes of one level that a tree holds: positions ``(M,)`` ascending, counts ``(B, M)``."""

    positions: Tensor
    counts: CountPmf

    def take(self, where: Tensor) -> Level:
        return Level(self.positions[where], self.counts.take(where))

    def join(self, other: Level) -> Level:
        positions, order = torch.cat([self.positions, other.positions]).sort()
        return Level(positions, self.counts.join(other.counts).take(order))

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where ``positions`` are among this level's nodes, and whether they are."""
        found = torch.searchsorted(self.positions, positions).clamp_max(max(len(self.positions) - 1, 0))
        return found, self.positions[found] == positions


class CountTree:
    """The nodes above some leaves, complete as far as the leaves allow.

    Args:
        leaves: nodes by level: level 0 for elements, higher ones for what chunks export.
        size: of the whole set where these leaves cover it: the tree is then completed to one root (what is missing at
            its right end counts as empty). None for a chunk.
    """

    def __init__(self, leaves: dict[int, Level], size: int | None = None) -> None:
        self.levels: list[Level] = []
        self.exports: dict[int, Level] = {}
        top = max(leaves) if size is None else max(size - 1, 0).bit_length()
        carried: Level | None = None
        number = 0
        while number <= top or carried is not None:
            level = _joined(leaves.get(number), carried)
            if level is None:
                level = _empty(next(iter(leaves.values())))
            self.levels.append(level)
            if size is not None and number == top:
                break
            carried = self._climb(level, number, complete=size is not None)
            number += 1

    @staticmethod
    def of_elements(logits: Tensor, tilt: Tensor, start: int = 0, size: int | None = None) -> CountTree:
        """The tree over ``logits (B, N)``, elements ``start`` to ``start + N`` of a set of ``size``."""
        a = logits + tilt.unsqueeze(-1)
        positions = torch.arange(start, start + logits.shape[-1], device=logits.device)
        return CountTree({0: Level(positions, CountPmf.of(torch.sigmoid(a), torch.sigmoid(-a)))}, size)

    def _climb(self, level: Level, number: int, complete: bool) -> Level | None:
        """Merge siblings; an only child is exported, or carried up where the tree is to be completed."""
        positions = level.positions
        even = positions % 2 == 0
        paired = torch.zeros_like(even)
        paired[:-1] = even[:-1] & (positions[1:] == positions[:-1] + 1)
        left = paired.nonzero().squeeze(-1)
        lone = torch.ones_like(even)
        lone[left], lone[left + 1] = False, False
        alone = lone.nonzero().squeeze(-1)
        parents = None
        if len(left):
            merged = level.counts.take(left).merge(level.counts.take(left + 1))
            parents = Level(positions[left] // 2, merged)
        if len(alone) and complete:
            only = level.take(alone)
            return _joined(parents, Level(only.positions // 2, only.counts))
        if len(alone):
            self.exports[number] = level.take(alone)
        return parents

    def descend(self, starts: dict[int, Visits], seed: int) -> dict[int, Visits]:
        """Draw counts from the ``starts`` (by level) down; returns the visits that arrive at leaves, by level.

        A visit arrives where this tree does not hold the children of its node: at elements (level 0), and at the nodes that
        chunks exported.
        """
        arrived: dict[int, Visits] = {}
        carried: Visits | None = None
        for number in range(len(self.levels) - 1, -1, -1):
            parts = [v for v in (carried, starts.get(number)) if v is not None]
            if not parts:
                continue
            visits = Visits.cat(parts)
            visits = visits.select(visits.chosen > 0)
            carried, leaf = self._split(visits, number, seed) if number else (None, visits)
            if len(leaf.row):
                arrived[number] = leaf
        return arrived

    def _split(self, visits: Visits, number: int, seed: int) -> tuple[Visits | None, Visits]:
        below = self.levels[number - 1]
        if not len(below.positions):
            return None, visits
        left, has_left = below.find(2 * visits.position)
        leaf = visits.select(~has_left)
        if len(leaf.row):
            visits, left = visits.select(has_left), left[has_left]
        has_right = below.find(2 * visits.position + 1)[1]
        uniform = keyed_uniform(seed, visits.sample, visits.row, number, visits.position)
        a = self._draw(visits, below.counts, left, (left + 1).clamp_max(len(below.positions) - 1), uniform)
        a = a.where(has_right, visits.chosen)
        children = Visits(
            torch.cat([visits.row, visits.row]),
            torch.cat([visits.sample, visits.sample]),
            torch.cat([2 * visits.position, 2 * visits.position + 1]),
            torch.cat([a, visits.chosen - a]),
        )
        return children.select(children.chosen > 0), leaf

    @staticmethod
    def _draw(visits: Visits, counts: CountPmf, left: Tensor, right: Tensor, uniform: Tensor) -> Tensor:
        """The count of the left child, by inversion of its conditional distribution."""
        width, nodes = counts.pmf.shape[-1], counts.pmf.shape[-2]
        pmf, low = counts.pmf.view(-1, width), counts.low.view(-1)
        left, right = visits.row * nodes + left, visits.row * nodes + right
        low_left = low.index_select(0, left)
        step = torch.arange(width, device=left.device)
        place = (visits.chosen - low.index_select(0, right) - low_left).unsqueeze(-1) - step
        inside = place.clamp(0, width - 1)
        other = pmf.view(-1).take(inside + (right * width).unsqueeze(-1)).mul_(place == inside)
        cumulative = other.mul_(pmf.index_select(0, left)).cumsum(-1)
        drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
        return low_left + drawn.clamp_max(width - 1)


def _joined(first: Level | None, second: Level | None) -> Level | None:
    if first is None or second is None:
        return second if first is None else first
    return first.join(second)


def _empty(like: Level) -> Level:
    return like.take(torch.zeros(0, dtype=torch.int64, device=like.positions.device))
