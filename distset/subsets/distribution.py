r"""`KSubset`: the distribution of a subset of exactly k of n elements, in the manner of `torch.distributions`.

References:
    Wijk, Vinuesa, Azizpour 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR,
    https://openreview.net/forum?id=q87GUkdQBm, eq. 2.
    Chen, Dempster, Liu 1994, "Weighted finite population sampling to maximize entropy", Biometrika 81 (the conditional
    Poisson, or conditional Bernoulli, distribution).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, kl

from distset.subsets import quadrature as rules
from distset.subsets.counts import CountTree, Visits
from distset.subsets.quadrature import stable_softplus
from distset.subsets.recursion import CountTable

__all__ = ["KSubset"]

# Visits of tree nodes, times the width of a window, that one round of descent may hold.
VISITS = 2**24
# Samples are drawn element by element instead of down a tree from up to SMALL elements, or FEW where there are many rows,
# as long as the table has no more than TABLE entries.
SMALL, FEW, MANY_ROWS, TABLE = 64, 1024, 16, 2**25


class KSubset(Distribution):
    r"""Subsets of exactly ``k`` of ``n`` elements (the conditional Poisson distribution).

    .. math:: p(z) = \frac{e^{\theta \cdot z}}{e_k(e^\theta)}, \quad z \in \{0, 1\}^n,\ \sum_i z_i = k

    with the elementary symmetric polynomial :math:`e_k`. It is invariant to adding a constant to the logits. Everything
    costs O(n) whatever k, at machine precision for any logits (see `distset.subsets.quadrature`); computations are in
    float64, results in the precision of the logits (at least float32).

    Args:
        logits: ``(*, n)``. ``+inf`` forces an element in, ``-inf`` forces it out.
        k: the size of the subsets, an integer or an integer tensor that broadcasts with ``(*)``.

    Raises:
        ValueError: for NaN logits; k that is not whole, below 0, above n, below the number of elements forced in or above
            the number of elements not forced out.

    Example:
        >>> import torch
        >>> from distset.subsets import KSubset
        >>> subset = KSubset(torch.tensor([0.0, 1.0, 2.0, 3.0]), k=2)
        >>> subset.inclusion_probabilities().sum()
        tensor(2.)
        >>> z = subset.sample((1000,), seed=0)
        >>> z.shape, z.sum(-1).unique()
        (torch.Size([1000, 4]), tensor([2.]))
        >>> subset.log_prob(subset.mode).exp()
        tensor(0.5859)
    """

    arg_constraints = {"logits": constraints.independent(constraints.real, 1)}  # noqa: RUF012
    has_enumerate_support = False

    def __init__(self, logits: Tensor, k: int | Tensor) -> None:
        counts = check_subset(logits, k)
        self.logits, self.n = logits, logits.shape[-1]
        batch_shape = torch.broadcast_shapes(counts.shape, logits.shape[:-1])
        self.k = counts.expand(batch_shape)
        super().__init__(batch_shape, logits.shape[-1:], validate_args=False)

    @classmethod
    def from_probabilities(cls, probabilities: Tensor, k: int | Tensor) -> KSubset:
        """Independent Bernoulli variables of ``probabilities (*, n)``, given that exactly ``k`` of them are 1.

        A probability of 0 or 1 forces its element out or in and has a gradient of 0.

        Raises:
            ValueError: for probabilities outside of [0, 1] or NaN; as above for k.
        """
        _check_tensor("probabilities", probabilities)
        if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
            raise ValueError("probabilities: got an entry outside of [0, 1]; wanted probabilities")
        out, surely = probabilities == 0, probabilities == 1
        open_ = probabilities.double().masked_fill(out | surely, 0.5)
        logits = (open_.log() - (-open_).log1p()).masked_fill(out, -math.inf).masked_fill(surely, math.inf)
        return cls(logits.to(_result_dtype(probabilities)), k)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return _OfSize(self.k)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KSubset:
        batch_shape = torch.Size(batch_shape)
        return KSubset(self.logits.expand(*batch_shape, self.n), self.k.expand(batch_shape))

    def log_normalizer(self) -> Tensor:
        """``log e_k(e^logits)``, ``(*)``; elements forced in count as logit 0.

        Its gradient is the inclusion probabilities.
        """
        free = rules.log_normalizer(self._free_logits, self._free_k, self._rule)
        settled = self._rows.masked_fill(~(self._included & self._rows.isfinite()), 0.0).sum(-1)
        return self._shaped(free + self._free_k * self._cut + settled)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of subsets ``(..., *, n)`` of zeros and ones; -inf for one of another size.

        Every term of :math:`-\\sum_i \\mathrm{softplus}(\\pm(\\theta_i + \\lambda)) - \\log P(K = k)` is small at the tilt:
        no digit is lost to large logits.
        """
        z = value.to(self.logits.device).double()
        if z.shape[-1:] != self.event_shape:
            raise ValueError(f"value: got shape {tuple(value.shape)}, wanted (..., {self.n}) of zeros and ones")
        a, log_count = self._tilted, self._rule.log_count.view(self._batch_shape)
        signed = torch.where(z.bool(), -a, a)
        exact = -(stable_softplus(signed).masked_fill(~self._shaped(self._free), 0.0)).sum(-1) - log_count
        out = self._with_gradient(exact, lambda: (z * a).masked_fill(z == 0, 0.0).sum(-1) - self._tilted_normalizer)
        binary = ((z == 0) | (z == 1)).all(-1)
        settled = (z.bool() | ~self._shaped(self._included)).all(-1) & (~z.bool() | self._shaped(self._possible)).all(-1)
        return out.masked_fill(~(binary & settled & (z.sum(-1) == self.k)), -math.inf).to(self._dtype)

    def inclusion_probabilities(self) -> Tensor:
        """``P(z_i = 1)``, ``(*, n)``; their derivative is the covariance of the subset."""
        return self._inclusion.to(self._dtype)

    def exclusion_probabilities(self) -> Tensor:
        """``P(z_i = 0)``, ``(*, n)``, to full relative precision where inclusion is near 1; without a gradient."""
        return self._exclusion.to(self._dtype)

    def covariance_product(self, direction: Tensor) -> Tensor:
        """``Cov(z) v`` for ``v (..., *, n)``, the Jacobian-vector product of the inclusion probabilities, in O(n).

        Raises:
            ValueError: for a direction whose last dimension is not n.
        """
        if direction.shape[-1:] != self.event_shape:
            raise ValueError(f"direction: got shape {tuple(direction.shape)}, wanted (..., {self.n})")
        direction = direction.to(self.logits.device).double()
        shape = torch.broadcast_shapes(direction.shape, self.logits.shape)
        lead = direction.expand(shape).reshape(-1, *self._rows.shape)
        rows = [rules.covariance_product(self._free_logits, self._rule, v) for v in lead]
        return torch.stack(rows).reshape(shape).to(self._dtype)

    @property
    def mean(self) -> Tensor:
        return self.inclusion_probabilities()

    @property
    def variance(self) -> Tensor:
        return self.inclusion_probabilities() * self.exclusion_probabilities()

    @property
    def mode(self) -> Tensor:
        """The most probable subset: the k elements of highest logit, ``(*, n)``; ties go to the lower index."""
        order = self.logits.expand(*self._batch_shape, self.n).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(self.n, device=self.logits.device)
        chosen = (rank < self.k.unsqueeze(-1)).to(self._dtype)
        return torch.zeros_like(chosen).scatter(-1, order, chosen)

    def entropy(self) -> Tensor:
        """``-E log p(z)`` in nats, ``(*)``, differentiable."""
        surprise = rules.chunk_surprise(self._free_logits.detach(), self._rule)
        exact = (surprise + self._rule.log_count).view(self._batch_shape)
        out = self._with_gradient(exact, lambda: self._tilted_normalizer - (self._soft_inclusion * self._tilted).sum(-1))
        return out.to(self._dtype)

    def sample(self, sample_shape: Any = (), *, seed: int | None = None) -> Tensor:
        """Exact samples: zeros and ones ``(*sample_shape, *, n)``.

        Args:
            sample_shape: of the samples.
            seed: names the samples: sample s of a seed is the same in any batch of samples, and however the elements are
                spread over the chunks of a set (see `ChunkedKSubset`). None draws a seed from torch's default generator.
        """
        sample_shape = torch.Size(sample_shape)
        count, seed = sample_shape.numel(), drawn_seed(seed)
        z = self._included.to(self._dtype).expand(count, *self._rows.shape).clone()
        for number, part in self._groups(count):
            if self._table is not None:
                z[number] += self._table.sample(part, seed)
            else:
                visits = self._descend(part, seed)
                z[visits.sample, visits.row, visits.position] = 1
        return z.reshape(*sample_shape, *self._batch_shape, self.n)

    def sample_indices(self, sample_shape: Any = (), *, seed: int | None = None) -> Tensor:
        """As `sample`, but the chosen elements' indices in ascending order, ``(*sample_shape, *, k)``.

        Raises:
            ValueError: where k differs between rows.
        """
        if self.k.numel() > 1 and bool((self.k != self.k.flatten()[0]).any()):
            raise ValueError("k: differs between rows, so that indices are ragged; use sample()")
        sample_shape, k = torch.Size(sample_shape), int(self.k.flatten()[0])
        shape = (*sample_shape, *self._batch_shape, k)
        if self._table is not None or bool(self._included.any()):
            return self.sample(sample_shape, seed=seed).nonzero()[:, -1].reshape(shape)
        count, seed = sample_shape.numel(), drawn_seed(seed)
        visits = [self._descend(part, seed) for _, part in self._groups(count)]
        keys = [(v.sample * len(self._rows) + v.row) * self.n + v.position for v in visits]
        return (torch.cat(keys).sort().values % self.n).reshape(shape)

    def _groups(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Numbers of samples that are drawn together, within bounded memory."""
        size = max(1, VISITS // max(1, 32 * int(self._free_k.sum())))
        for start in range(0, count, size):
            stop = min(count, start + size)
            yield slice(start, stop), torch.arange(start, stop, device=self.logits.device)

    def _descend(self, samples: Tensor, seed: int) -> Visits:
        """The chosen elements that were free to be chosen."""
        k = self._free_k.long()
        sample = samples.repeat_interleave(len(k))
        row = torch.arange(len(k), device=k.device).repeat(len(samples))
        root = Visits(row, sample, torch.zeros_like(row), k[row])
        elements = self._tree.descend({len(self._tree.levels) - 1: root}, seed).get(0)
        return root.select(torch.zeros_like(row, dtype=torch.bool)) if elements is None else elements

    # Rows: the batch is flattened; elements whose fate is settled (infinite logits, k = 0, k = n) are set aside.

    @property
    def free(self) -> Tensor:
        """Which elements there is a choice about, bool ``(*, n)``: infinite logits, a k of 0 or of all leave none."""
        return self._free.view(*self._batch_shape, self.n)

    @property
    def settled_in(self) -> Tensor:
        """Which elements are in every subset, bool ``(*, n)``."""
        return self._included.view(*self._batch_shape, self.n)

    # What carries a graph is made anew at each use, so that one distribution may be differentiated many times.

    @property
    def _rows(self) -> Tensor:
        return self.logits.double().expand(*self._batch_shape, self.n).reshape(-1, self.n)

    @cached_property
    def _settled(self) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return settle(self._rows.detach(), self.k.reshape(-1).double())

    @property
    def _free(self) -> Tensor:
        return self._settled[0]

    @property
    def _included(self) -> Tensor:
        return self._settled[1]

    @property
    def _possible(self) -> Tensor:
        return self._free | self._included

    @property
    def _free_k(self) -> Tensor:
        return self._settled[2]

    @cached_property
    def _cut(self) -> Tensor:
        """What the logits of each row are shifted by before they are tilted, ``(B,)``."""
        with torch.no_grad():
            return rules.cut(self._rows.detach().masked_fill(~self._free, -math.inf), self._free_k)

    @property
    def _free_logits(self) -> Tensor:
        """Those of free elements, shifted; -inf elsewhere."""
        return (self._rows - self._cut.unsqueeze(-1)).masked_fill(~self._free, -math.inf)

    @cached_property
    def _rule(self) -> rules.Quadrature:
        return rules.in_memory(self._free_logits.detach(), self._free_k)

    @cached_property
    def _table(self) -> CountTable | None:
        """For sets small enough to be sampled element by element."""
        if not uses_table(self.n, self._free_k):
            return None
        with torch.no_grad():
            return CountTable(self._free_logits.detach(), self._rule.tilt, self._free_k.long())

    @cached_property
    def _tree(self) -> CountTree:
        with torch.no_grad():
            return CountTree.of_elements(self._free_logits.detach(), self._rule.tilt, size=self.n)

    @property
    def _rows_tilted(self) -> Tensor:
        """The tilted logits of free elements, 0 elsewhere, ``(B, n)``; the tilt is a constant."""
        tilted = (self._rows - self._cut.unsqueeze(-1)) + self._rule.tilt.unsqueeze(-1)
        return tilted.masked_fill(~self._free, 0.0)

    @property
    def _tilted(self) -> Tensor:
        return self._rows_tilted.reshape((*self._batch_shape, self.n))

    @property
    def _tilted_normalizer(self) -> Tensor:
        """``log e_k`` of the free tilted logits, ``(*)``."""
        free = rules.log_normalizer(self._free_logits, self._free_k, self._rule) + self._free_k * self._rule.tilt
        return free.view(self._batch_shape)

    @property
    def _inclusion(self) -> Tensor:
        """Inclusion probabilities, float64 ``(*, n)``."""
        return self._soft_inclusion + self.settled_in.double()

    @property
    def _exclusion(self) -> Tensor:
        free = rules.chunk_inclusion(self._free_logits.detach(), self._rule)[1]
        return free.masked_fill(self._included, 0.0).view(*self._batch_shape, self.n)

    def _surprise(self, included: Tensor, excluded: Tensor) -> Tensor:
        """``-log P`` of a tilted element's fate, the mean of the two with these weights; 0 of settled ones, ``(*, n)``."""
        a = self._tilted.detach()
        return (included * stable_softplus(-a) + excluded * stable_softplus(a)).masked_fill(~self.free, 0.0)

    @property
    def _soft_inclusion(self) -> Tensor:
        return rules.inclusion(self._free_logits, self._rule).reshape((*self._batch_shape, self.n))

    def _with_gradient(self, exact: Tensor, formula: Any) -> Tensor:
        """The value of ``exact``, computed without cancellation, with the gradient of ``formula()``."""
        if not (torch.is_grad_enabled() and self.logits.requires_grad):
            return exact
        differentiable = formula()
        return exact.detach() + (differentiable - differentiable.detach())

    @property
    def _dtype(self) -> torch.dtype:
        return _result_dtype(self.logits)

    def _shaped(self, rows: Tensor) -> Tensor:
        rows = rows if rows.dtype == torch.bool else rows.to(self._dtype)
        return rows.reshape((*self._batch_shape, *rows.shape[1:]))

    def __repr__(self) -> str:
        sizes = self.k.unique()
        k = int(sizes) if len(sizes) == 1 else "per row"
        return f"KSubset(n={self.n:,}, k={k}, batch_shape={tuple(self._batch_shape)})"


class _OfSize(constraints.Constraint):
    """Zeros and ones ``(..., *, n)`` of which ``k (*)`` are ones."""

    is_discrete, event_dim = True, 1

    def __init__(self, k: Tensor) -> None:
        self.k = k

    def check(self, value: Tensor) -> Tensor:
        return ((value == 0) | (value == 1)).all(-1) & (value.sum(-1) == self.k)


@kl.register_kl(KSubset, KSubset)
def kl_divergence(p: KSubset, q: KSubset) -> Tensor:
    """``KL(p || q)`` in nats, exact and differentiable in both; ``inf`` where p chooses what q cannot.

    Raises:
        ValueError: for distributions over different numbers of elements.
    """
    if p.n != q.n:
        raise ValueError(f"q: got a distribution over {q.n} elements, wanted {p.n} as p has")
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    included, excluded = p._inclusion, p._exclusion
    # Element by element, so that the digits of two close distributions cancel before they are added up.
    terms = q._surprise(included.detach(), excluded) - p._surprise(included.detach(), excluded)
    exact = terms.sum(-1) + (q._rule.log_count - p._rule.log_count).view(shape)
    out = exact
    if torch.is_grad_enabled() and (p.logits.requires_grad or q.logits.requires_grad):
        own, other = (d._tilted_normalizer - (included * d._tilted).sum(-1) for d in (p, q))
        out = exact.detach() + (other - own - (other - own).detach())
    never_q, always_q = ~q._shaped(q._possible), q._shaped(q._included)
    impossible = ((included > 0) & never_q).any(-1) | ((excluded > 0) & always_q).any(-1) | (p.k != q.k)
    return out.masked_fill(impossible, math.inf).to(torch.promote_types(p._dtype, q._dtype))


def settle(logits: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements of ``logits (B, N)`` are free to be chosen, which are surely in, and how many free ones to choose."""
    finite = logits.isfinite()
    forced = logits == math.inf
    left = k - forced.sum(-1)
    open_row = ((left > 0) & (left < finite.sum(-1))).unsqueeze(-1)
    included = forced | (finite & (left == finite.sum(-1)).unsqueeze(-1) & (left > 0).unsqueeze(-1))
    return finite & open_row, included, left.where(open_row.squeeze(-1), 0.0)


def uses_table(n: int, k: Tensor) -> bool:
    """Whether rows of n elements, of which ``k (B,)`` are to be chosen, are sampled element by element."""
    few = n <= (FEW if len(k) >= MANY_ROWS else SMALL)
    return few and len(k) * n * (int(k.max()) + 1) <= TABLE


def drawn_seed(seed: int | None) -> int:
    """The seed, or one from torch's default generator.

    Raises:
        ValueError: for a seed that is no integer of 64 bits.
    """
    if seed is None:
        return int(torch.randint(2**62, ()).item())
    try:
        number = operator.index(seed)
    except TypeError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"seed: got {seed!r}, wanted an integer of 64 bits, below 2**63")
    return number


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_tensor(name: str, given: Tensor) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.dim() < 1 or given.numel() == 0:
        found = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name}: got {found}, wanted a floating-point tensor (*, n) with n >= 1")
    bad = given.isnan()
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}: got NaN ({int(bad.sum())} of {given.numel()} entries, the first at {where})")


def check_subset(logits: Tensor, k: int | Tensor) -> Tensor:
    """k as an integer tensor where the logits are.

    Raises:
        ValueError: as `KSubset`.
    """
    _check_tensor("logits", logits)
    n = logits.shape[-1]
    counts = check_k(k, n, logits.shape[:-1]).to(logits.device)
    forced = (logits == math.inf).sum(-1)
    possible = n - (logits == -math.inf).sum(-1)
    bad = (counts < forced) | (counts > possible)
    if bool(bad.any()):
        wanted, ins, outs = (int(x.expand(bad.shape)[bad][0]) for x in (counts, forced, n - possible))
        raise ValueError(
            f"logits: {ins} of {n} are +inf (forced in) and {outs} are -inf (forced out), which leaves no subset of k = "
            f"{wanted} elements"
        )
    return counts


def check_k(k: int | Tensor, n: int, batch_shape: torch.Size) -> Tensor:
    """k as an integer tensor.

    Raises:
        ValueError: unless it is whole, in 0..n, and broadcasts with the batch.
    """
    try:
        counts = torch.as_tensor(k)
    except (TypeError, ValueError, RuntimeError):
        counts = torch.tensor(math.nan)
    if counts.dtype == torch.bool or counts.is_floating_point() or counts.is_complex():
        raise ValueError(f"k: got {k!r}, wanted a whole number, or an integer tensor with one for each row of the logits")
    wrong = (counts < 0) | (counts > n)
    if bool(wrong.any()):
        raise ValueError(f"k: got {int(counts[wrong].flatten()[0])}, wanted 0 <= k <= n = {n}")
    try:
        torch.broadcast_shapes(counts.shape, batch_shape)
    except RuntimeError as error:
        raise ValueError(
            f"k: got shape {tuple(counts.shape)}, wanted one that broadcasts with the logits' batch {tuple(batch_shape)}"
        ) from error
    return counts.long()
