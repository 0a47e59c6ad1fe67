"""What benchmarks are made of: that it runs, and says of known cases what is known."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from small_subsets import subsets

from benchmarks import estimators, normalizer, oracle_gradients, sampling, set_memory
from benchmarks.memory import peak_bytes, status_mib
from distset.fixed_point import Implicit, OneStep
from distset.gains import Drawn, Enumerated, Smoothed
from distset.krylov import Dense


def test_published_gradients_are_those_of_one_step():
    case = oracle_gradients.problem(0, 8.0)
    published = oracle_gradients.gradient(case, oracle_gradients.HardEnumerated(), Implicit(Dense()))
    one_step = oracle_gradients.gradient(case, Enumerated(), OneStep())
    assert oracle_gradients.relative(published, one_step) < 1e-9
    assert oracle_gradients.relative(published, oracle_gradients.gradient(case, Enumerated(), Implicit(Dense()))) > 0.01


@pytest.mark.parametrize(
    ("estimator", "bar"), [(Enumerated(), 1e-9), (Drawn(200, "differences"), 0.05), (Smoothed(200), 0.05)]
)
def test_the_slope_of_an_estimator_joins_exact_values(estimator, bar):
    case = oracle_gradients.problem(0, 4.0)
    exact = oracle_gradients.gradient(case, Enumerated(), Implicit(Dense()))
    mixed = oracle_gradients.gradient(case, oracle_gradients.SlopeOf(estimator, 0), Implicit(Dense()))
    assert oracle_gradients.relative(mixed, exact) < bar


def test_what_learns_has_learned_before_it_is_measured():
    logits, costs = estimators.costs(0)
    past = estimators.estimators()["  slope of past steps"]
    f, right = costs["linear"], estimators.truth(logits, costs["linear"])
    found = estimators.gradients(past, logits, f, rows=20, samples=32, seed=0)
    plain = estimators.gradients(estimators.estimators()["  leave-one-out"], logits, f, rows=20, samples=32, seed=0)
    assert (found - right).norm() < 0.1 * (plain - right).norm()


def test_the_bars_of_sampling_are_of_their_own_rows():
    rows = [dict(zip(("batch", "n", "k", "samples"), case)) for case in sampling.CASES + sampling.LONG]
    rows = [row | {"ratio": float(number)} for number, row in enumerate(rows)]
    assert [value for value, _, _ in sampling.bars(rows).values()] == [0.0, 5.0]


def test_memory_is_that_of_this_process_alone():
    """A child's peak does not begin with its parent's, as its ``ru_maxrss`` does."""
    ballast = np.ones(2**27, dtype=np.uint8)  # 128 MiB
    code = "from benchmarks.memory import status_mib; print(status_mib('VmRSS'), status_mib('VmHWM'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, alone = map(float, done.stdout.split())
    assert now <= alone < status_mib("VmHWM")
    assert len(ballast) / 2**20 < status_mib("VmRSS")
    with pytest.raises(RuntimeError, match="does not report VmNothing"):
        status_mib("VmNothing")


def test_the_peak_of_a_step_is_what_its_tensors_take_at_one_time():
    """Of four tensors of 4 MiB at most two are alive; what was there before does not count."""
    before = torch.ones(2**20)

    def step():
        first = before + 1
        second = first * 2
        del first
        return float((second + 1).sum()) + float((before * 3).sum())

    assert peak_bytes(step) == pytest.approx(2 * 2**22, rel=0.01)


@pytest.mark.parametrize("k", [1, 4, 7])
def test_the_truth_about_normalisers_is_that_of_all_subsets(k):
    logits = normalizer.standard_normal(8)
    z = subsets(8, k)
    scores = z @ logits.double()
    truth = normalizer.extended(logits, k)
    assert truth.value == pytest.approx(float(scores.logsumexp(0)), rel=1e-14)
    np.testing.assert_allclose(truth.pi, scores.softmax(0) @ z, rtol=0, atol=1e-15)


def test_autograd_keeps_what_a_step_needs_on_the_way_back():
    weight = torch.nn.Parameter(torch.ones(2**20))
    row = set_memory.measured(torch.nn.ParameterList([weight]), lambda: (weight * torch.ones(2**20)).exp().sum().backward())
    assert row["kept MiB"] == pytest.approx(8, rel=0.01)  # the factor of the weight, and the exponentials
    assert row["peak MiB"] >= 8


def test_memory_that_grows_with_the_context_misses_its_bars():
    points = [{"model": model, "gradient": grad, "peak MiB": 1.0 if grad == "sampled" else 4.0}
              for model in (*set_memory.MERGEABLE, *set_memory.WHOLE) for grad in ("sampled", "full")]  # fmt: skip

    def missed(growth: float) -> list[str]:
        pixels = [{"model": "sse", "gradient": grad, "context": size, "peak MiB": rate * size + base}
                  for grad, rate, base in (("sampled", growth, 1.0), ("full", 0.01, 1.0))
                  for size in set_memory.CONTEXTS]  # fmt: skip
        words = [{"vectors": vectors, "gradient": grad, "words": size, "peak MiB": rate * size + base,
                  "kept MiB": rate * size + 0.1}
                 for vectors, table in (("learnt", 0.5), ("held", 0.1))
                 for grad, rate, base in (("sampled", growth, table), ("full", 0.002, table))
                 for size in set_memory.WORDS]  # fmt: skip
        bars = set_memory.bars_of(points, pixels, words)
        return [name for name, (value, _, wanted) in bars.items() if value > wanted]

    assert missed(0.0) == []
    assert len(missed(0.01)) == 7
