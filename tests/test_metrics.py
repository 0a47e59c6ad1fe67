"""Metrics against closed forms and against the definitions written as loops."""

import pytest
import torch

from distset.metrics import estimator_error, jaccard


def test_jaccard_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    chosen, truth = (torch.rand(2, 50, 6, generator=generator) < 0.3 for _ in range(2))
    got = jaccard(chosen, truth).flatten()
    for value, a, b in zip(got, chosen.flatten(0, 1), truth.flatten(0, 1), strict=True):
        a, b = set(a.nonzero().flatten().tolist()), set(b.nonzero().flatten().tolist())
        assert float(value) == pytest.approx(len(a & b) / len(a | b) if a | b else 1.0)


def test_jaccard_of_empty_subsets():
    none, one = torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, False, False])
    assert jaccard(none, none) == 1
    assert jaccard(none, one) == 0


def test_jaccard_refuses_what_is_no_subset():
    with pytest.raises(ValueError, match=r"chosen: got torch\.float32, wanted torch\.bool"):
        jaccard(torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(4,\)"):
        jaccard(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))


def bias_by_loop(samples: torch.Tensor, truth: torch.Tensor) -> float:
    off = samples - truth
    products = [float(off[s] @ off[t]) for s in range(len(off)) for t in range(len(off)) if s != t]
    return sum(products) / len(products)


def jackknife_by_loop(statistic, samples: torch.Tensor) -> float:
    n = len(samples)
    left = torch.tensor([statistic(torch.cat([samples[:s], samples[s + 1 :]])) for s in range(n)], dtype=torch.float64)
    return float(((n - 1) / n * (left - left.mean()).square().sum()).sqrt())


def test_the_figures_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    samples, truth = torch.randn(9, 4, generator=generator).double(), torch.randn(4, generator=generator).double()
    got = estimator_error(samples.view(9, 2, 2), truth.view(2, 2))
    exact = {"rel": 1e-10}
    assert got.bias_squared.value == pytest.approx(bias_by_loop(samples, truth), **exact)
    assert got.bias_squared.error == pytest.approx(jackknife_by_loop(lambda s: bias_by_loop(s, truth), samples), **exact)
    assert got.variance.value == pytest.approx(float(samples.var(0).sum()), **exact)
    assert got.variance.error == pytest.approx(jackknife_by_loop(lambda s: float(s.var(0).sum()), samples), **exact)
    squares = (samples - truth).square().sum(-1)
    assert got.mean_squared.value == pytest.approx(float(squares.mean()), **exact)
    assert got.mean_squared.error == pytest.approx(float(squares.std() / 3), **exact)
    cosines = [float(s @ truth / s.norm() / truth.norm()) for s in samples]
    assert got.cosine.value == pytest.approx(1 - sum(cosines) / 9, **exact)
    assert got.mean_squared.value == pytest.approx(got.bias_squared.value + got.variance.value, **exact)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_over_many_repetitions_the_figures_have_no_bias_and_their_errors_are_right(shift):
    """Gaussian estimator of known bias: |bias|² = 4 shift², variance = 4 · 0.25."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.ones(4)
    draws = truth + shift + 0.5 * torch.randn(2000, 20, 4, generator=generator)
    errors = [estimator_error(samples, truth) for samples in draws]
    for name, wanted in (("bias_squared", 4 * shift**2), ("variance", 1.0)):
        values = torch.tensor([getattr(e, name).value for e in errors])
        stated = torch.tensor([getattr(e, name).error for e in errors])
        spread = values.std()
        assert abs(values.mean() - wanted) < 4 * spread / 2000**0.5
        # Without bias the statistic's first-order term vanishes, and a jackknife counts the second one twice.
        degenerate = name == "bias_squared" and shift == 0
        assert stated.square().mean().sqrt() / spread == pytest.approx(2**0.5 if degenerate else 1.0, rel=0.1)


@pytest.mark.parametrize(
    ("samples", "truth", "words"),
    [
        (torch.zeros(5, 3), torch.zeros(4), r"samples: got shape \(5, 3\)"),
        (torch.zeros(2, 3), torch.zeros(3), "samples: got 2 draws, wanted at least 3"),
        (torch.full((5, 3), torch.nan), torch.zeros(3), "not finite"),
    ],
)
def test_bad_samples(samples, truth, words):
    with pytest.raises(ValueError, match=words):
        estimator_error(samples, truth)
