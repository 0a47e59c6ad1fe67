"""`KSubset` against enumeration, an extended-precision recursion, scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from small_subsets import Enumerated, close, randn, subsets
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributions import kl_divergence

from distset.sets import InMemory
from distset.subsets import ChunkedKSubset, KSubset
from distset.subsets.quadrature import LogitRange, Moments, solve_tilt

SMALL = [(1, 1), (2, 1), (3, 2), (5, 4), (8, 3), (10, 5), (12, 1), (12, 6), (12, 11)]


@pytest.mark.parametrize(("n", "k"), SMALL)
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_everything_equals_enumeration(n: int, k: int, scale: float) -> None:
    logits = randn(n, scale=scale).requires_grad_()
    truth, subset = Enumerated(logits, k), KSubset(logits, k)
    close(subset.log_normalizer(), truth.log_normalizer)
    close(subset.log_prob(truth.z), truth.log_prob)
    close(subset.inclusion_probabilities(), truth.inclusion)
    close(subset.exclusion_probabilities(), 1 - truth.inclusion.detach())
    close(subset.entropy(), truth.entropy)
    assert subset.log_prob(subset.mode) == subset.log_prob(truth.z).max()


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_gradients_equal_those_of_the_enumeration(n: int, k: int) -> None:
    logits, other = randn(n).requires_grad_(), randn(n, seed=1).requires_grad_()
    direction = randn(n, seed=2)
    truth, subset = Enumerated(logits, k), KSubset(logits, k)
    pairs = [
        (subset.log_normalizer(), truth.log_normalizer),
        (subset.log_prob(truth.z)[0], truth.log_prob[0]),
        ((subset.inclusion_probabilities() * direction).sum(), (truth.inclusion * direction).sum()),
        (subset.entropy(), truth.entropy),
    ]
    for ours, theirs in pairs:
        close(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, theirs)))
    far = Enumerated(other, k)
    exact = (truth.log_prob.exp() * (truth.log_prob - far.log_prob)).sum()
    divergence = kl_divergence(subset, KSubset(other, k))
    close(divergence, exact)
    for ours, theirs in zip(torch.autograd.grad(divergence, (logits, other)), torch.autograd.grad(exact, (logits, other))):
        close(ours, theirs)


def test_forward_mode_and_second_derivatives() -> None:
    logits, direction = randn(9), randn(9, seed=1)
    z = subsets(9, 4)
    p = Enumerated(logits, 4).log_prob.exp()
    pi = p @ z
    covariance = (z * p.unsqueeze(-1)).T @ z - torch.outer(pi, pi)
    close(KSubset(logits, 4).covariance_product(direction), covariance @ direction)
    with forward_ad.dual_level():
        subset = KSubset(forward_ad.make_dual(logits, direction), 4)
        close(forward_ad.unpack_dual(subset.log_normalizer()).tangent, pi @ direction)
        close(forward_ad.unpack_dual(subset.inclusion_probabilities()).tangent, covariance @ direction)
    hessian = torch.autograd.functional.hessian(lambda x: KSubset(x, 4).log_normalizer(), logits)
    close(hessian, covariance)


def test_a_subset_says_its_size_where_it_is_the_same_in_all_rows() -> None:
    logits = torch.zeros(2, 6)
    assert repr(KSubset(logits, 2)) == "KSubset(n=6, k=2, batch_shape=(2,))"
    assert repr(KSubset(logits, torch.tensor([2, 3]))) == "KSubset(n=6, k=per row, batch_shape=(2,))"


def test_third_derivatives_say_that_they_are_missing() -> None:
    logits = randn(5).requires_grad_()
    (first,) = torch.autograd.grad(KSubset(logits, 2).log_normalizer(), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        second.sum().backward()


def count_pmf(p: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    """P(count = 0..k) of independent Bernoulli variables by the recursion, in 80-bit extended precision."""
    pmf = np.zeros(k + 1, np.longdouble)
    pmf[0] = 1
    for yes, no in zip(p, q):
        pmf[1:] = pmf[1:] * no + pmf[:-1] * yes
        pmf[0] *= no
    return pmf


def without_one(p: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    """P(count of the others = k - 1) for each element: a convolution of those before it and those after it."""
    before = np.zeros((len(p) + 1, k), np.longdouble)
    before[0, 0] = 1
    for i, (yes, no) in enumerate(zip(p, q)):
        before[i + 1] = before[i] * no
        before[i + 1, 1:] += before[i, :-1] * yes
    after, found = before[0].copy(), np.zeros(len(p), np.longdouble)
    for i in range(len(p) - 1, -1, -1):
        found[i] = before[i] @ after[::-1]
        after[1:], after[0] = after[1:] * q[i] + after[:-1] * p[i], after[0] * q[i]
    return found


def extended(logits: Tensor, k: int) -> tuple[float, Tensor]:
    """log e_k, and the inclusion probabilities of all elements, in extended precision."""
    theta = logits.numpy().astype(np.longdouble)
    cut = np.sort(theta)[::-1]
    tilt = -(cut[k - 1] + cut[k]) / 2  # any tilt is right while P(K = k) is a number of this precision: here up to n = 10^5

    def weights(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        small = np.exp(-np.abs(a))
        return np.where(a > 0, 1 / (1 + small), small / (1 + small)), np.where(a > 0, small / (1 + small), 1 / (1 + small))

    p, q = weights(theta + tilt)
    whole = count_pmf(p, q, k)[k]
    a = theta + tilt
    softplus = np.maximum(a, 0) + np.log1p(np.exp(-np.abs(a)))
    inclusion = (p * without_one(p, q, k) / whole).astype(np.float64)
    return float(softplus.sum() + np.log(whole) - k * tilt), torch.from_numpy(inclusion)


def shapes_of_logits(n: int, k: int) -> dict[str, Tensor]:
    centred = randn(n) + math.log(k / (n - k))
    peaked = torch.where(torch.arange(n) < k, 30.0, -30.0).double() + randn(n)
    return {"centred": centred, "off-centre": randn(n), "wide": randn(n, scale=1e4), "peaked": peaked}


@pytest.mark.parametrize("shape", ["centred", "off-centre", "wide", "peaked"])
@pytest.mark.parametrize(
    ("n", "k"),
    [(50, 3), (784, 50), (2000, 1000), (10_000, 100), pytest.param(100_000, 1000, marks=pytest.mark.slow)],
)
def test_against_extended_precision(shape: str, n: int, k: int) -> None:
    logits = shapes_of_logits(n, k)[shape]
    log_normalizer, inclusion = extended(logits, k)
    subset = KSubset(logits, k)
    torch.testing.assert_close(float(subset.log_normalizer()), log_normalizer, rtol=1e-13, atol=1e-13)
    close(subset.inclusion_probabilities(), inclusion, atol=1e-13)
    close(subset.inclusion_probabilities().sum(), torch.tensor(float(k), dtype=torch.float64), atol=1e-12 * k)


def test_against_arbitrary_precision() -> None:
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 50
    n, k = 40, 7
    logits = randn(n, scale=3)
    elementary = [mpmath.mpf(1)] + [mpmath.mpf(0)] * k
    for x in logits.tolist():
        for j in range(k, 0, -1):
            elementary[j] += mpmath.exp(mpmath.mpf(x)) * elementary[j - 1]
    close(KSubset(logits, k).log_normalizer(), torch.tensor(float(mpmath.log(elementary[k])), dtype=torch.float64), 1e-13)


def test_against_scipy_where_it_is_right() -> None:
    n, k = 300, 40
    logits = randn(n) + math.log(k / (n - k))
    log_count = scipy.stats.poisson_binom(torch.sigmoid(logits).numpy()).logpmf(k)
    expected = log_count + torch.nn.functional.softplus(logits, threshold=1e9).sum()
    close(KSubset(logits, k).log_normalizer(), expected, 1e-10)


def test_the_published_formula_loses_all_digits_in_its_own_experiment() -> None:
    """float32, logits from randn(784), k = 50: the pmf of the untilted count at 50 is far below the rounding."""
    torch.manual_seed(0)
    logits = torch.randn(784)
    right = KSubset(logits.double(), 50).log_normalizer() - torch.nn.functional.softplus(logits.double()).sum()
    nodes = torch.arange(785)
    factor = torch.exp(2j * math.pi * nodes / 785)
    p = torch.sigmoid(logits).unsqueeze(-1)
    published = torch.fft.fft(torch.prod(p * factor + (1 - p), 0), norm="forward").real[50].clamp_min(1.2e-7).log()
    assert right < -300
    assert published - right > 300


def test_invariances() -> None:
    logits = randn(100)
    subset = KSubset(logits, 17)
    close(KSubset(logits + 5, 17).log_normalizer(), subset.log_normalizer() + 17 * 5)
    close(KSubset(logits + 5, 17).inclusion_probabilities(), subset.inclusion_probabilities())
    mirrored = KSubset(-logits, 83)
    close(mirrored.inclusion_probabilities(), subset.exclusion_probabilities(), 1e-14)
    close(mirrored.entropy(), subset.entropy())
    close(mirrored.log_normalizer() + logits.sum(), subset.log_normalizer())


def test_small_probabilities_keep_their_relative_precision() -> None:
    logits = torch.tensor([0.0, 0.0, -600.0, 600.0], dtype=torch.float64)
    subset = KSubset(logits, 2)
    # Subsets without the last element, or with the third, have weights of e^-600 beside the two of weight 1.
    tiny = torch.tensor(math.exp(-600) / 2, dtype=torch.float64)
    torch.testing.assert_close(subset.inclusion_probabilities()[2], tiny, rtol=1e-13, atol=0)
    torch.testing.assert_close(subset.exclusion_probabilities()[3], tiny, rtol=1e-13, atol=0)


def test_leading_dimensions_and_a_k_for_each_row() -> None:
    logits, k = randn(3, 2, 8), torch.tensor([[1, 2], [0, 8], [5, 4]])
    subset = KSubset(logits, k)
    assert subset.batch_shape == (3, 2)
    assert subset.event_shape == (8,)
    z = subset.sample((7,), seed=0)
    assert z.shape == (7, 3, 2, 8)
    assert (z.sum(-1) == k).all()
    rows = [KSubset(logits[i, j], int(k[i, j])) for i in range(3) for j in range(2)]
    close(subset.log_normalizer().flatten(), torch.stack([row.log_normalizer() for row in rows]))
    close(subset.entropy().flatten(), torch.stack([row.entropy() for row in rows]))
    close(subset.inclusion_probabilities().flatten(0, 1), torch.stack([row.inclusion_probabilities() for row in rows]))
    close(subset.log_prob(z).flatten(1).T, torch.stack([row.log_prob(z[:, i // 2, i % 2]) for i, row in enumerate(rows)]))
    assert (subset.mode.sum(-1) == k).all()
    shared = KSubset(randn(8), torch.tensor([2, 3]))
    assert shared.batch_shape == (2,)
    close(shared.inclusion_probabilities().sum(-1), torch.tensor([2.0, 3.0]).double())


def test_infinite_logits_force_elements_in_and_out() -> None:
    logits = randn(6)
    logits[1], logits[4] = math.inf, -math.inf
    leaf = logits.clone().requires_grad_()
    subset, free = KSubset(leaf, 3), KSubset(logits[[0, 2, 3, 5]], 2)
    close(subset.inclusion_probabilities()[[0, 2, 3, 5]], free.inclusion_probabilities())
    assert subset.inclusion_probabilities()[[1, 4]].tolist() == [1.0, 0.0]
    close(subset.entropy(), free.entropy())
    z = subset.sample((50,), seed=0)
    assert (z[:, 1] == 1).all()
    assert (z[:, 4] == 0).all()
    close(subset.log_prob(z), free.log_prob(z[:, [0, 2, 3, 5]]))
    wrong = torch.tensor([1.0, 0, 1, 1, 0, 0])
    assert subset.log_prob(wrong) == -math.inf
    (subset.log_normalizer() + subset.entropy() + subset.log_prob(z).sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad[[1, 4]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("k", [0, 6])
def test_nothing_and_everything_are_deterministic(k: int) -> None:
    logits = randn(6).requires_grad_()
    subset = KSubset(logits, k)
    assert (subset.sample((4,), seed=0) == float(k > 0)).all()
    assert subset.entropy() == 0
    assert subset.log_prob(torch.full((6,), float(k > 0))) == 0
    (grad,) = torch.autograd.grad(subset.entropy() + subset.inclusion_probabilities().sum(), logits)
    assert (grad == 0).all()
    close(subset.log_normalizer(), logits.sum() if k else torch.tensor(0.0).double())


def test_equal_wide_and_half_precision_logits() -> None:
    close(KSubset(torch.zeros(9).double(), 4).log_normalizer(), torch.tensor(126.0).double().log())
    wide = KSubset(randn(1000, scale=1e4), 100)
    close(wide.inclusion_probabilities().sum(), torch.tensor(100.0).double())
    assert wide.log_prob(wide.mode).isfinite()
    logits = randn(50).half()
    half, exact = KSubset(logits, 5), KSubset(logits.double(), 5)
    assert half.inclusion_probabilities().dtype == torch.float32
    torch.testing.assert_close(half.inclusion_probabilities(), exact.inclusion_probabilities().float())
    leaf = logits.clone().requires_grad_()
    KSubset(leaf, 5).entropy().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float16


LOWEST = torch.finfo(torch.float64).min
# Logits with ties at the cut, and what they are beside it: the same distribution.
TIES = [
    ([1e16] * 4 + [2e16, 0.0], [0.0] * 4 + [math.inf, -math.inf], 3),
    ([1e16, 1e16, 1e16 + 2, 1e16 - 2, -1e16], [0.0, 0.0, 2.0, -2.0, -math.inf], 2),
    ([1e300] * 3 + [-1e300], [0.0] * 3 + [-math.inf], 1),
    ([0.0, 1.0, 2.0] + [torch.finfo(torch.float32).min] * 3, [math.inf] * 3 + [0.0] * 3, 4),
    ([0.0, 1.0, 2.0] + [LOWEST] * 3, [0.0, 1.0, 2.0] + [-math.inf] * 3, 2),
    ([0.1, 1.0, -1e15, -1e15], [0.1, 1.0, -math.inf, -math.inf], 2),
]


@pytest.mark.parametrize(("logits", "near", "k"), TIES)
def test_ties_of_large_logits_at_the_cut(logits: list[float], near: list[float], k: int) -> None:
    leaf, direction = torch.tensor(logits, dtype=torch.float64, requires_grad=True), randn(len(logits))
    subset, beside = KSubset(leaf, k), KSubset(torch.tensor(near, dtype=torch.float64), k)
    pi, covariance = beside.inclusion_probabilities(), beside.covariance_product(direction)
    close(subset.inclusion_probabilities(), pi)
    close(subset.exclusion_probabilities(), beside.exclusion_probabilities())
    close(subset.entropy(), beside.entropy())
    z = beside.sample((20,), seed=0)
    close(subset.log_prob(z), beside.log_prob(z))
    assert subset.log_prob(subset.sample((20,), seed=0)).isfinite().all()
    (first,) = torch.autograd.grad(subset.log_normalizer(), leaf, create_graph=True)
    close(first, pi)
    (second,) = torch.autograd.grad(first @ direction, leaf)
    close(second, covariance)
    with forward_ad.dual_level():
        dual = KSubset(forward_ad.make_dual(leaf.detach(), direction), k)
        close(forward_ad.unpack_dual(dual.inclusion_probabilities()).tangent, covariance)
    parts = ChunkedKSubset(InMemory(leaf.detach().unsqueeze(-1), chunk_size=2), k)
    close(torch.cat(list(parts.inclusion_probabilities())), pi)
    close(parts.entropy(), beside.entropy())
    assert (parts.sample_indices((20,), seed=0) == subset.sample_indices((20,), seed=0)).all()
    torch.testing.assert_close(parts.log_normalizer(), subset.log_normalizer(), rtol=1e-14, atol=1e-12)


def test_rows_of_large_and_small_logits() -> None:
    logits = randn(3, 6)
    logits[1] = torch.tensor([3e16, 3e16, 3e16, 5e16, 1.0, -7.0])
    k = torch.tensor([2, 3, 5])
    both = KSubset(logits, k)
    close(both.inclusion_probabilities()[1], torch.tensor([2 / 3, 2 / 3, 2 / 3, 1, 0, 0], dtype=torch.float64))
    for row in (0, 2):
        single = KSubset(logits[row], int(k[row]))
        close(both.inclusion_probabilities()[row], single.inclusion_probabilities())
        close(both.log_normalizer()[row], single.log_normalizer())
    parts = ChunkedKSubset(InMemory(logits.unsqueeze(-1), chunk_size=4), k)
    close(torch.cat(list(parts.inclusion_probabilities()), -1), both.inclusion_probabilities())
    torch.testing.assert_close(parts.log_normalizer(), both.log_normalizer(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("values", [[-LOWEST, -LOWEST, LOWEST], [0.0, 1.0, LOWEST, LOWEST]])
def test_logits_too_far_apart(values: list[float]) -> None:
    logits, k = torch.tensor(values, dtype=torch.float64), len(values) - 1
    with pytest.raises(ValueError, match="logits: those of row 0 are too far apart"):
        KSubset(logits, k).inclusion_probabilities()
    with pytest.raises(ValueError, match="logits: those of row 0 are too far apart"):
        ChunkedKSubset(InMemory(logits.unsqueeze(-1), chunk_size=2), k)


def test_logits_between_whose_groups_newton_steps_go_to_and_fro() -> None:
    """From a mean count of 4 Newton's step leads to one of 17, and from there back to 4."""
    low = "-38.27 -31.62 -12.76 -10.04 -8.91 -7.56 -7.55 -7.04 -6.91 -6.67 -6.35 -6.32 -5.67 -5.54 -5.26 -2.34"
    logits, k = torch.tensor([*map(float, low.split()), 0.35, 5.2, 6.83, 18.52], dtype=torch.float64), 10
    log_normalizer, inclusion = extended(logits, k)
    subset = KSubset(logits, k)
    torch.testing.assert_close(float(subset.log_normalizer()), log_normalizer, rtol=1e-13, atol=1e-13)
    close(subset.inclusion_probabilities(), inclusion, atol=1e-13)


