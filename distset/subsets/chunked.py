"""k-subsets of a set that is spread over chunks: sums go up, windows of count pmfs go up, counts come down.

The normaliser needs a few rounds of two numbers a chunk (the tilt) and one of some thirty (the nodes). Sampling needs, of
each chunk, the count pmfs of the O(log) tree nodes it holds whole; down go the counts drawn for those nodes, and only the
chosen indices come back. Elements never move, and samples are those of `KSubset` on all the logits at once, whatever the
chunks are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distset.sets import Chunk, ChunkedSet
from distset.states import Sum
from distset.subsets import quadrature as rules
from distset.subsets.counts import CountTree, Level, Visits
from distset.subsets.distribution import KSubset, check_k, drawn_seed, uses_table
from distset.subsets.quadrature import stable_softplus

__all__ = ["ChunkedKSubset", "LogitTable", "element_as_logit"]

Score = Callable[[Chunk], Tensor]


class ChunkedKSubset:
    """`KSubset` over the elements of a `ChunkedSet`; what it returns carries no gradient.

    Args:
        set: whose elements are chosen from; masked ones are never chosen.
        k: the size of the subsets, an integer or an integer tensor that broadcasts with the set's batch.
        logits: ``chunk -> (*, N)``, called where the chunk lives (a module-level function where that is another process);
            by default the elements themselves, which are then of width 1.

    Raises:
        ValueError: as `KSubset`; a NaN names its chunk.

    Example:
        >>> import torch
        >>> from distset import InMemory
        >>> from distset.subsets import ChunkedKSubset, KSubset
        >>> logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> chunked = ChunkedKSubset(InMemory(logits.unsqueeze(-1), chunk_size=300), k=20)
        >>> whole = KSubset(logits, k=20)
        >>> bool((chunked.sample_indices((5,), seed=1) == whole.sample_indices((5,), seed=1)).all())
        True
    """

    def __init__(self, set: ChunkedSet, k: int | Tensor, *, logits: Score | None = None) -> None:
        self.set, self.n, self.batch_shape = set, len(set), set.batch_shape
        self.k = check_k(k, self.n, set.batch_shape)
        score = element_as_logit if logits is None else logits
        if isinstance(score, LogitTable) and len(score.logits) != self.n:
            raise ValueError(f"logits: got a table of {len(score.logits)}, wanted {self.n}, one for each element of the set")
        k_rows = self._k_rows.double()
        self._range: rules.LogitRange = set.merge(_range, score)
        left = k_rows - self._range.forced
        if bool(((left < 0) | (left > self._range.n)).any()):
            row = int(((left < 0) | (left > self._range.n)).nonzero()[0])
            raise ValueError(
                f"logits: {int(self._range.forced[row])} of {self.n} are +inf (forced in) and "
                f"{self.n - int(self._range.n[row] + self._range.forced[row])} are -inf or masked (forced out), which "
                f"leaves no subset of k = {int(k_rows[row])} elements"
            )
        free = (left > 0) & (left < self._range.n)
        self._rows = _Rows(score, free, (left > 0) & ~free, torch.zeros_like(left))
        self._free_k = left.where(free, 0.0)
        if bool((wide := free & self._range.wide).any()):
            self._shift(wide)

    def log_normalizer(self) -> Tensor:
        """As `KSubset.log_normalizer`, ``(*)``."""
        settled = self.set.merge(_settled, self._rows).total
        free = self._rule.log_normalizer(self._free_k) + self._free_k * self._rows.cut
        return (free + settled).reshape(self.batch_shape)

    def inclusion_probabilities(self) -> Iterator[Tensor]:
        """The elements' inclusion probabilities ``(*, N)``, chunk by chunk."""
        return (part.reshape(*self.batch_shape, -1) for part in self.set.map(_inclusion, self._rows, self._rule))

    def entropy(self) -> Tensor:
        """In nats, ``(*)``."""
        return (self.set.merge(_entropy, self._rows, self._rule).total + self._rule.log_count).reshape(self.batch_shape)

    def log_prob(self, indices: Tensor) -> Tensor:
        """The log-probability ``(..., *)`` of subsets given by positions ``(..., *, k)``, as `sample_indices` has them.

        -inf where a position is named twice, or an element is in that cannot be, or one is out that must be in.

        Raises:
            ValueError: for another shape, positions outside of the set; where k differs between rows.
        """
        wanted = (*self.batch_shape, self._one_k())
        lead = indices.shape[: max(0, indices.dim() - len(wanted))]
        if indices.dtype != torch.int64 or indices.shape != (*lead, *wanted):
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"indices: got {indices.dtype} {tuple(indices.shape)}, wanted torch.int64 (..., {shape})")
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= self.n):
            raise ValueError(f"indices: got {int(indices.min())} to {int(indices.max())}, wanted 0 to {self.n - 1}")
        rows = indices.reshape(lead.numel(), len(self._free_k), wanted[-1])
        surprise, size, wrong = self.set.merge(_surprise, self._rows, self._rule.tilt, rows).total.unbind(-1)
        found = -(surprise + self._rule.log_count).masked_fill((size != wanted[-1]) | (wrong > 0), math.inf)
        return found.reshape(indices.shape[:-1])

    def mode(self) -> Iterator[Tensor]:
        """The most probable subset, chunk by chunk: zeros and ones ``(*, N)``, float32; ties go to the lower position."""
        positions = self._best[1]
        positions = positions.masked_fill(torch.arange(positions.shape[-1]) >= self._k_rows.unsqueeze(-1), -1)
        for start, size in zip(self._starts, self.set.sizes):
            yield _members(positions, start, size).float().reshape(*self.batch_shape, size)

    def mode_indices(self) -> Tensor:
        """Positions of the most probable subset's elements, ascending, ``(*, k)``.

        Raises:
            ValueError: where k differs between rows.
        """
        return self._best[1].sort(-1).values.reshape(*self.batch_shape, self._one_k())

    def kl_divergence(self, other: ChunkedKSubset) -> Tensor:
        """``KL(self || other)`` in nats, exact, ``(*)``; ``inf`` where this one chooses what the other cannot.

        Raises:
            ValueError: for distributions over different sets.
        """
        if other.set is not self.set:
            raise ValueError(f"other: got a distribution over {other.set!r}, wanted one over the same set, {self.set!r}")
        parts = self.set.merge(_crossed, self._rows, self._rule, other._rows, other._rule.tilt).total
        crossed, impossible = parts.unbind(-1)
        found = crossed + other._rule.log_count - self.entropy().reshape(-1)
        return found.masked_fill((impossible > 0) | (self._k_rows != other._k_rows), math.inf).reshape(self.batch_shape)

    def sample(self, sample_shape: Any = (), *, seed: int | None = None) -> Iterator[Tensor]:
        """Exact samples, chunk by chunk: zeros and ones ``(*sample_shape, *, N)``, float32."""
        sample_shape = torch.Size(sample_shape)
        for found, size in zip(self._chosen(sample_shape.numel(), seed), self.set.sizes):
            z = torch.zeros(sample_shape.numel(), len(self._free_k), size)
            z[found.sample, found.row, found.position] = 1
            yield z.reshape(*sample_shape, *self.batch_shape, size)

    def sample_indices(self, sample_shape: Any = (), *, seed: int | None = None) -> Tensor:
        """The chosen elements' positions in the set, ascending, ``(*sample_shape, *, k)``.

        Raises:
            ValueError: where k differs between rows.
        """
        k, sample_shape = self._one_k(), torch.Size(sample_shape)
        rows = len(self._free_k)
        parts = zip(self._chosen(sample_shape.numel(), seed), self._starts)
        keys = [(v.sample * rows + v.row) * self.n + v.position + start for v, start in parts]
        return (torch.cat(keys).sort().values % self.n).reshape(*sample_shape, *self.batch_shape, k)

    def _shift(self, wide: Tensor) -> None:
        """By the `rules.cut` of rows with large logits."""
        last = (self._k_rows - 1).clamp_min(0).unsqueeze(-1)
        self._rows = self._rows._replace(cut=self._best[0].gather(-1, last).squeeze(-1).where(wide, 0.0))
        rules.check_spread(self.set.merge(_spread, self._rows), self._range.n.where(self._rows.free, 0.0))
        self._range = self.set.merge(_free_range, self._rows)

    def _one_k(self) -> int:
        if self.k.numel() > 1 and bool((self.k != self.k.flatten()[0]).any()):
            raise ValueError("k: differs between rows, so that indices are ragged; use sample(), or mode()")
        return int(self.k.flatten()[0])

    def _chosen(self, count: int, seed: int | None) -> Iterator[Visits]:
        """Of each chunk, the chosen elements by their position in the chunk."""
        seed = drawn_seed(seed)
        if uses_table(self.n, self._free_k):
            return self._chosen_together(count, seed)
        starts = self._send(self._tree.descend(self._root(count), seed))
        return self.set.map(_descend, self._rows, self._rule.tilt, starts, seed, count)

    def _chosen_together(self, count: int, seed: int) -> Iterator[Visits]:
        """Few elements: as `KSubset` has them, element by element."""
        logits = torch.cat(list(self.set.map(_rows_of_logits, self._rows.score)), -1)
        z = KSubset(logits, self.k.expand(self.batch_shape).reshape(-1)).sample((count,), seed=seed)
        for part in z.split(list(self.set.sizes), -1):
            sample, row, position = part.nonzero().unbind(-1)
            yield Visits(row, sample, position, torch.ones_like(row))

    def _root(self, count: int) -> dict[int, Visits]:
        k = self._free_k.long()
        sample = torch.arange(count).repeat_interleave(len(k))
        row = torch.arange(len(k)).repeat(count)
        return {len(self._tree.levels) - 1: Visits(row, sample, torch.zeros_like(row), k[row])}

    def _send(self, visits: dict[int, Visits]) -> dict[int, dict[int, Visits]]:
        """The counts drawn for chunks' nodes, by chunk and level."""
        starts = torch.tensor(self._starts)
        by_chunk: dict[int, dict[int, Visits]] = {}
        for level, found in visits.items():
            chunk = torch.searchsorted(starts, found.position << level, right=True) - 1
            for number in chunk.unique().tolist():
                by_chunk.setdefault(number, {})[level] = found.select(chunk == number)
        return by_chunk

    @cached_property
    def _k_rows(self) -> Tensor:
        return self.k.expand(self.batch_shape).reshape(-1)

    @cached_property
    def _best(self) -> tuple[Tensor, Tensor]:
        """The highest logits ``(B, max k)`` and their positions, best first."""
        most = int(self.k.max())
        best = torch.empty(len(self._k_rows), 0, dtype=torch.float64), torch.empty(len(self._k_rows), 0, dtype=torch.int64)
        for found in self.set.map(_highest, self._rows.score, most):
            logits, positions = (torch.cat(pair, -1) for pair in zip(best, found))
            order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :most]
            best = logits.gather(-1, order), positions.gather(-1, order)
        return best

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.set.sizes)][:-1]

    @cached_property
    def _rule(self) -> rules.Quadrature:
        return rules.quadrature(
            self._range._replace(n=self._range.n.where(self._rows.free, 0.0)),
            self._free_k,
            lambda tilt: self.set.merge(_moments, self._rows, tilt),
            lambda tilt, angles: self.set.merge(_node_sums, self._rows, tilt, angles),
        )

    @cached_property
    def _tree(self) -> CountTree:
        """The tree above the nodes that chunks hold whole."""
        leaves: dict[int, Level] = {}
        for exports in self.set.map(_exports, self._rows, self._rule.tilt):
            for level, nodes in exports.items():
                leaves[level] = leaves[level].join(nodes) if level in leaves else nodes
        return CountTree(leaves, self.n)


