"""Every solver keeps its word, and `check_solver` catches those that do not."""

import numpy as np
import pytest

from distset.solvers import FunctionSolver, GraphMatching, ShortestPath, Solver
from distset.solvers.check import check_solver
from tests.reference.test_solvers import every_solver


def costs(*shape, batch=20, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 1, size=(batch, *shape))


@pytest.mark.parametrize(("solver", "shape"), every_solver(), ids=lambda value: str(value))
def test_every_solver_keeps_its_word(solver, shape):
    exact = type(solver) is not GraphMatching
    errors = check_solver(solver, costs(*shape), exact=exact)
    assert max(errors) < (1e-9 if exact else 0.05)


def cheapest(w):
    return np.eye(w.shape[1])[w.argmin(1)]


def test_bare_functions_and_walls():
    assert max(check_solver(cheapest, costs(5) - 0.5)) == 0
    assert max(check_solver(FunctionSolver(cheapest, hyperplane=1.0), costs(5) - 0.5)) < 1e-15
    walls = np.zeros((4, 5), bool)
    walls[1, 1:4] = True
    assert max(check_solver(ShortestPath(walls=walls), costs(4, 5))) < 1e-15


class Broken(Solver):
    def __init__(self, fn, **declared):
        self.fn = fn
        vars(self).update(declared)
        self.calls = 0

    def solve(self, w):
        self.calls += 1
        return self.fn(w, self.calls)

    def mask_for(self, instance):
        return vars(self).get("mask")


def overwrite(w, _):
    w[:] = 0
    return cheapest(w)


@pytest.mark.parametrize(
    ("solver", "broken"),
    [
        (Broken(lambda w, call: cheapest(np.roll(w, call, 1))), "not deterministic: instance 0"),
        (Broken(lambda w, _: cheapest(w - w[:1] * (np.arange(5) == 2))), "when the batch is in another order"),
        (Broken(lambda w, _: cheapest(w), sense="max"), "another instance's solution is better .* sense='max'"),
        (Broken(lambda w, _: cheapest(-w)), "another instance's solution is better .* sense='min'"),
        (Broken(overwrite), "writes on the costs"),
        (Broken(lambda w, _: cheapest(w), mask=np.arange(5) > 0), "other than 0 outside of the mask"),
        (Broken(lambda w, _: w[:, :2]), r"returned solutions of shape \(20, 2\)"),
        (FunctionSolver(lambda w: 1.0 - (w > 0), hyperplane=1.0), "no hyperplane with this normal"),
        (Broken(lambda w, _: cheapest(w) / 0), "not finite; the solver is at fault"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_broken_promises_are_named(solver, broken):
    with pytest.raises(AssertionError, match=broken):
        check_solver(solver, costs(5) - 0.5)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"mask": np.ones(4, bool)}, r"mask: that of .* got shape \(4,\), wanted \(5,\)"),
        ({"mask": np.ones(5, int)}, "mask: that of .* got torch.int64, wanted torch.bool"),
        ({"hyperplane": np.ones(4)}, r"hyperplane: that of .* got shape \(4,\), wanted \(5,\)"),
    ],
)
def test_a_declaration_that_does_not_fit_is_no_broken_promise(declared, message):
    with pytest.raises(ValueError, match=message):
        check_solver(FunctionSolver(cheapest, **declared), costs(5))


def test_a_shortest_path_has_no_hyperplane():
    solver = ShortestPath()
    solver.hyperplane = 1.0
    with pytest.raises(AssertionError, match="no hyperplane with this normal"):
        check_solver(solver, costs(6, 6) ** 3)


def test_a_solver_that_looks_at_the_scale():
    def timid(w):  # takes the second best where the best is not clearly better
        order = np.sort(w, 1)
        return np.eye(5)[np.where(order[:, 1] - order[:, 0] < 1e-2, w.argsort(1)[:, 1], w.argmin(1))]

    instances = costs(5)
    instances[:, 0] = 0.0  # clear, but not when scaled down
    with pytest.raises(AssertionError, match=r"scale_free is declared, but scaled costs"):
        check_solver(timid, instances)
    with pytest.raises(AssertionError, match="costs moved along the hyperplane's normal have another solution"):
        check_solver(FunctionSolver(lambda w: cheapest(w * np.sign(w.sum(1, keepdims=True))), hyperplane=1.0), instances)


def test_a_solver_that_only_the_projection_misleads():
    def shy_of_zero_mean(w):  # scaled costs and costs moved along the normal it gets right, standardised ones wrong
        standardised = abs(w.mean(1, keepdims=True)) < 1e-9
        return cheapest(np.where(standardised, -w, w))

    solver = FunctionSolver(shy_of_zero_mean, hyperplane=1.0)
    with pytest.raises(AssertionError, match=r"y\(P\(w\)\) is not y\(w\): worse by 0\.\d+; declare another projection"):
        check_solver(solver, costs(5))
    errors = check_solver(solver, costs(5), exact=False)
    assert errors.projection > 0.1
    assert max(errors[:3]) < 1e-15


def test_one_instance_is_too_few():
    with pytest.raises(ValueError, match="costs: got 1 instances, wanted a batch"):
        check_solver(cheapest, costs(5, batch=1))
