r"""The mean field of an offer of any size: its elements stay in their chunks, one small sum goes up and comes down.

For a `SumUtility` everything the elements tell each other is in the M smoothed sums
:math:`u_m = \sum_j \tilde s_{mj} \phi_j` (see `Smoothed`). Given u, each element's logit solves an equation of its own,

.. math:: \ell_i = c\,\frac1M \sum_m \rho(u_m - \tilde s_{mi} \phi_i + \phi_i) - \rho(u_m - \tilde s_{mi} \phi_i),
          \qquad \tilde s_{mi} = \psi_i + \sqrt{\psi_i (1 - \psi_i)}\,\epsilon_{mi},\quad \psi_i = \sigma(\ell_i),

so the mean field is the fixed point of the *sums*: map the chunks with u, each solves its own elements and leaves its
share of the next u behind. M D numbers an iteration travel, whatever N; nothing of size N is kept or sent. Backward is
the same with vector-Jacobian products: an `Implicit` cotangent of M D numbers goes down, chunk by chunk.

The draws of a chunk follow from (seed, chunk index): the result is the same wherever the chunks live, and equal to
`mean_field` with the same draws.

Shapes: ``*`` batch of offers, ``N`` elements of a chunk, ``M`` draws, ``D`` width of an element's code.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distset.encode import Exact, Full, encode_set
from distset.encoders import ChunkEncoder
from distset.fixed_point import (
    Anderson,
    FixedPointWarning,
    Implicit,
    Iteration,
    OneStep,
    Solution,
    Stop,
    Unrolled,
    fixed_point,
)
from distset.gains import real_dtype, soft_subset
from distset.krylov import Dense
from distset.offers import check_elements, check_places, check_positions
from distset.seeds import generator_for
from distset.set_functions import SumUtility
from distset.sets import Chunk, ChunkedSet, InMemory
from distset.states import Sum

UNSOLVED = (
    "solve_offer: the own equation of some elements has no solution that was found, given the sums: an element alone moves "
    "the utility too much. Raise the temperature, scale the codes down (by 1 / N for a plain sum), or use float64"
)

__all__ = ["Field", "first_field", "offer_logits", "offer_loss", "solve_offer"]


class Field(NamedTuple):
    """What the elements of a large offer need to know of each other.

    Attributes:
        sums: u, the sums over the subsets ``(*, M, D)``, carrying their gradient.
        total: the sum over the offer ``(*, D)`` where the head wants it, else None.
        seed: of the draws.
        temperature: gains are divided by it.
        solved: whether ``sums`` are the fixed point (smooth subsets), or those of the first step (hard ones at 0.5).
        solution: how the iteration ended; None for a first step.
    """

    sums: Tensor
    total: Tensor | None
    seed: int
    temperature: float
    solved: bool
    solution: Solution | None = None


def first_field(
    utility: SumUtility, offer: ChunkedSet, *, samples: int = 5, seed: int = 0, temperature: float = 1.0
) -> Field:
    """The field of one step from psi = 0.5 with hard draws: DiffMF with K = 1, the published training step.

    Args:
        utility: F.
        offer: a `ChunkedSet`.
        samples: M.
        seed: of the draws, with the chunk's index.
        temperature: gains are divided by it.

    Raises:
        ValueError: as `solve_offer`.
    """
    _check_temperature(temperature)
    sums, total = _start(utility, offer, samples, seed, hard=True)
    return Field(sums, total, seed, temperature, solved=False)


def solve_offer(
    utility: SumUtility,
    offer: ChunkedSet,
    *,
    samples: int = 5,
    seed: int = 0,
    temperature: float = 1.0,
    grad: Implicit | OneStep | Unrolled | None = None,
    iteration: Iteration | None = None,
    stop: Stop | None = None,
) -> Field:
    """The mean field of an offer whose elements do not fit, or lie elsewhere; arguments as in `mean_field`.

    Each iteration is one sweep of the chunks, each product of the backward solver one sweep with a gradient.

    Raises:
        ValueError: for a utility that is no `SumUtility`, a set that is no `ChunkedSet`, a temperature that is not above 0;
            features that are not finite, with their chunk.

    Example:
        >>> import torch
        >>> from distset import InMemory
        >>> from distset.fixed_point import Anderson
        >>> from distset.large_offers import offer_loss, solve_offer
        >>> from distset.set_functions import published_utility
        >>> utility = published_utility(2, hidden=32)
        >>> offer = InMemory(torch.randn(3000, 2), chunk_size=500)
        >>> field = solve_offer(utility, offer, iteration=Anderson())
        >>> bool(field.solution.converged), field.sums.shape
        (True, torch.Size([5, 256]))
        >>> offer_loss(utility, offer, field, chosen=torch.tensor([3, 1200, 2999])).backward()
    """
    _check_temperature(temperature)
    sums, total = _start(utility, offer, samples, seed, hard=False)
    encoder = _NextSums(utility, seed, temperature)

    def step(u: Tensor) -> Tensor:
        return encode_set(encoder, offer, grad=_sweep(offer), seed=seed, condition=(u, total))

    solution = fixed_point(step, sums.detach(), grad=grad, iteration=iteration, stop=stop, event_ndim=2)
    return Field(solution.value, total, seed, temperature, True, solution)


def offer_loss(
    utility: SumUtility, offer: ChunkedSet, field: Field, chosen: Tensor, counted: Tensor | None = None
) -> Tensor:
    """`oracle_loss` of a large offer, averaged over the batch.

    Args:
        utility, offer: those of the field.
        field: of `solve_offer` or `first_field`.
        chosen: positions of S* in the offer, int64 ``(K)``, the same for all offers of a batch.
        counted: positions of the elements that count in the loss, int64 ``(C)``; None for all but padding.

    Raises:
        ValueError: for positions outside of the offer, in its padding, or named twice; for nothing or everything chosen,
            or nothing counted.
    """
    check_positions(chosen, len(offer))
    if counted is not None:
        check_places("counted", counted, len(offer))
    encoder = _Loss(utility, field.seed, field.temperature, field.solved)
    condition = (field.sums, field.total, chosen, counted)
    loss, left = encode_set(encoder, offer, grad=_sweep(offer), seed=field.seed, condition=condition).unbind(-1)
    if not bool((left > 0).all()):
        raise ValueError(
            f"chosen: got {len(chosen)} positions, all that is offered beside the padding; drop sets with S* = V, or offer "
            f"more"
        )
    return loss.mean()


def offer_logits(utility: SumUtility, offer: ChunkedSet, field: Field) -> Tensor:
    """The logits of psi of all elements ``(*, N)``, -inf at padding, without a gradient.

    The one thing here that is of the offer's size.
    """
    first = next(utility.parameters())
    logits = torch.empty(
        *offer.batch_shape, len(offer), dtype=first.dtype
    )  # filled in place: a list would fragment the heap
    reader = _Logits(utility, field.seed, field.temperature, field.solved)
    total = None if field.total is None else field.total.detach()
    with torch.no_grad():
        for start, part in offer.map(_chunk_logits, reader, field.sums.detach(), total):
            logits[..., start : start + part.shape[-1]] = part
    return logits


class _Elements(ChunkEncoder):
    """Base of what is asked of a chunk: its codes, its draws, its elements' logits and shares in the sums."""

    def __init__(self, utility: SumUtility, seed: int, temperature: float = 1.0, solved: bool = True) -> None:
        super().__init__()
        self.utility, self.seed, self.temperature, self.solved = utility, seed, temperature, solved

    def query(self, batch_shape: torch.Size, generator: torch.Generator, condition: Any = None) -> tuple[Any, ...]:
        return condition

    def numbers(self, chunk: Chunk, samples: int, *, normal: bool) -> Tensor:
        generator = generator_for(self.seed, "draws", chunk.id)
        draw = torch.randn if normal else torch.rand
        dtype = real_dtype(self.utility, chunk.elements)
        drawn = draw(*chunk.batch_shape, samples, chunk.size, generator=generator, dtype=dtype)
        return drawn.to(chunk.elements.device)

    def hard(self, chunk: Chunk, samples: int) -> Tensor:
        """Hard draws at psi = 0.5."""
        inside = self.numbers(chunk, samples, normal=False) < 0.5
        return inside if chunk.mask is None else inside & chunk.mask.unsqueeze(-2)

    def place(self, chunk: Chunk, sums: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``(*, N, D)``, logits ``(*, N)`` and shares ``(*, M, N)`` of the chunk's elements in the field."""
        samples = sums.shape[-2]
        h_ND = self.utility.embed(chunk.elements, chunk.mask)
        if not self.solved:
            inside = self.hard(chunk, samples)
            return h_ND, self._logits(h_ND, sums, inside, total), inside
        normal = self.numbers(chunk, samples, normal=True)

        def own(logits: Tensor) -> Tensor:
            return self._logits(h_ND, sums, soft_subset(logits, normal, chunk.mask), total)

        start = torch.zeros(*chunk.batch_shape, chunk.size, dtype=h_ND.dtype, device=h_ND.device)
        # One unknown an element: Anderson(1) is the secant method, and Dense one exact division by 1 - J. A gain is a
        # difference of two utilities, so it is known to their rounding and no better.
        size = float(self.utility.of_sums(sums, total).detach().abs().max())
        stop = Stop(30, atol=32 * torch.finfo(h_ND.dtype).eps * (1 + size), rtol=0.0)
        solution = Implicit(Dense()).solve(own, start, Anderson(1), stop, 0)
        if not bool(solution.converged.all()):
            warnings.warn(UNSOLVED, FixedPointWarning, stacklevel=2)  # one text, so that a million chunks say it once
        return h_ND, solution.value, soft_subset(solution.value, normal, chunk.mask)

    def _logits(self, h_ND: Tensor, sums: Tensor, inside: Tensor, total: Tensor | None) -> Tensor:
        return self.utility.gains_of_sums(h_ND, sums, inside, total).mean(-2) / self.temperature


class _StartSums(_Elements):
    """The sums at psi = 0.5, M rows, and the sum over the offer below them."""

    def encode(self, chunk: Chunk, query: Any) -> Sum:
        samples, hard = query
        self._check(chunk)
        h_ND = self.utility.embed(chunk.elements, chunk.mask)
        if hard:
            shares = self.hard(chunk, samples).to(h_ND.dtype)
        else:
            logits = torch.zeros(*chunk.batch_shape, chunk.size, dtype=h_ND.dtype, device=h_ND.device)
            shares = soft_subset(logits, self.numbers(chunk, samples, normal=True), chunk.mask)
        rows = torch.cat([shares @ h_ND, h_ND.sum(-2, keepdim=True)], -2)
        return Sum(rows, chunk.counts(rows.dtype))

    def _check(self, chunk: Chunk) -> None:
        try:
            check_elements(chunk.elements, chunk.mask, self.utility.element_ndim)
        except ValueError as error:
            raise ValueError(f"{error} (in chunk {chunk.id}, which begins at element {chunk.start})") from None


class _NextSums(_Elements):
    """The chunk's share of the next sums."""

    def encode(self, chunk: Chunk, query: Any) -> Sum:
        h_ND, _, shares = self.place(chunk, *query)
        return Sum(shares @ h_ND, chunk.counts(h_ND.dtype))


class _Loss(_Elements):
    """The chunk's share of the cross-entropy, and how many of its elements are offered and not chosen."""

    def encode(self, chunk: Chunk, query: Any) -> Sum:
        sums, total, chosen, counted = query
        target = _within(chunk, chosen)
        offered = torch.ones_like(target) if chunk.mask is None else chunk.mask
        counts = offered if counted is None else _within(chunk, counted)
        for name, places in (("chosen", target), ("counted", counts)):
            if bool((places & ~offered).any()):
                raise ValueError(f"{name}: has elements of chunk {chunk.id} that are not offered (padding)")
        _, logits, _ = self.place(chunk, sums, total)
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype).expand_as(logits), reduction="none")
        left = (offered & ~target).sum(-1).to(loss.dtype).expand(loss.shape[:-1])
        return Sum(torch.stack([loss.masked_fill(~counts, 0.0).sum(-1), left], -1), chunk.counts(loss.dtype))


