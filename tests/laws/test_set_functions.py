"""Utilities: the fast path equals the general one; recognition networks: exact marginals, entropies that bound."""

import itertools

import pytest
import torch
from torch import nn

from distset.set_functions import (
    Copula,
    Guess,
    Independent,
    SetFunction,
    SumUtility,
    UserUtility,
    check_invariance,
    elbo,
    published_recognition,
    published_utility,
)


def head(width):
    return nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, 1))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gains_from_one_sum_are_the_general_ones(context, masked):
    utility = SumUtility(nn.Linear(3, 5), head(10 if context else 5), context=context).double()
    elements = torch.randn(2, 9, 3, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [6]]) if masked else None
    subsets = torch.rand(2, 4, 9) < 0.5
    if mask is not None:
        subsets &= mask.unsqueeze(-2)
    fast = utility.gains(elements, subsets, mask)
    general = SetFunction.gains(utility, elements, subsets, mask, block=4)
    if mask is not None:
        fast, general = (g.masked_fill(~mask.unsqueeze(-2), 0.0) for g in (fast, general))
    torch.testing.assert_close(fast, general, rtol=1e-12, atol=1e-13)
    h = utility.embed(elements, mask)
    soft = utility.gains_of_sums(h, subsets.double() @ h, subsets.double(), utility.total(h))
    if mask is not None:
        soft = soft.masked_fill(~mask.unsqueeze(-2), 0.0)
    torch.testing.assert_close(soft, fast, rtol=1e-12, atol=1e-13)


def test_gains_of_any_utility_are_differences_of_it():
    def determinant(elements, subsets):
        kernel = elements @ elements.mT
        picked = subsets.unsqueeze(-1) * subsets.unsqueeze(-2) * kernel.unsqueeze(-3)
        return torch.logdet(picked + torch.eye(elements.shape[-2], dtype=elements.dtype))

    elements = torch.randn(6, 3, dtype=torch.float64)
    subsets = torch.rand(3, 6) < 0.5
    gains = UserUtility(determinant).gains(elements, subsets)
    for m, i in itertools.product(range(3), range(6)):
        with_i, without_i = subsets[m].double().clone(), subsets[m].double().clone()
        with_i[i], without_i[i] = 1, 0
        pair = determinant(elements, torch.stack([with_i, without_i]))
        torch.testing.assert_close(gains[m, i], pair[0] - pair[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("as_module", [False, True])
def test_the_mask_is_handed_to_a_function_that_takes_one(as_module):
    def shares(elements, subsets, mask=None):
        h = elements[..., 0] if mask is None else elements[..., 0] * mask
        return (subsets * h.unsqueeze(-2)).sum(-1) / h.sum(-1, keepdim=True)

    class Module(nn.Module):
        def forward(self, elements, subsets, mask=None):
            return shares(elements, subsets, mask)

    utility = UserUtility(Module() if as_module else shares)
    elements, subsets = torch.rand(2, 5, 1), torch.rand(2, 3, 5) < 0.5
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    subsets &= mask.unsqueeze(-2)
    found = utility.gains(elements, subsets, mask)[1:, :, :3]
    torch.testing.assert_close(found, utility.gains(elements[1:, :3], subsets[1:, :, :3]))


def test_padding_is_refused_where_the_function_takes_no_mask():
    utility = UserUtility(lambda elements, subsets: subsets.sum(-1))
    full = torch.ones(2, 4, dtype=torch.bool)
    assert utility(torch.randn(2, 4, 1), torch.ones(2, 3, 4), full).tolist() == [[4.0] * 3] * 2
    with pytest.raises(ValueError, match=r"function: takes .elements, subsets. alone, got an offer with padding.*mask=None"):
        utility(torch.randn(2, 4, 1), torch.ones(2, 3, 4), torch.arange(4) < torch.tensor([[4], [3]]))


def test_elements_may_be_images_and_padding_does_not_reach_the_context():
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 5))
    utility = SumUtility(encoder, head(10), context=True, element_ndim=3)
    images = torch.randn(2, 4, 1, 6, 6)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    subsets = torch.tensor([[1.0, 0, 1, 0]]).expand(2, 1, 4)
    padded = utility(images, subsets, mask)
    alone = utility(images[1:, :3], subsets[1:, :, :3])
    torch.testing.assert_close(padded[1:], alone)


def test_elements_may_be_numbers_of_a_vocabulary():
    utility = SumUtility(nn.Embedding(9, 4), head(4), element_ndim=0)
    words, subsets = torch.randint(9, (2, 5)), torch.rand(2, 3, 5) < 0.5
    vectors = SumUtility(nn.Identity(), utility.head)
    torch.testing.assert_close(utility(words, subsets), vectors(utility.encoder(words), subsets))
    torch.testing.assert_close(utility.gains(words, subsets), vectors.gains(utility.encoder(words), subsets))


def test_published_sizes():
    count = sum(p.numel() for p in published_utility(2).parameters())
    assert count == (2 * 256 + 256) + (256 * 500 + 500) + (500 * 500 + 500) + (500 + 1)
    assert published_utility(2, nonlinear=True)(torch.randn(3, 8, 2), torch.ones(3, 2, 8)).shape == (3, 2)
    assert published_utility(2, context=True)(torch.randn(3, 8, 2), torch.ones(3, 2, 8)).shape == (3, 2)
    assert isinstance(published_recognition(2, rank=3), Copula)
    assert type(published_recognition(2)) is Independent