def test_a_tilt_that_is_not_found() -> None:
    start = LogitRange.of(torch.zeros(1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"logits: row 0 has a mean count of 3 .* wanted k = 2"):
        solve_tilt(start, torch.tensor([2.0]).double(), lambda tilt: Moments(3 + 0 * tilt, 0 * tilt))


def test_divergence_between_what_cannot_be() -> None:
    logits = randn(6)
    without = logits.clone()
    without[0] = -math.inf
    assert kl_divergence(KSubset(logits, 3), KSubset(without, 3)) == math.inf
    assert kl_divergence(KSubset(without, 3), KSubset(logits, 3)).isfinite()
    assert kl_divergence(KSubset(logits, 3), KSubset(logits, 2)) == math.inf
    close(kl_divergence(KSubset(without, 3), KSubset(without, 3)), torch.tensor(0.0).double())


@pytest.mark.parametrize(("n", "k"), [(784, 50), (20_000, 7000)])
def test_divergences_of_single_precision_logits_keep_their_digits(n: int, k: int) -> None:
    logits = randn(n).float().requires_grad_()
    near = logits.detach() + 1e-3 * randn(n, seed=1).float()
    p, q = KSubset(logits, k), KSubset(near, k)
    itself = kl_divergence(p, p)
    assert itself.dtype == torch.float32
    assert itself == 0
    exact = kl_divergence(KSubset(logits.detach().double(), k), KSubset(near.double(), k))
    torch.testing.assert_close(kl_divergence(p, q).double(), exact, rtol=1e-7, atol=0)
    step = (logits - near).detach().double()
    (slope,) = torch.autograd.grad(kl_divergence(p, q), logits)
    wanted = KSubset(logits.detach().double(), k).covariance_product(step)
    torch.testing.assert_close(slope.double(), wanted, rtol=1e-6, atol=1e-9)


def test_the_support_is_of_subsets_of_size_k() -> None:
    support = KSubset(torch.zeros(2, 4), torch.tensor([2, 3])).support
    tries = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [2, 0, 0, 0], [0.5, 0.5, 1, 0]])
    assert support.check(tries.unsqueeze(1).expand(4, 2, 4)).tolist() == [[True, False], [False, True]] + 2 * [[False] * 2]
    assert support.check(KSubset(torch.zeros(2, 4), torch.tensor([2, 3])).sample((5,))).all()


