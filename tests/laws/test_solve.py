"""Strategies of `solve` against their closed forms, Theorem 1, and everything that can come in wrong."""

import itertools

import numpy as np
import pytest
import torch

from distset.noise import Gumbel, Normal, SumOfGamma, TwoPoint, Uniform
from distset.projections import Plane, project_mean, project_norm, project_std
from distset.solve import (
    IMLE,
    Blackbox,
    Identity,
    Informed,
    Perturbed,
    solve,
    solve_with_status,
)
from distset.solvers import FunctionSolver, Ranking, Solved, Solver, Status, TensorSolver, TimeLimit, TopK

F64 = torch.float64
STRATEGIES = [
    Identity(),
    Identity(projection="none", margin=Uniform(0.2)),
    Blackbox(2.0),
    IMLE(SumOfGamma(2), lam=3.0),
    Perturbed(Normal(0.5), samples=5),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


class Polytope(Solver):
    """The best of the given vertices ``(V, n)``, by looking at all of them; counts its calls."""

    def __init__(self, vertices, sense="min", hyperplane=None):
        self.vertices, self.sense, self.hyperplane, self.calls = np.asarray(vertices, float), sense, hyperplane, 0

    def solve(self, costs):
        self.calls += 1
        values = costs @ self.vertices.T
        return self.vertices[values.argmin(1) if self.sense == "min" else values.argmax(1)].astype(costs.dtype)


def cube(n=4):
    return np.array(list(itertools.product((0, 1), repeat=n)))[1:]


def subsets(n=5, k=2):
    return np.array([v for v in itertools.product((0, 1), repeat=n) if sum(v) == k])


def gradient(cost, solver, strategy, g, **options):
    cost = cost.clone().requires_grad_()
    (grad,) = torch.autograd.grad(solve(cost, solver, grad=strategy, **options), cost, g)
    return grad


# Closed forms


@pytest.mark.parametrize("sense", ["min", "max"])
@pytest.mark.parametrize(
    ("projection", "formula"),
    [
        ("none", lambda w: w),
        ("mean", project_mean),
        ("norm", project_norm),
        ("std", project_std),
        ("auto", project_std),
        (Plane(torch.ones(5)), project_mean),
    ],
    ids=["none", "mean", "norm", "std", "auto", "plane"],
)
def test_identity_is_minus_the_gradient_behind_the_projection(sense, projection, formula):
    solver, w, g = Polytope(subsets(), sense, hyperplane=1.0), randn(6, 5), randn(6, 5, seed=1)
    sign = -1 if sense == "min" else 1
    leaf = w.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(formula(leaf), leaf, sign * g)
    assert torch.equal(gradient(w, solver, Identity(projection), g), wanted)
    best = Polytope(subsets(), sense).solve(w.numpy())
    assert np.array_equal(solve(w, solver, grad=Identity(projection)).numpy(), best)


@pytest.mark.parametrize("sense", ["min", "max"])
def test_blackbox_is_the_published_difference(sense):
    solver, w, g, lam = Polytope(cube(), sense), randn(50, 4), randn(50, 4, seed=1), 2.0
    s = 1 if sense == "min" else -1
    y = solver.solve(w.numpy())
    wanted = s * (solver.solve((w + s * lam * g).numpy()) - y) / lam
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(gradient(w, solver, Blackbox(lam), g).numpy(), wanted, atol=1e-15)


def test_imle_is_the_published_difference_over_lam():
    # Niepert et al., algorithm 1, for scores: z(theta + e) - z(theta - lam g + e), with the same e.
    solver, w, g, lam = TopK(2), randn(50, 5), randn(50, 5, seed=1), 3.0
    for s, score in ((1, w), (-1, -w)):
        solver = TopK(2) if s == 1 else Polytope(subsets())
        strategy = IMLE(SumOfGamma(2, terms=10), lam)
        e = gradient_noise(SumOfGamma(2, terms=10), 50, 5, seed=7)
        pick = TopK(2).solve_tensor
        sample = pick(w + e)
        wanted = s * (sample - pick(w + e - lam * g)) / lam
        assert wanted.abs().max() > 0
        assert torch.equal(solve(score, solver, grad=strategy, seed=7), sample)
        torch.testing.assert_close(gradient(score, solver, strategy, g, seed=7), wanted, rtol=0, atol=1e-15)


def gradient_noise(noise, *shape, seed):
    from distset.seeds import generator_for

    return noise.sample(shape, generator_for(seed, "noise"), F64)


@pytest.mark.parametrize("sense", ["min", "max"])
def test_perturbed_with_gumbel_noise_is_softmax(sense):
    # One-hot structures under Gumbel noise: E y = softmax, whose Jacobian is known.
    s = 1 if sense == "max" else -1
    theta, g, repeats = randn(4), randn(4, seed=1), 4000
    p = torch.softmax(theta, 0)
    wanted = s * (p * g - p * (p @ g))
    w = (s * theta).expand(repeats, 4).clone().requires_grad_()
    y = solve(w, Polytope(np.eye(4), sense), grad=Perturbed(Gumbel(), samples=20), seed=0)
    (grads,) = torch.autograd.grad(y, w, g.expand(repeats, 4))
    for estimate, truth in ((y.detach(), p), (grads, wanted)):
        standard_error = estimate.std(0) / repeats**0.5
        assert ((estimate.mean(0) - truth).abs() < 4 * standard_error).all()


def test_perturbed_with_normal_noise_is_probit():
    theta, sigma, repeats = torch.tensor([0.3, -0.1], dtype=F64), 0.5, 4000
    normal = torch.distributions.Normal(0.0, 2**0.5 * sigma)
    density = normal.log_prob(theta[0] - theta[1]).exp()
    w = theta.expand(repeats, 2).clone().requires_grad_()
    y = solve(w, TopK(1), grad=Perturbed(Normal(sigma), samples=20), seed=0)
    (grads,) = torch.autograd.grad(y[:, 0].sum(), w)
    error = (grads.mean(0) - density * torch.tensor([1.0, -1.0])).abs()
    assert (error < 4 * grads.std(0) / repeats**0.5).all()


# Theorem 1


@pytest.mark.parametrize("projection", ["none", "norm", "mean", "std"])
@pytest.mark.parametrize("sense", ["min", "max"])
def test_theorem_1(projection, sense):
    """Descent on the cost by Identity never worsens the linearised loss; where it changes a solution it improves it, and
    where a better solution exists it finds one."""
    found = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        vertices = rng.normal(size=(15, 4))
        if projection in ("mean", "std"):
            vertices -= vertices.mean(1, keepdims=True)
        solver = Polytope(vertices, sense, hyperplane=1.0 if projection in ("mean", "std") else None)
        g = torch.from_numpy(rng.normal(size=4))
        w = torch.from_numpy(rng.normal(size=(20, 4)))
        w = (2 * project_std(w)).requires_grad_()  # not so close to 0 that a step turns the cost around
        losses = []
        for _ in range(400):
            loss = solve(w, solver, grad=Identity(projection)) @ g
            losses.append(loss.detach())
            (grad,) = torch.autograd.grad(loss.sum(), w)
            w = (w.detach() - 0.1 * grad).requires_grad_()
        path = torch.stack(losses)
        assert (path.diff(dim=0) <= 1e-12).all()
        improvable = path[0] > float((vertices @ g.numpy()).min()) + 0.2
        assert (path[-1] < path[0])[improvable].all()
        found += int(improvable.sum())
    assert found > 40


# Solver calls, margins, seeds


@pytest.mark.parametrize(
    ("strategy", "forward", "both"),
    [(Identity(), 1, 1), (Blackbox(1.0), 1, 2), (IMLE(Gumbel()), 1, 2), (Perturbed(Normal(1.0), samples=9), 1, 1)],
    ids=str,
)
def test_solver_calls_a_step(strategy, forward, both):
    solver, w = Polytope(cube()), randn(8, 4).requires_grad_()
    y = solve(w, solver, grad=strategy)
    assert solver.calls == forward
    y.sum().backward()
    assert solver.calls == both


@pytest.mark.parametrize("sense", ["min", "max"])
def test_margins_come_before_the_projection(sense):
    seen = []
    spy = FunctionSolver(lambda w: seen.append(w) or subsets()[:1].repeat(len(w), 0), sense=sense, hyperplane=1.0)
    w, truth = randn(3, 5).requires_grad_(), torch.from_numpy(subsets()[[0, 4, 8]]).to(F64)
    solve(w, spy, grad=Identity("std", TwoPoint(0.4)), seed=5)
    wanted = project_std(w + gradient_noise(TwoPoint(0.4), 3, 5, seed=5))
    torch.testing.assert_close(torch.from_numpy(seen[-1]), wanted.detach())
    solve(w, spy, grad=Identity("std", Informed(0.4)), truth=truth)
    worse = 0.4 * truth - 0.2 if sense == "min" else 0.2 - 0.4 * truth
    torch.testing.assert_close(torch.from_numpy(seen[-1]), project_std(w + worse).detach())
    for evaluation in (w.detach(), w):
        with torch.no_grad():
            solve(evaluation, spy, grad=Identity("std", TwoPoint(0.4)))
        torch.testing.assert_close(torch.from_numpy(seen[-1]), project_std(w).detach())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_seed_names_the_step(strategy):
    w, g = randn(40, 5), randn(40, 5, seed=1)
    one, same, other = (gradient(w, TopK(2), strategy, g, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert isinstance(strategy, (Identity, Blackbox)) or not torch.equal(one, other)


def test_noise_without_a_seed_follows_torch():
    w, strategy = randn(40, 5), IMLE(Gumbel())
    torch.manual_seed(0)
    first, second = solve(w, TopK(2), grad=strategy), solve(w, TopK(2), grad=strategy)
    torch.manual_seed(0)
    assert torch.equal(first, solve(w, TopK(2), grad=strategy))
    assert not torch.equal(first, second)


def test_a_domain_of_nonnegative_costs_is_kept():
    lowest = []

    def cheapest(w):
        lowest.append(w.min())
        return np.eye(w.shape[1])[w.argmin(1)]

    solver = FunctionSolver(cheapest, nonnegative=True)
    w, g = randn(20, 4).abs().requires_grad_(), randn(20, 4, seed=1)
    for strategy in (Identity(margin=TwoPoint(5.0)), Blackbox(10.0), IMLE(Gumbel()), Perturbed(Normal(3.0))):
        (grad,) = torch.autograd.grad(solve(w, solver, grad=strategy), w, g)
        assert grad.isfinite().all()
    assert min(lowest) == 0


def test_masked_entries_are_never_looked_at():
    class OffDiagonal(Polytope):
        instance_ndim = 2

        def solve(self, costs):
            assert (costs.diagonal(axis1=1, axis2=2) == 0).all()
            return super().solve(costs.reshape(len(costs), -1)).reshape(costs.shape)

        def mask_for(self, instance):
            return ~np.eye(instance[0], dtype=bool)

    swap, turn = np.eye(3)[[1, 0, 2]], np.eye(3)[[1, 2, 0]]
    solver = OffDiagonal([swap.reshape(-1) * ~np.eye(3, dtype=bool).reshape(-1), turn.reshape(-1), turn.T.reshape(-1)])
    w = randn(10, 3, 3)
    other = w + 100 * torch.eye(3)
    for strategy in (Identity("norm"), Blackbox(2.0)):
        g = randn(10, 3, 3, seed=1)
        grad = gradient(w, solver, strategy, g)
        torch.testing.assert_close(grad, gradient(other, solver, strategy, g))
        assert (grad.diagonal(dim1=1, dim2=2) == 0).all()


# Shapes and types


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
def test_any_batch_shape(strategy, batch):
    w = randn(*batch, 5).requires_grad_()
    y = solve(w, TopK(2), grad=strategy, seed=0)
    assert y.shape == w.shape
    assert torch.allclose(y.sum(-1), torch.tensor(2.0, dtype=F64))
    y.sum().backward()
    assert w.grad.shape == w.shape
    assert w.grad.isfinite().all()


def test_batch_dimensions_are_only_a_shape():
    w = randn(2, 3, 5)
    flat = solve(w.reshape(6, 5), Ranking())
    assert torch.equal(solve(w, Ranking()).reshape(6, 5), flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_precisions(dtype, strategy):
    w = randn(6, 5).to(dtype).requires_grad_()
    y = solve(w, TopK(2), grad=strategy, seed=0)
    assert y.dtype == (torch.float64 if dtype == F64 else torch.float32)
    y[:, 0].sum().backward()
    assert w.grad.dtype == dtype


def test_a_bare_function_minimises_all_dimensions_but_the_first():
    def cheapest_cell(w):
        flat = w.reshape(len(w), -1)
        return np.eye(flat.shape[1])[flat.argmin(1)].reshape(w.shape)

    w = randn(3, 2, 4).requires_grad_()
    y = solve(w, cheapest_cell, grad=Identity("none"))
    assert torch.equal((y * w).sum((1, 2)), w.amin((1, 2)))
    y.sum().backward()
    assert torch.equal(w.grad, -torch.ones_like(w))


# Time limits


class Slow(Solver):
    """Pretends that instances with a negative first cost take too long (and, below -1, find nothing)."""

    def __init__(self, then):
        self.limit = TimeLimit(0.5, then)

    def solve(self, costs):
        return self.solve_status(costs).solutions

    def solve_status(self, costs):
        status = np.where(costs[:, 0] < -1, Status.NOTHING, np.where(costs[:, 0] < 0, Status.BEST_FOUND, Status.SOLVED))
        solutions = np.eye(costs.shape[1])[costs.argmin(1)]
        solutions[status == Status.NOTHING] = np.nan
        return Solved(solutions, status.astype(np.int8))


LATE = torch.tensor([[1.0, 2.0], [-0.5, 1.0], [-2.0, 1.0]], dtype=F64)


def test_limit_fail():
    with pytest.raises(TimeoutError, match=r"2 of 3 instances were not solved within 0.5 s .*instance 1, a feasible"):
        solve(LATE, Slow("fail"), grad=Blackbox(1.0))


def test_limit_best():
    found = solve_with_status(LATE[:2], Slow("best"), grad=Identity("none"))
    assert found.status.tolist() == [Status.SOLVED, Status.BEST_FOUND]
    assert found.value.tolist() == [[1, 0], [1, 0]]
    with pytest.raises(TimeoutError, match=r"1 of 3 .*instance 2, nothing feasible"):
        solve(LATE, Slow("best"), grad=Identity("none"))


@pytest.mark.parametrize("strategy", [Identity("none"), Blackbox(0.1), IMLE(Uniform(0.01), lam=0.1)], ids=str)
def test_limit_skip(strategy):
    w = LATE.clone().requires_grad_()
    found = solve_with_status(w, Slow("skip"), grad=strategy, seed=0)
    assert found.status.tolist() == [Status.SOLVED, Status.NOTHING, Status.NOTHING]
    assert (found.value[1:] == 0).all()
    assert found.value[0].sum() == 1
    (found.value * torch.arange(6.0).reshape(3, 2)).sum().backward()
    assert (w.grad[1:] == 0).all()


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(torch.tensor([[1.0, float("nan")]]), TopK(1)), "cost: got NaN or infinite .*instance 0"),
        (lambda: solve(torch.tensor([[1.0, 2], [1, -torch.inf]]), TopK(1)), "cost: got NaN or infinite .*instance 1"),
        (lambda: solve(torch.ones(2, 3, dtype=torch.int64), TopK(1)), "cost: got torch.int64, wanted a floating"),
        (lambda: solve(np.ones((2, 3)), TopK(1)), "cost: got ndarray, wanted a floating"),
        (lambda: solve(torch.ones(2, 3), TopK(4)), r"cost: got instances of shape \(3,\).* k = 4"),
        (lambda: solve(torch.tensor(1.0), TopK(1)), r"cost: got shape \(\) for TopK"),
        (lambda: solve(torch.ones(3), lambda w: w), r"cost: got shape \(3,\) .* a batch dimension"),
        (lambda: solve(torch.ones(2, 3), "dijkstra"), "solver: got 'dijkstra', wanted a Solver object or a function"),
        (lambda: solve(torch.ones(2, 3), TopK), "solver: got <class .*, wanted a Solver object"),
        (
            lambda: solve(-torch.ones(2, 3), FunctionSolver(np.abs, nonnegative=True)),
            "cost: got -1, but .* forbids negative costs; make them positive",
        ),
        (
            lambda: solve(torch.ones(2, 3, requires_grad=True), TopK(1), grad=Identity(margin=Informed(0.1))),
            "truth: got None, wanted the true structures",
        ),
        (lambda: solve(torch.ones(2, 3), TopK(1), truth=torch.ones(2)), r"truth: got shape \(2,\), wanted \(2, 3\)"),
        (lambda: solve(torch.ones(2, 3), lambda w: w[:1]), r"returned solutions of shape \(1, 3\), wanted \(2, 3\)"),
        (lambda: solve(torch.ones(2, 3), lambda w: None), "returned solutions of shape NoneType"),
        (lambda: solve(torch.ones(2, 3), lambda w: w / 0), "solution of instance 0 of 2 is not finite"),
        (lambda: Identity("median"), "projection: got 'median', wanted 'auto'"),
        (lambda: Blackbox(0.0), "lam: got 0.0, wanted a positive"),
        (lambda: IMLE(Gumbel(), lam=float("nan")), "lam: got nan, wanted a positive"),
        (lambda: Perturbed(Normal(), samples=1), "samples: got 1, wanted a whole number of at least 2"),
        (lambda: Perturbed(Normal(), samples=2.5), "samples: got 2.5, wanted a whole number of at least 2"),
        (lambda: Perturbed(0.5), "noise: got 0.5, wanted noise, such as Normal"),
        (lambda: IMLE(Gumbel), "noise: got the class Gumbel, wanted noise"),
        (lambda: Identity(margin=0.2), r"margin: got 0.2, wanted noise, such as TwoPoint\(width\), or Informed"),
        (lambda: Blackbox(1.0, margin=TwoPoint), "margin: got the class TwoPoint, wanted noise"),
        (lambda: Informed(float("nan")), "width: got nan, wanted a finite number of at least 0"),
        (lambda: Informed(-1.0), "width: got -1.0, wanted a finite number of at least 0"),
        (lambda: solve(torch.ones(2, 3), TopK(1), grad="identity"), r"grad: got 'identity', wanted an object: Identity\(\)"),
        (lambda: solve(torch.ones(2, 3), TopK(1), grad=Identity), "grad: got the class Identity, wanted an object"),
        (lambda: solve(torch.ones(2, 3), TopK(1), truth=np.ones((2, 3))), "truth: got ndarray, wanted a tensor"),
        (lambda: Perturbed(TwoPoint(0.1)), "no smooth density"),
        (lambda: FunctionSolver(np.abs, sense="maximum"), "sense: got 'maximum', wanted 'min'"),
        (lambda: TopK(0), "k: got 0, wanted"),
        (lambda: TopK(2.5), r"k: got 2.5, wanted a whole number \(int\) of at least 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("strategy", [*STRATEGIES, Identity(margin=Informed(0.1))], ids=str)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_truth_that_is_not_finite_is_told_from_a_cost(strategy, wanted):
    truth = torch.tensor([[1.0, 0, 0, 0], [0, torch.nan, 0, 0]])
    with pytest.raises(ValueError, match=r"^truth: got NaN or infinite entries, wanted true structures"):
        solve(randn(2, 4).requires_grad_(wanted), TopK(1), grad=strategy, truth=truth)


def test_an_infeasible_solution_is_named():
    class Liar(Polytope):
        def feasible(self, solutions):
            return solutions.sum(1) == 3

    with pytest.raises(ValueError, match="solution of instance 0 of 2 is infeasible; the solver is at fault"):
        solve(torch.ones(2, 4), Liar(cube()))


class Kernel(TensorSolver):
    """A tensor kernel ``fn``; its structures are those with two ones."""

    def __init__(self, fn):
        self.fn = fn

    def solve_tensor(self, costs):
        return self.fn(costs)

    def feasible(self, solutions):
        return (solutions.sum(1) == 2) & np.isin(solutions, (0, 1)).all(1)


def second_is(value):
    def fn(w):
        y = TopK(2).solve_tensor(w)
        y[1] = value
        return y

    return fn


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            lambda w: torch.full_like(w, torch.nan),
            r"Kernel\(\): its solution of instance 0 of \d+ is not finite; the solver",
        ),
        (second_is(torch.inf), r"instance 1 of \d+ is not finite; the solver is at fault"),
        (second_is(1.0), r"instance 1 of \d+ is infeasible; the solver is at fault"),
        (lambda w: w[:, :2], r"Kernel\(\): returned solutions of shape \(\d+, 2\), wanted \(\d+, 4\)"),
        (lambda w: w.numpy(), "returned solutions of shape ndarray"),
    ],
)
def test_what_a_tensor_kernel_returns_is_checked(fn, message, strategy):
    with pytest.raises(ValueError, match=message):
        solve(randn(3, 4), Kernel(fn), grad=strategy)


def test_a_tensor_kernel_that_fails_in_the_second_call_is_named_too():
    answers = iter([TopK(2).solve_tensor, second_is(torch.nan)])
    w = randn(3, 4).requires_grad_()
    y = solve(w, Kernel(lambda costs: next(answers)(costs)), grad=Blackbox(1.0))
    with pytest.raises(ValueError, match="instance 1 of 3 is not finite"):
        y[:, 0].sum().backward()


def test_a_gradient_that_is_not_finite_is_told_from_a_cost():
    w = randn(2, 4).requires_grad_()
    y = solve(w, TopK(1), grad=Blackbox(1.0))
    with pytest.raises(ValueError, match=r"gradient of the loss .* NaN"):
        (y * torch.nan).sum().backward()


@pytest.mark.parametrize("declared", [False, True])
def test_a_solver_may_write_on_what_it_is_given_and_the_parameter_stays(declared):
    def greedy(w):
        w -= w.min(1, keepdims=True)
        return (w == 0).astype(w.dtype)

    w = torch.tensor([[3.0, 2.0, 5.0]], requires_grad=True)
    found = solve(w, FunctionSolver(greedy) if declared else greedy, grad=Identity("none"))
    assert found.tolist() == [[0.0, 1.0, 0.0]]
    assert w.tolist() == [[3.0, 2.0, 5.0]]