def element_as_logit(chunk: Chunk) -> Tensor:
    """The logits of elements that are logits."""
    if chunk.elements.shape[-1] != 1:
        raise ValueError(
            f"set: its elements have width {chunk.elements.shape[-1]}, wanted 1 (a logit each); pass logits=, a function of "
            f"a chunk"
        )
    return chunk.elements.squeeze(-1)


class LogitTable:
    """A free logit for each element, ``(n)``, by its position: what a chunk scores its elements with.

    Where chunks live elsewhere the table goes to them with each call: n numbers, and not the elements.

    Raises:
        ValueError: for logits of another shape.

    Example:
        >>> import torch
        >>> from distset import InMemory
        >>> from distset.subsets import ChunkedKSubset, LogitTable
        >>> pictures = InMemory(torch.rand(5, 3), chunk_size=2)
        >>> subset = ChunkedKSubset(pictures, k=2, logits=LogitTable(torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])))
        >>> subset.mode_indices()
        tensor([1, 3])
    """

    def __init__(self, logits: Tensor) -> None:
        if not isinstance(logits, Tensor) or logits.dim() != 1:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"logits: got {found}, wanted a tensor (n) with one for each element of the set")
        self.logits = logits.detach()

    def __call__(self, chunk: Chunk) -> Tensor:
        return self.logits[chunk.start : chunk.start + chunk.size]