def guess_of(psi, rank=0, strength=2.0):
    logits = torch.logit(torch.as_tensor(psi, dtype=torch.float64))
    if not rank:
        return Guess(logits, torch.ones_like(logits), None)
    factors = strength * torch.randn(len(logits), rank, dtype=torch.float64)
    scale = torch.rsqrt(1 + factors.square().sum(-1))
    return Guess(logits, scale, factors * scale.unsqueeze(-1))


@pytest.mark.parametrize("rank", [0, 2])
def test_marginals_are_what_the_logits_say(rank):
    psi = torch.tensor([0.02, 0.1, 0.5, 0.9], dtype=torch.float64)
    draws = guess_of(psi, rank).sample(200_000, torch.Generator().manual_seed(1))
    assert set(draws.detach().unique().tolist()) == {0.0, 1.0}
    error = (psi * (1 - psi) / 200_000).sqrt()
    assert ((draws.mean(0) - psi).abs() < 5 * error).all()


def test_a_copula_correlates_the_choices():
    guess = guess_of([0.5, 0.5], rank=1)
    draws = guess.sample(200_000, torch.Generator().manual_seed(1))
    correlation = (guess.factors @ guess.factors.mT)[0, 1]
    both = 0.25 + torch.asin(correlation) / (2 * torch.pi)  # Sheppard's orthant probability
    assert abs(draws.prod(-1).mean() - both) < 5 * 0.5 / 200_000**0.5


def test_entropy_is_exact_without_and_a_lower_bound_with_correlation():
    psi = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64)
    independent = torch.distributions.Bernoulli(probs=psi).entropy().sum()
    torch.testing.assert_close(guess_of(psi).entropy(), independent)
    for seed in range(5):
        torch.manual_seed(seed)
        guess = guess_of(psi, rank=2, strength=1.0)
        full = torch.diag(guess.noise**2) + guess.factors @ guess.factors.mT
        torch.testing.assert_close(full.diagonal(), torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(guess.entropy(), independent + 0.5 * torch.logdet(full))
        codes = (guess.sample(400_000, torch.Generator().manual_seed(seed)) @ torch.tensor([1.0, 2, 4, 8]).double()).long()
        frequency = torch.bincount(codes, minlength=16).double() / len(codes)
        true = -(frequency * frequency.clamp_min(1e-12).log()).sum()  # its error: about 16 / (2 * 400,000)
        assert guess.entropy() <= true + 1e-3
        assert true <= independent + 1e-3


@pytest.mark.parametrize("rank", [0, 2])
def test_elbo_is_below_the_log_partition_function(rank):
    torch.manual_seed(3)
    utility = SumUtility(nn.Linear(3, 5), head(5)).double()
    elements = torch.randn(6, 3, dtype=torch.float64)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    log_z = torch.logsumexp(utility(elements, every), -1)
    guess = guess_of(torch.rand(6) * 0.8 + 0.1, rank, strength=0.5)
    bound = elbo(utility, guess, elements, samples=100_000, generator=torch.Generator().manual_seed(0))
    assert bound < log_z + 0.01
    assert elbo(utility, guess_of([0.5] * 6), elements, samples=10, generator=torch.Generator().manual_seed(0)).shape == ()


def test_elbo_trains_a_recognition_network_and_skips_padding():
    utility, network = published_utility(2, hidden=16, width=8), published_recognition(2, rank=2, hidden=16, width=8)
    elements = torch.randn(3, 7, 2)
    mask = torch.arange(7) < torch.tensor([[7], [5], [2]])

    def bound(x):
        return elbo(utility, network(x), x, generator=torch.Generator().manual_seed(0), mask=mask)

    garbage = torch.where(mask.unsqueeze(-1), elements, 100.0)
    torch.testing.assert_close(bound(elements), bound(garbage))
    bound(elements).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_an_order_dependent_utility_is_named():
    def by_place(elements, subsets):
        return (subsets * torch.arange(elements.shape[-2])).sum(-1)

    with pytest.raises(ValueError, match="UserUtility is not permutation invariant: its values differ"):
        check_invariance(UserUtility(by_place), torch.randn(6, 2))
    check_invariance(published_utility(2, context=True), torch.randn(3, 6, 2))


def test_values_that_are_no_numbers_pass_nowhere():
    with pytest.raises(ValueError, match=r"utility: UserUtility gave .* of 8 values that are NaN or infinite"):
        check_invariance(UserUtility(lambda elements, subsets: subsets.sum(-1) * torch.nan), torch.randn(6, 2))
    with pytest.raises(ValueError, match="elements: 6 of 6 have features that are NaN"):
        check_invariance(published_utility(2), torch.full((6, 2), torch.nan))


@pytest.mark.parametrize(("how", "message"), [
    ({"samples": 0}, "samples: got 0, wanted at least 1"),
    ({"temperature": 0.0}, "temperature: got 0.0, wanted a number above 0"),
    ({"elements": torch.full((4, 2), torch.nan)}, "elements: 4 of 4 have features that are NaN"),
])  # fmt: skip
def test_bad_bounds_are_named(how, message):
    given = {"elements": torch.zeros(4, 2), "generator": torch.Generator(), **how}
    with pytest.raises(ValueError, match=message):
        elbo(published_utility(2, width=3, hidden=3), guess_of([0.5] * 4), **given)


def test_bad_networks_are_named():
    with pytest.raises(ValueError, match=r"head: got Sequential starting with ReLU.*nn\.Linear"):
        SumUtility(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))
    with pytest.raises(ValueError, match=r"function: gave shape .* wanted one utility a subset"):
        UserUtility(lambda elements, subsets: subsets)(torch.randn(4, 2), torch.ones(3, 4))