def test_from_probabilities_is_the_conditioned_bernoulli() -> None:
    p = torch.tensor([0.2, 0.9, 0.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    z = subsets(5, 3)
    weight = torch.where(z == 1, p, 1 - p).prod(-1)
    subset = KSubset.from_probabilities(p, 3)
    close(subset.log_prob(z).exp(), weight / weight.sum())
    direction = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    (found,) = torch.autograd.grad(subset.inclusion_probabilities() @ direction, p)
    (exact,) = torch.autograd.grad((weight / weight.sum()) @ z @ direction, p)
    close(found[:3], exact[:3])
    assert found[3:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.zeros(4), -1, "k: got -1"),
        (torch.zeros(4), 5, "k: got 5"),
        (torch.zeros(4), 2.0, "k: got 2.0, wanted a whole number"),
        (torch.zeros(4), None, "k: got None, wanted a whole number"),
        (torch.zeros(4), "3", "k: got '3', wanted a whole number"),
        (torch.tensor([0.0, math.nan]), 1, r"logits: got NaN \(1 of 2 entries, the first at \(1,\)\)"),
        (torch.tensor([math.inf, math.inf, 0.0]), 1, "2 of 3 are \\+inf"),
        (torch.tensor([-math.inf, -math.inf, 0.0]), 2, "2 are -inf"),
        (torch.zeros(3, dtype=torch.int64), 1, "logits: got torch.int64"),
        (torch.zeros(3, 4), torch.tensor([1, 2]), "k: got shape"),
    ],
)
def test_bad_input(logits: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KSubset(logits, k)


def test_bad_values() -> None:
    subset = KSubset(torch.zeros(4), 2)
    with pytest.raises(ValueError, match="value: got shape"):
        subset.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="probabilities"):
        KSubset.from_probabilities(torch.tensor([0.5, 1.5]), 1)
    with pytest.raises(ValueError, match="probabilities: got list, wanted a floating-point tensor"):
        KSubset.from_probabilities([0.5, 0.5], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probabilities: got NaN"):
        KSubset.from_probabilities(torch.tensor([0.5, math.nan]), 1)
    with pytest.raises(ValueError, match="differs between rows"):
        KSubset(torch.zeros(2, 4), torch.tensor([1, 2])).sample_indices()
    assert subset.log_prob(torch.tensor([1.0, 1, 1, 0])) == -math.inf