class _Logits(_Elements):
    """The logits themselves."""


def _within(chunk: Chunk, positions: Tensor) -> Tensor:
    """Which elements of the chunk are at ``positions`` of the offer, bool ``(N)``."""
    own = positions[(positions >= chunk.start) & (positions < chunk.start + chunk.size)] - chunk.start
    inside = torch.zeros(chunk.size, dtype=torch.bool, device=chunk.elements.device)
    return inside.index_fill(0, own.to(inside.device), True)


def _chunk_logits(chunk: Chunk, reader: _Logits, sums: Tensor, total: Tensor | None) -> tuple[int, Tensor]:
    with torch.no_grad():
        logits = reader.place(chunk, sums, total)[1]
    return chunk.start, logits if chunk.mask is None else logits.masked_fill(~chunk.mask, -torch.inf)


def _start(utility: SumUtility, offer: ChunkedSet, samples: int, seed: int, *, hard: bool) -> tuple[Tensor, Tensor | None]:
    if not isinstance(utility, SumUtility):
        raise ValueError(
            f"utility: got {type(utility).__name__}, wanted a SumUtility: only its elements meet in one small sum"
        )
    if samples < 1:
        raise ValueError(f"samples: got {samples}, wanted at least 1 draw")
    rows = encode_set(_StartSums(utility, seed), offer, grad=_sweep(offer), seed=seed, condition=(samples, hard))
    return rows[..., :samples, :], rows[..., samples, :] if utility.context else None


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, wanted a number above 0: gains are divided by it")


def _sweep(offer: ChunkedSet) -> Exact | Full:
    """One chunk in memory needs no replay: its graph is as large as the replay's would be."""
    return Full() if type(offer) is InMemory and offer.num_chunks == 1 else Exact()
