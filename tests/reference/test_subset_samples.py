"""Exact samples against chi-square and their marginals, Gumbel top-k shown to fail, the relaxed top k."""

import decimal
import math

import numpy as np
import pytest
import scipy.stats
import torch
from small_subsets import Enumerated, close, randn, subsets
from torch import Tensor

from distset.sets import InMemory
from distset.subsets import ChunkedKSubset, KSubset, gumbel_top_k, relaxed_top_k


def chi_square(samples: Tensor, log_prob: Tensor) -> float:
    """The p-value of samples ``(S, n)`` against the probabilities of `subsets`."""
    n, k = samples.shape[-1], int(samples[0].sum())
    code = 2 ** torch.arange(n, dtype=torch.float64)
    order = (subsets(n, k) @ code).argsort()
    place = torch.searchsorted((subsets(n, k) @ code)[order].contiguous(), samples.double() @ code)
    counts = torch.bincount(place, minlength=len(order)).numpy()
    expected = (log_prob[order].exp() * len(samples)).numpy()
    common = expected >= 5
    observed, wanted = [*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]
    if wanted[-1] < 5:
        observed, wanted = [*observed[:-2], sum(observed[-2:])], [*wanted[:-2], sum(wanted[-2:])]
    return float(scipy.stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue)


@pytest.mark.parametrize(("n", "k", "scale"), [(10, 5, 1.0), (10, 2, 2.0), (11, 8, 1.0), (7, 1, 0.0), (12, 6, 3.0)])
def test_exact_samples_pass_chi_square_and_gumbel_top_k_does_not(n: int, k: int, scale: float) -> None:
    logits = randn(n, scale=scale)
    log_prob = Enumerated(logits, k).log_prob
    assert chi_square(KSubset(logits, k).sample((100_000,), seed=3), log_prob) > 1e-3
    if k > 1 and scale:
        gumbel = gumbel_top_k(logits, k, (100_000,), generator=torch.Generator().manual_seed(0))
        assert chi_square(gumbel, log_prob) < 1e-6


