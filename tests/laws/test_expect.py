"""Every gradient through a k-subset against its law: unbiased ones by enumerating all tuples of samples."""

import itertools

import numpy as np
import pytest
import torch
from small_subsets import quadratic, randn, subsets, true_gradient
from torch import Tensor
from torch.distributions import Independent

from distset.expect import (
    IMLE,
    NCPSS,
    AdaptiveTarget,
    Estimator,
    FixedTarget,
    GumbelScore,
    GumbelSoftmax,
    LeaveOneOut,
    NoBaseline,
    Past,
    Ridge,
    ScoreFunction,
    Simple,
    StraightThrough,
    Tangent,
    describe,
    expect,
    expect_chunked,
)
from distset.expect.baselines import Baseline
from distset.expect.score import score_gradient
from distset.metrics import estimator_error
from distset.noise import SumOfGamma
from distset.perturb_and_map import PerturbAndMap
from distset.sets import InMemory
from distset.solve import Blackbox, Identity
from distset.subsets import ChunkedKSubset, KSubset

N, K = 4, 2
WEIGHT = torch.tensor(2.0, requires_grad=True)


def stale_past() -> Past:
    past = Past(N, rate=0.5, folds=3)
    past.slope += randn(N, seed=9)
    return past


BASELINES = [NoBaseline, LeaveOneOut, Ridge, lambda: Ridge(folds=2), lambda: Tangent(folds=4), stale_past]


@pytest.mark.parametrize("make", BASELINES)
@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 6])
def test_score_functions_are_unbiased_by_enumeration(make, num_samples: int) -> None:
    """All tuples of samples, each weighed by its probability: the mean is the gradient to rounding."""
    baseline: Baseline = make()
    if num_samples < baseline.least:
        pytest.skip("needs other samples")
    logits = randn(N)
    z = subsets(N, K)
    p = (z @ logits).softmax(0)
    tuples = torch.tensor(list(itertools.product(range(len(z)), repeat=num_samples)))
    drawn = z[tuples].transpose(0, 1).requires_grad_()  # (S, T, n)
    values = quadratic(drawn)
    (slopes,) = torch.autograd.grad(values.sum(), drawn)
    gradient = score_gradient(values, drawn, KSubset(logits.expand(len(tuples), N), K), baseline, slopes)
    mean = (p[tuples].prod(-1).unsqueeze(-1) * gradient).sum(0)
    torch.testing.assert_close(mean, true_gradient(logits, K), atol=1e-10, rtol=0)


ESTIMATORS: list[Estimator] = [
    *(ScoreFunction(make()) for make in BASELINES),
    Simple(),
    StraightThrough(),
    GumbelSoftmax(0.5),
    GumbelSoftmax(0.5, hard=True),
    IMLE(FixedTarget(1.0)),
    NCPSS(0.5),
    GumbelScore(),
]


