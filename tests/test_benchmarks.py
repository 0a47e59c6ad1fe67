"""What benchmarks are made of: that it runs, and says of known cases what is known."""

import pytest

from benchmarks import oracle_gradients
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