@pytest.mark.parametrize(("n", "k", "scale"), [(10, 5, 1.0), (11, 8, 2.0)])
def test_the_tree_draws_from_the_joint_law(n: int, k: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sets are drawn from a table; here they go down the tree, in one piece and in three."""
    for module in ("distribution", "chunked"):
        monkeypatch.setattr(f"distset.subsets.{module}.uses_table", lambda n, k: False)
    logits = randn(n, scale=scale)
    subset = KSubset(logits, k)
    z = subset.sample((20_000,), seed=4)
    assert subset._table is None
    assert chi_square(z, Enumerated(logits, k).log_prob) > 1e-3
    chunked = ChunkedKSubset(InMemory(logits.unsqueeze(-1), chunk_size=4), k)
    assert (torch.cat(list(chunked.sample((1000,), seed=4)), -1) == z[:1000]).all()


def test_samples_of_large_sets_have_the_inclusion_probabilities() -> None:
    subset = KSubset(randn(3000), 400)
    z = subset.sample((500,), seed=1)
    assert (z.sum(-1) == 400).all()
    pi = subset.inclusion_probabilities()
    score = (z.mean(0) - pi) / (pi * (1 - pi) / 500).sqrt()
    assert score.abs().max() < 5
    assert 0.9 < score.square().mean() < 1.1


def test_a_sample_is_named_by_seed_and_number() -> None:
    subset = KSubset(randn(2, 100), 30)
    many = subset.sample((20,), seed=5)
    assert (many[:3] == subset.sample((3,), seed=5)).all()
    assert (many != subset.sample((20,), seed=6)).any()
    assert (many[0] != many[1]).any()
    torch.manual_seed(0)
    first = subset.sample()
    torch.manual_seed(0)
    assert (first == subset.sample()).all()
    indices = subset.sample_indices((20,), seed=5)
    assert indices.shape == (20, 2, 30)
    assert (torch.zeros_like(many).scatter(-1, indices, 1.0) == many).all()


def test_indices_count_elements_that_are_forced_in() -> None:
    logits = randn(9)
    logits[[2, 7]] = math.inf
    indices = KSubset(logits, 4).sample_indices((5,), seed=0)
    assert indices.shape == (5, 4)
    assert ((indices == 2).any(-1) & (indices == 7).any(-1)).all()


def test_relaxed_top_k_adds_up_and_tends_to_the_top() -> None:
    keys = randn(4, 12)
    soft, hard = relaxed_top_k(keys, 5, 0.5), relaxed_top_k(keys, 5, 1e-4)
    close(soft.sum(-1), torch.full((4,), 5.0).double())
    close(hard, KSubset(keys, 5).mode, 1e-6)
    keys[0, :2], keys[1, 3:] = math.inf, -math.inf
    with pytest.raises(ValueError, match=r"keys: got 2 of \+inf"):
        relaxed_top_k(keys, 1, 0.5)
    forced = relaxed_top_k(keys, 3, 0.5)
    assert (forced[0, :2] == 1).all()
    close(forced[0, 2:], relaxed_top_k(keys[0, 2:], 1, 0.5))
    close(forced[1, :3], relaxed_top_k(keys[1, :3], 3, 0.5))
    assert (forced[1, 3:] == 0).all()
    ks = torch.tensor([3, 2, 0, 12])
    close(relaxed_top_k(keys, ks, 0.5), torch.stack([relaxed_top_k(row, int(k), 0.5) for row, k in zip(keys, ks)]))
    with pytest.raises(ValueError, match=r"keys: got 2 of \+inf .* at most k = 1"):
        relaxed_top_k(keys, torch.tensor([1, 2, 0, 0]), 0.5)
    for k, tau, message in ((13, 1.0, "k: got 13"), (5, 0.0, "tau: got 0")):
        with pytest.raises(ValueError, match=message):
            relaxed_top_k(keys, k, tau)
    with pytest.raises(ValueError, match="k: got 13"):
        gumbel_top_k(keys, 13)


def shares_by_decimals(keys: Tensor, k: int, tau: float) -> Tensor:
    """The recursion of `relaxed_top_k` with 50 digits and unbounded exponents."""
    power = decimal.Decimal(1) / decimal.Decimal(tau)
    with decimal.localcontext(prec=50, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
        weights = [(decimal.Decimal(key) * power).exp() for key in keys.tolist()]
        total = [decimal.Decimal(0)] * len(weights)
        for _ in range(k):
            others = [sum(weights[:i] + weights[i + 1 :]) for i in range(len(weights))]
            whole = sum(weights)
            total = [t + w / whole for t, w in zip(total, weights)]
            weights = [w * (o / whole) ** power for w, o in zip(weights, others)]
    return torch.tensor([float(t) for t in total], dtype=torch.float64)


@pytest.mark.parametrize("spread", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("tau", [0.5, 0.125])
def test_relaxed_top_k_of_any_spread(spread: float, tau: float) -> None:
    keys = randn(3, 12, scale=spread).requires_grad_()
    found = relaxed_top_k(keys, 5, tau)
    close(found, torch.stack([shares_by_decimals(row, 5, tau) for row in keys]), 1e-13 * (1 + spread) / tau)
    (slope,) = torch.autograd.grad((found * randn(12, seed=1)).sum(), keys)
    assert slope.isfinite().all()
    close(slope.sum(-1), torch.zeros(3).double(), 1e-10)


def test_relaxed_top_k_in_single_precision() -> None:
    assert relaxed_top_k(torch.tensor([1000.0, 0.0, -1000.0]), 2, 0.5).tolist() == [1.0, 1.0, 0.0]
    keys = torch.tensor([[5.0, -math.inf], [1e4, -1e4]], requires_grad=True)
    found = relaxed_top_k(keys, torch.tensor([1, 2]), 0.5)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    (slope,) = torch.autograd.grad(found[:, 0].sum(), keys)
    assert slope.isfinite().all()


def test_keys_that_cannot_be_chosen() -> None:
    keys = torch.tensor([[0.0, 1.0, -math.inf], [0.0, math.nan, 1.0]])
    for call, message in (
        (lambda: relaxed_top_k(keys, 1, 0.5), r"keys: got NaN \(1 of 6"),
        (lambda: relaxed_top_k(keys[:1], 3, 0.5), "keys: got 2 of 3 that are not -inf .* wanted at least k = 3"),
        (lambda: relaxed_top_k(keys[:1], 2.0, 0.5), "k: got 2.0, wanted a whole number"),
        (lambda: gumbel_top_k(keys, 1), r"logits: got NaN \(1 of 6"),
        (lambda: gumbel_top_k(keys[:1], 3), "1 are -inf .* no subset of k = 3"),
        (lambda: gumbel_top_k(-keys[:1], 0), r"1 of 3 are \+inf .* no subset of k = 0"),
        (lambda: gumbel_top_k(keys[:1], 2.0), "k: got 2.0, wanted a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert gumbel_top_k(keys[:1], np.int64(2)).tolist() == [[1.0, 1.0, 0.0]]