def draws(estimator: Estimator, rows: int, num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Independent gradients at one point, a row each, and the truth."""
    logits = randn(N)
    leaf = logits.expand(rows, N).clone().requires_grad_()
    expect(quadratic, KSubset(leaf, K), num_samples, grad=estimator, seed=seed).sum().backward()
    assert leaf.grad is not None
    return leaf.grad, true_gradient(logits, K)


def adapted() -> IMLE:
    """With a strength, which it does not have at first."""
    target = AdaptiveTarget()
    target.beta += 1
    return IMLE(target)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, adapted(), PerturbAndMap()], ids=repr)
def test_labels_are_true(estimator: Estimator) -> None:
    """10^5 samples of f: no bias where the label says so; a bias far beyond its error where it says otherwise."""
    error = estimator_error(*draws(estimator, 25_000, 4))
    bias = error.bias_squared
    if estimator.unbiased:
        assert abs(bias.value) < 3 * bias.error + 1e-12
    else:
        assert bias.value > 10 * bias.error


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e.unbiased], ids=repr)
def test_unbiased_at_a_million_samples(estimator: Estimator) -> None:
    grads = torch.cat([draws(estimator, 25_000, 8, seed)[0] for seed in range(5)])
    truth = true_gradient(randn(N), K)
    score = (grads.mean(0) - truth) / (grads.std(0) / len(grads) ** 0.5)
    assert score.abs().max() < 3


@pytest.mark.parametrize("make", BASELINES)
@pytest.mark.parametrize("num_samples", [2, 3])
def test_score_functions_of_several_subsets_are_unbiased_by_enumeration(make, num_samples: int) -> None:
    """f sees two subsets together: all tuples of pairs, and a value that is no sum over the two."""
    baseline: Baseline = make()
    if isinstance(baseline, Past):
        baseline = Past(6, folds=3)
    logits, z = randn(2, 3), subsets(3, 2)
    pairs = torch.stack([z.repeat_interleave(3, 0), z.repeat(3, 1)], 1)  # (9, 2, 3)

    def together(pair: Tensor) -> Tensor:
        return quadratic(pair.flatten(-2)).square()

    leaf = logits.clone().requires_grad_()
    p = (pairs * leaf).sum((-1, -2)).softmax(0)
    (truth,) = torch.autograd.grad((p * together(pairs)).sum(), leaf)
    tuples = torch.tensor(list(itertools.product(range(9), repeat=num_samples)))
    drawn = pairs[tuples].transpose(0, 1).requires_grad_()  # (S, T, 2, 3)
    values = together(drawn)
    (slopes,) = torch.autograd.grad(values.sum(), drawn)
    gradient = score_gradient(values, drawn, KSubset(logits.expand(len(tuples), 2, 3), 2), baseline, slopes)
    mean = (p.detach()[tuples].prod(-1).view(-1, 1, 1) * gradient).sum(0)
    torch.testing.assert_close(mean, truth, atol=1e-9, rtol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_several_subsets_together_with_every_estimator(estimator: Estimator) -> None:
    """f is a sum over the subsets of a draw: the gradient is that of subsets on their own, up to noise."""
    if "Past" in repr(estimator):
        pytest.skip("its slope has one length")
    logits = randn(2, N).expand(4000, 2, N).clone().requires_grad_()
    both = Independent(KSubset(logits, K), 1)
    mean = expect(lambda z: quadratic(z).sum(-1), both, 8, grad=estimator, seed=0)
    assert mean.shape == (4000,)
    mean.sum().backward()
    single = randn(2, N).expand(4000, 2, N).clone().requires_grad_()
    expect(quadratic, KSubset(single, K), 8, grad=estimator, seed=1).sum().backward()
    assert logits.grad is not None
    assert single.grad is not None
    spread = (logits.grad.var(0) + single.grad.var(0)).div(4000).sqrt()
    assert ((logits.grad.mean(0) - single.grad.mean(0)).abs() < 5 * spread + 1e-9).all()


@pytest.mark.parametrize(
    "estimator", [*ESTIMATORS, IMLE(AdaptiveTarget(step=2.0)), PerturbAndMap(), PerturbAndMap(Blackbox(5.0))], ids=repr
)
def test_what_is_forced_in_or_out_takes_no_part(estimator: Estimator) -> None:
    """Rows of different lengths, one with an element that is in, one with nothing left to choose, in one batch."""
    if "Past" in repr(estimator):
        estimator = ScoreFunction(Past(6))
    inf = torch.inf
    fate = torch.tensor([[0.0] * 6, [0, 0, 0, 0, -inf, -inf], [inf, 0, 0, 0, 0, -inf], [inf, inf, inf, 0, 0, 0]])
    leaf, seen = randn(4, 6).requires_grad_(), []

    def f(z: Tensor) -> Tensor:
        seen.append(z.detach())
        return quadratic(z) + z.sum(-1)

    for seed in range(3):  # the adaptive target starts at strength 0
        subset = KSubset(torch.where(fate == 0, leaf, fate), 3)
        mean = expect(f, subset, 8, grad=estimator, seed=seed)
        (gradient,) = torch.autograd.grad(mean.sum(), leaf)
        assert gradient.isfinite().all()
        assert (gradient[fate != 0] == 0).all()
    z = torch.cat(seen)
    assert (z[:, fate == inf] == 1).all()
    assert (z[:, fate == -inf] == 0).all()
    assert (z[:, 3, 3:] == 0).all()
    assert gradient[3].abs().max() < 1e-12
    assert all((gradient[row] != 0).any() for row in range(3))


@pytest.mark.parametrize("estimator", [*ESTIMATORS, PerturbAndMap()], ids=repr)
def test_each_row_has_a_k_of_its_own(estimator: Estimator) -> None:
    """From nothing, which has no gradient, to everything, which has none either."""
    if "Past" in repr(estimator):
        estimator = ScoreFunction(Past(6))
    leaf, k, seen = randn(6, 6).requires_grad_(), torch.tensor([0, 1, 2, 3, 5, 6]), []

    def f(z: Tensor) -> Tensor:
        seen.append(z.detach())
        return quadratic(z)

    mean = expect(f, KSubset(leaf, k), 16, grad=estimator, seed=0)
    (gradient,) = torch.autograd.grad(mean.sum(), leaf)
    assert (gradient[[0, 5]].abs() < 1e-12).all()
    assert (gradient[1:5] != 0).any(-1).all()
    if not isinstance(estimator, NCPSS):  # about k
        torch.testing.assert_close(seen[0].sum(-1), k.double().expand(16, 6))


@pytest.mark.parametrize("estimator", [*ESTIMATORS, PerturbAndMap()], ids=repr)
@pytest.mark.parametrize("k", [0, 6])
def test_nothing_to_choose(estimator: Estimator, k: int) -> None:
    if "Past" in repr(estimator):
        estimator = ScoreFunction(Past(6))
    leaf = randn(2, 6).requires_grad_()
    mean = expect(quadratic, KSubset(leaf, k), 4, grad=estimator, seed=0)
    torch.testing.assert_close(mean.detach(), quadratic(torch.full((2, 6), k / 6).double()))
    (gradient,) = torch.autograd.grad(mean.sum(), leaf)
    assert (gradient.abs() < 1e-12).all()


def test_what_is_learned_is_saved_with_a_model() -> None:
    assert [len(e.learned().state_dict()) for e in (Simple(), ScoreFunction(Ridge()), ScoreFunction(Past(3)))] == [0, 0, 1]
    assert set(IMLE(AdaptiveTarget()).learned().state_dict()) == {"0.beta", "0.found"}


def test_parameters_of_f_get_their_pathwise_gradient() -> None:
    logits, scale = randn(6).requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    subset = KSubset(logits, 3)
    expect(lambda z: scale * quadratic(z), subset, 20, seed=1).backward()
    torch.testing.assert_close(scale.grad, quadratic(subset.sample((20,), seed=1)).mean())
    alone = randn(6).requires_grad_()
    expect(lambda z: 2 * quadratic(z), KSubset(alone, 3), 20, seed=1).backward()
    torch.testing.assert_close(logits.grad, alone.grad)


def test_a_black_box_is_enough() -> None:
    seen = []

    def simulator(z: Tensor) -> np.ndarray:
        seen.append(np.asarray(z))
        return np.asarray(z) @ np.arange(6)

    logits, twin = randn(6).requires_grad_(), randn(6).requires_grad_()
    expect(simulator, KSubset(logits, 3), 8, seed=0).backward()
    expect(lambda z: z @ torch.arange(6).double(), KSubset(twin, 3), 8, seed=0).backward()
    torch.testing.assert_close(logits.grad, twin.grad)
    assert seen[0].shape == (8, 6)


@pytest.mark.parametrize("estimator", [ScoreFunction(), ScoreFunction(LeaveOneOut()), GumbelScore()], ids=repr)
def test_a_black_box_may_write_on_its_input(estimator: Estimator) -> None:
    cost = np.arange(6.0)

    def vandal(z: Tensor) -> np.ndarray:
        found = z.numpy() @ cost
        z.zero_()
        return found

    logits, twin = randn(6).requires_grad_(), randn(6).requires_grad_()
    expect(vandal, KSubset(logits, 3), 8, grad=estimator, seed=0).backward()
    expect(lambda z: z.numpy() @ cost, KSubset(twin, 3), 8, grad=estimator, seed=0).backward()
    torch.testing.assert_close(logits.grad, twin.grad, rtol=0, atol=0)

    def renaming(chosen: Tensor) -> Tensor:
        return chosen.mul_(2).sum(-1)

    parts = ChunkedKSubset(InMemory(randn(9, 1), chunk_size=4), 3)
    found, wanted = (expect_chunked(f, parts, 8, seed=0) for f in (renaming, lambda chosen: 2 * chosen.sum(-1)))
    assert (found.positions == wanted.positions).all()
    assert (found.gradient == wanted.gradient).all()


@pytest.mark.parametrize("estimator", [ScoreFunction(make()) for make in BASELINES[:5]], ids=repr)
def test_rows_are_independent_of_each_other(estimator: Estimator) -> None:
    logits = randn(3, 5, 7).requires_grad_()
    subset = KSubset(logits, torch.tensor([2, 3, 0, 7, 4]))
    mean = expect(quadratic, subset, 6, grad=estimator, seed=0)
    assert mean.shape == (3, 5)
    mean.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 2:4] == 0).all()  # k = 0 and k = n: nothing to choose
    other = logits.detach().clone()
    other[1:] += 1
    moved = other.requires_grad_()
    expect(quadratic, KSubset(moved, subset.k), 6, grad=estimator, seed=0).sum().backward()
    torch.testing.assert_close(moved.grad[0], logits.grad[0])  # type: ignore[index]


@pytest.mark.parametrize("estimator", [*ESTIMATORS[:5], *ESTIMATORS[6:], adapted(), PerturbAndMap()], ids=repr)
def test_half_precision_is_that_of_its_numbers(estimator: Estimator) -> None:
    half = randn(6).half().requires_grad_()
    single = half.detach().float().requires_grad_()
    mean, same = (expect(quadratic, KSubset(leaf, 3), 64, grad=estimator, seed=0) for leaf in (half, single))
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, same)
    found, wanted = torch.autograd.grad(mean, half)[0], torch.autograd.grad(same, single)[0]
    assert found.dtype == torch.float16
    assert (found != 0).any()
    torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "estimator",
    [*ESTIMATORS[:5], *(e for e in ESTIMATORS[6:] if repr(e) != repr(GumbelSoftmax(0.5))), adapted(), PerturbAndMap()],
    ids=repr,
)
def test_widely_spread_logits_leave_no_choice(estimator: Estimator, dtype: torch.dtype) -> None:
    """No noise brings another subset up: f sees the mode, and estimators of the distribution have a gradient of 0."""
    leaf = (1e4 * torch.tensor([3.0, -2, 1, -1, 2, -3], dtype=dtype)).requires_grad_()
    subset = KSubset(leaf, 3)
    mean = expect(quadratic, subset, 8, grad=estimator, seed=0)
    torch.testing.assert_close(mean, quadratic(subset.mode))
    (found,) = torch.autograd.grad(mean, leaf)
    assert found.isfinite().all()
    if estimator.exact_samples and not isinstance(estimator, StraightThrough):
        assert (found.abs() < 1e-12).all()


def test_shared_logits_add_up_their_rows() -> None:
    logits = randn(5).requires_grad_()
    expect(quadratic, KSubset(logits, torch.tensor([1, 2])), 50, seed=0).sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (5,)


def test_a_table_says_what_each_is() -> None:
    rows = describe(ESTIMATORS)
    assert rows[0] == {
        "estimator": "ScoreFunction(NoBaseline())",
        "exact samples": "yes",
        "unbiased": "yes",
        "differentiable f": "not needed",
    }
    assert [row["unbiased"] for row in rows] == ["yes"] * 6 + ["no"] * 7
    needed = ["not needed"] * 4 + ["needed", "not needed"] + ["needed"] * 6 + ["not needed"]
    assert [row["differentiable f"] for row in rows] == needed


def test_without_a_gradient_only_the_mean_is_made() -> None:
    subset = KSubset(randn(6), 3)
    for estimator in (ScoreFunction(), ScoreFunction(Tangent())):
        assert not expect(lambda z: np.asarray(z).sum(-1), subset, 4, grad=estimator, seed=0).requires_grad


@pytest.mark.parametrize(
    ("f", "num_samples", "estimator", "message"),
    [
        (quadratic, 0, None, "num_samples: got 0"),
        (quadratic, 2.0, None, "num_samples: got 2.0"),
        (quadratic, 1, ScoreFunction(LeaveOneOut()), "num_samples: got 1, wanted at least 2: LeaveOneOut.. is made from"),
        (lambda z: z, 3, None, r"f: returned shape \(3, 6\)"),
        (lambda z: torch.tensor([0.0, 1.0, float("nan")]), 3, None, "f: returned nan for sample 2"),
        (lambda z: None, 3, None, "f: returned NoneType .* wanted a value for each draw"),
        (lambda z: ["low", "high", "low"], 3, None, "f: returned list"),
        (lambda z: z.sum(-1) * 1j, 3, None, "f: returned torch.complex128, wanted real numbers"),
        (quadratic, True, None, "num_samples: got True"),
        (quadratic, "3", None, "num_samples: got '3'"),
        (quadratic, 3, Simple, "grad: got <class .*Simple'>, wanted an estimator"),
        (quadratic, 3, "simple", "grad: got 'simple'"),
        (lambda z: np.asarray(z.detach()).sum(-1), 3, Simple(), "f: its values carry no gradient in z"),
        (lambda z: np.asarray(z.detach()).sum(-1), 3, ScoreFunction(Tangent()), "f: its values carry no gradient in z"),
        (lambda z: WEIGHT * z.detach().sum(-1), 3, ScoreFunction(Tangent()), "f: its values carry no gradient in z"),
        (quadratic, 3, ScoreFunction(Past(5)), r"n: got Past\(n=5, .* where a draw has 6 elements, wanted Past\(n=6\)"),
    ],
)
def test_bad_input(f, num_samples, estimator, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expect(f, KSubset(randn(6).requires_grad_(), 3), num_samples, grad=estimator, seed=0)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.5, "0"])
def test_seeds_that_are_no_integers_of_64_bits(seed) -> None:
    subset = KSubset(randn(6), 3)
    for estimator in (None, GumbelScore(), PerturbAndMap()):
        with pytest.raises(ValueError, match=r"seed: got .* wanted an integer of 64 bits"):
            expect(quadratic, subset, 2, grad=estimator, seed=seed)
    with pytest.raises(ValueError, match="seed: got"):
        subset.sample(seed=seed)


@pytest.mark.parametrize("estimator", [None, GumbelScore(), PerturbAndMap()])
def test_integers_of_numpy(estimator: Estimator | None) -> None:
    subset = KSubset(randn(6), np.int64(3))
    found = expect(quadratic, subset, np.int64(8), grad=estimator, seed=np.int64(1))
    torch.testing.assert_close(found, expect(quadratic, subset, 8, grad=estimator, seed=1))


def test_bad_settings() -> None:
    for make, message in (
        (lambda: GumbelSoftmax(0.0), "tau: got 0"),
        (lambda: NCPSS(-1.0), "tau: got -1"),
        (lambda: FixedTarget(0.0), "strength: got 0"),
        (lambda: AdaptiveTarget(momentum=1.0), "momentum: got 1"),
        (lambda: Ridge(folds=1), "folds: got 1"),
        (lambda: Past(5, rate=0.0), "rate: got 0"),
        (lambda: IMLE(3.0), "target: got 3.0"),
        (lambda: IMLE(noise=SumOfGamma), "noise: got the class SumOfGamma"),
        (lambda: PerturbAndMap(noise=0.2), "noise: got 0.2"),
        (lambda: PerturbAndMap(Identity), "strategy: got the class Identity"),
        (lambda: ScoreFunction(Ridge), "baseline: got <class"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="subset: got Tensor"):
        expect(quadratic, randn(4), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row"):
        expect(lambda z: z.sum(-1) / 0, KSubset(randn(2, 6), 3), 2)
