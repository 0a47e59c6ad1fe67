"""What is particular to one estimator: its closed form, what it learns, what it costs where it does not help."""

import pytest
import torch
from small_subsets import quadratic, randn, true_gradient
from torch import Tensor

from distset.expect import (
    IMLE,
    NCPSS,
    AdaptiveTarget,
    FixedTarget,
    GumbelSoftmax,
    LeaveOneOut,
    Past,
    Ridge,
    ScoreFunction,
    Simple,
    expect,
)
from distset.expect.baselines import Baseline
from distset.expect.rivals import calibrating_tilt
from distset.noise import Gumbel
from distset.subsets import KSubset, relaxed_top_k
from distset.subsets.gumbel import top_k


def test_simple_is_unbiased_for_affine_functions() -> None:
    logits = randn(6).requires_grad_()
    cost = randn(6, seed=1)
    expect(lambda z: z @ cost + 3, KSubset(logits, 2), 1, grad=Simple(), seed=0).backward()
    torch.testing.assert_close(logits.grad, true_gradient(logits.detach(), 2, lambda z: z @ cost))


def test_leave_one_out_is_the_sample_covariance() -> None:
    logits = randn(10).requires_grad_()
    subset = KSubset(logits, 4)
    mean = expect(quadratic, subset, 16, grad=ScoreFunction(LeaveOneOut()), seed=3)
    mean.backward()
    z = subset.sample((16,), seed=3)
    f = quadratic(z)
    torch.testing.assert_close(mean, f.mean())
    torch.testing.assert_close(logits.grad, ((f - f.mean()).unsqueeze(-1) * (z - z.mean(0))).sum(0) / 15)


def parity(z: Tensor) -> Tensor:
    """Of the chosen positions: no affine function explains it."""
    return (z @ torch.tensor([1.0, 2, 4, 7, 11, 16, 22, 29]).to(z)).remainder(2) * 2 - 1 + 10


def spread(baseline: Baseline, logits: Tensor, num_samples: int) -> float:
    """The variance of the gradient of the mean parity of 4 of 8."""
    leaf = logits.double().expand(4000, 8).clone().requires_grad_()
    expect(parity, KSubset(leaf, 4), num_samples, grad=ScoreFunction(baseline), seed=0).sum().backward()
    assert leaf.grad is not None
    return float(leaf.grad.var(0).sum())


@pytest.mark.parametrize("num_samples", [2, 5, 8, 12, 16, 20, 32])
def test_a_useless_surrogate_hurts_little(num_samples: int) -> None:
    """A ratio's standard error is .004 at most."""
    past = Past(8)
    past.slope += randn(8)
    for baseline in (Ridge(), past):
        assert spread(baseline, torch.zeros(8), num_samples) < 1.05 * spread(LeaveOneOut(), torch.zeros(8), num_samples)


def test_copies_of_a_subset_are_no_evidence() -> None:
    """Where few subsets make up most draws; with copies left in, their leave-one-out error lets the ratio be 1.19."""
    logits = 2 * randn(8, seed=3)
    assert spread(Ridge(), logits, 20) < 1.12 * spread(LeaveOneOut(), logits, 20)


def test_a_ridge_of_one_subset_again_and_again() -> None:
    logits = torch.tensor([50.0, 40.0, -40.0, -50.0], dtype=torch.float64, requires_grad=True)
    expect(quadratic, KSubset(logits, 2), 16, grad=ScoreFunction(Ridge()), seed=0).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(4).double(), atol=1e-12, rtol=0)


def test_the_past_is_learned_saved_and_useful() -> None:
    past, cost = Past(30, rate=0.3), randn(30, seed=1)

    def error(baseline: Baseline) -> Tensor:
        leaf = randn(30).requires_grad_()
        for step in range(100):
            expect(lambda z: z @ cost, KSubset(leaf, 10), 8, grad=ScoreFunction(baseline), seed=step).backward()
        leaf.grad = None
        expect(lambda z: z @ cost, KSubset(leaf, 10), 8, grad=ScoreFunction(baseline), seed=1000).backward()
        pi = KSubset(leaf, 10)
        return (leaf.grad - pi.covariance_product(cost)).norm()

    assert error(past) < 0.2 * error(LeaveOneOut())
    other = Past(30, rate=0.3)
    other.load_state_dict(past.state_dict())
    assert (other.slope == past.slope).all()


def test_relaxed_gradients_are_those_of_the_relaxation() -> None:
    for hard in (False, True):
        logits = randn(5).requires_grad_()
        expect(quadratic, KSubset(logits, 2), 7, grad=GumbelSoftmax(0.7, hard=hard), seed=4).backward()
        twin = randn(5).requires_grad_()
        noise = Gumbel().sample((7, 5), torch.Generator().manual_seed(4), torch.float64)
        z = relaxed_top_k(twin + noise, 2, 0.7)
        slope_at = top_k((twin + noise).detach(), 2) if hard else z.detach()
        slope_at = slope_at.requires_grad_()
        (slope,) = torch.autograd.grad(quadratic(slope_at).mean(0), slope_at)
        (z * slope).sum().backward()
        torch.testing.assert_close(logits.grad, twin.grad)


def test_imle_is_a_difference_of_solutions() -> None:
    logits, cost = randn(6).requires_grad_(), randn(6, seed=1)
    expect(lambda z: z @ cost, KSubset(logits, 3), 5, grad=IMLE(FixedTarget(2.0), noise=Gumbel()), seed=4).backward()
    keys = logits.detach() + Gumbel().sample((5, 6), torch.Generator().manual_seed(4), torch.float64)
    expected = (top_k(keys, 3) - top_k(keys - 2 * cost, 3)).mean(0) / 2
    torch.testing.assert_close(logits.grad, expected)


def test_the_adaptive_target_finds_its_strength() -> None:
    target, cost = AdaptiveTarget(step=0.02), randn(20, seed=1)
    for step in range(200):
        logits = randn(20).requires_grad_()
        expect(lambda z: z @ cost, KSubset(logits, 5), 16, grad=IMLE(target), seed=step).backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
    assert 0.3 < target.found < 3
    assert target.beta > 0


def test_the_calibrating_tilt_and_its_derivative() -> None:
    logits = randn(3, 8).requires_grad_()
    k = torch.tensor([1, 4, 7])
    tilt = calibrating_tilt(logits, k)
    torch.testing.assert_close(torch.sigmoid(logits + tilt.unsqueeze(-1)).sum(-1), k.double(), atol=1e-3, rtol=0)
    p = torch.sigmoid(logits + tilt.unsqueeze(-1)).detach()
    (slope,) = torch.autograd.grad(tilt.sum(), logits)
    torch.testing.assert_close(slope, -(p * (1 - p)) / (p * (1 - p)).sum(-1, keepdim=True), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", [[1e16] * 4 + [0.0], [3.0, 2.0, -3e38, -3e38, -3e38]])
def test_the_tilt_is_calibrated_at_ties_of_large_logits(logits: list[float], dtype: torch.dtype) -> None:
    leaf, sizes = torch.tensor(logits, dtype=dtype, requires_grad=True), []

    def size(z: Tensor) -> Tensor:
        sizes.append(z.detach().sum(-1))
        return z @ torch.arange(5.0).to(z)

    expect(size, KSubset(leaf, 3), 4000, grad=NCPSS(), seed=0).backward()
    assert abs(float(sizes[0].mean()) - 3) < 5 * float(sizes[0].std()) / 4000**0.5
    assert leaf.grad is not None
    assert (leaf.grad[-1] != 0) == (logits[-1] != 0)