class _Rows(NamedTuple):
    """How a chunk gets its logits, which rows have a choice (``free``) or take all they can (``full``), the rows' cut."""

    score: Score
    free: Tensor
    full: Tensor
    cut: Tensor

    def split(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Logits of the free elements less the cut, -inf elsewhere, and which elements are surely in: both ``(B, N)``."""
        logits = _rows_of_logits(chunk, self.score)
        finite = logits.isfinite()
        included = (logits == math.inf) | (finite & self.full.unsqueeze(-1))
        free = finite & self.free.unsqueeze(-1)
        return (logits - self.cut.unsqueeze(-1)).masked_fill(~free, -math.inf), included


# What follows runs where the chunks live.


def _rows_of_logits(chunk: Chunk, score: Score) -> Tensor:
    with torch.no_grad():
        logits = score(chunk)
    wanted = (*chunk.batch_shape, chunk.size)
    if tuple(logits.shape) != wanted:
        raise ValueError(f"logits: got shape {tuple(logits.shape)} for chunk {chunk.id}, wanted {wanted}")
    if bool(logits.isnan().any()):
        raise ValueError(f"logits: got NaN in chunk {chunk.id} (elements {chunk.start} to {chunk.start + chunk.size - 1})")
    logits = logits.double()
    if chunk.mask is not None:
        logits = logits.masked_fill(~chunk.mask, -math.inf)
    return logits.reshape(-1, chunk.size)


def _range(chunk: Chunk, score: Score) -> rules.LogitRange:
    return rules.LogitRange.of(_rows_of_logits(chunk, score))


def _free_range(chunk: Chunk, rows: _Rows) -> rules.LogitRange:
    return rules.LogitRange.of(rows.split(chunk)[0])


def _spread(chunk: Chunk, rows: _Rows) -> Sum:
    return rules.spread(rows.split(chunk)[0])


def _moments(chunk: Chunk, rows: _Rows, tilt: Tensor) -> rules.Moments:
    return rules.tilted_moments(rows.split(chunk)[0], tilt)


def _node_sums(chunk: Chunk, rows: _Rows, tilt: Tensor, angles: Tensor) -> rules.NodeSums:
    return rules.chunk_node_sums(rows.split(chunk)[0], tilt, angles)


def _inclusion(chunk: Chunk, rows: _Rows, rule: rules.Quadrature) -> Tensor:
    free, included = rows.split(chunk)
    return rules.chunk_inclusion(free, rule)[0] + included


def _settled(chunk: Chunk, rows: _Rows) -> Sum:
    """The finite logits of elements that are surely in, added up."""
    logits, included = _rows_of_logits(chunk, rows.score), rows.split(chunk)[1]
    return Sum(logits.masked_fill(~included | (logits == math.inf), 0.0).sum(-1), included.sum(-1))


def _entropy(chunk: Chunk, rows: _Rows, rule: rules.Quadrature) -> Sum:
    free = rows.split(chunk)[0]
    return Sum(rules.chunk_surprise(free, rule), free.isfinite().sum(-1))


def _members(positions: Tensor, start: int, size: int) -> Tensor:
    """Which of the elements ``start`` to ``start + size - 1`` are at ``positions (B, K)``: bool ``(B, size)``."""
    row, place = ((positions >= start) & (positions < start + size)).nonzero().unbind(-1)
    z = torch.zeros(len(positions), size, dtype=torch.bool, device=positions.device)
    z[row, positions[row, place] - start] = True
    return z


def _surprise(chunk: Chunk, rows: _Rows, tilt: Tensor, indices: Tensor) -> Sum:
    """Of each subset the free elements' part of ``-log p``, the number of its elements, and that of impossible fates."""
    free, included = rows.split(chunk)
    a, open_ = free + tilt.unsqueeze(-1), free.isfinite()
    parts = []
    for positions in indices:
        z = _members(positions, chunk.start, chunk.size)
        own = stable_softplus(torch.where(z, -a, a)).masked_fill(~open_, 0.0)
        wrong = (z != included) & ~open_
        parts.append(torch.stack([own.sum(-1), z.sum(-1).double(), wrong.sum(-1).double()], -1))
    return Sum(torch.stack(parts), included.sum(-1))


def _highest(chunk: Chunk, score: Score, most: int) -> tuple[Tensor, Tensor]:
    """The highest logits ``(B, M)`` and their positions in the set, best first, ties by position."""
    found = _rows_of_logits(chunk, score).sort(dim=-1, descending=True, stable=True)
    return found.values[:, :most].clone(), found.indices[:, :most] + chunk.start


def _crossed(chunk: Chunk, rows: _Rows, rule: rules.Quadrature, others: _Rows, tilt: Tensor) -> Sum:
    """The mean surprise of the others' free elements under these rows, and the number of fates they cannot have."""
    free, included = rows.split(chunk)
    inside, outside = rules.chunk_inclusion(free, rule)
    inside, outside = inside + included, outside.masked_fill(included, 0.0)
    theirs, surely = others.split(chunk)
    a, open_ = theirs + tilt.unsqueeze(-1), theirs.isfinite()
    terms = (inside * stable_softplus(-a) + outside * stable_softplus(a)).masked_fill(~open_, 0.0)
    wrong = ((inside > 0) & ~open_ & ~surely) | ((outside > 0) & surely)
    return Sum(torch.stack([terms.sum(-1), wrong.sum(-1).double()], -1), open_.sum(-1))


def _exports(chunk: Chunk, rows: _Rows, tilt: Tensor) -> dict[int, Level]:
    return CountTree.of_elements(rows.split(chunk)[0], tilt, chunk.start).exports


def _descend(chunk: Chunk, rows: _Rows, tilt: Tensor, starts: dict[int, dict[int, Visits]], seed: int, count: int) -> Visits:
    free, included = rows.split(chunk)
    row, position = included.nonzero().unbind(-1)
    sample = torch.arange(count, device=row.device).repeat_interleave(len(row))
    found = [Visits(row.repeat(count), sample, position.repeat(count), torch.ones_like(sample))]
    if chunk.id in starts:
        tree = CountTree.of_elements(free, tilt, chunk.start)
        found += [v._replace(position=v.position - chunk.start) for v in tree.descend(starts[chunk.id], seed).values()]
    return Visits.cat(found)
