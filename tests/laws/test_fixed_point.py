"""Fixed points: every strategy, iteration and solver against closed forms, dense algebra and finite differences."""

import math
import warnings

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from distset.fixed_point import (
    Anderson,
    Damped,
    FixedPointWarning,
    Implicit,
    OneStep,
    Plain,
    Status,
    Stop,
    Unrolled,
    fixed_point,
    lipschitz,
)
from distset.krylov import GMRES, Dense, Neumann

TIGHT = Stop(max_steps=500, atol=1e-13, rtol=1e-13)
SOLVERS = [Neumann(1e-13, 500), GMRES(1e-13), Dense()]
ITERATIONS = [Plain(), Damped(0.7), Anderson(3)]


def problem(seed=0, sets=3, size=5, gain=0.8):
    """x = tanh(x W^T + b): a contraction where the norm of W is below 1."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, dtype=torch.float64, generator=generator)
    weight = (gain * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
    bias = torch.randn(sets, size, dtype=torch.float64, generator=generator).requires_grad_()
    cotangent = torch.randn(sets, size, dtype=torch.float64, generator=generator)
    return weight, bias, cotangent, torch.zeros(sets, size, dtype=torch.float64)


def gradients(weight, bias, cotangent, x0, **how):
    solution = fixed_point(lambda x: torch.tanh(x @ weight.mT + bias), x0, **how)
    return solution, torch.autograd.grad((solution.value * cotangent).sum(), [weight, bias])


def dense_gradients(weight, bias, cotangent, value):
    """u = (I - J^T)^-1 g written out, and A^-1 B with it."""
    slope = 1 - value**2
    jacobian = slope.unsqueeze(-1) * weight.detach()
    u = torch.linalg.solve(torch.eye(weight.shape[0]) - jacobian.mT, cotangent.unsqueeze(-1)).squeeze(-1)
    return (u * slope).mT @ value, u * slope


@pytest.mark.parametrize("iteration", ITERATIONS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_implicit_gradient_is_the_dense_one(solver, iteration):
    args = problem()
    solution, found = gradients(*args, grad=Implicit(solver), iteration=iteration, stop=TIGHT)
    assert solution.converged.all()
    for a, b in zip(found, dense_gradients(*args[:3], solution.value.detach())):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_implicit_is_unrolling_to_convergence():
    args = problem(1)
    _, implicit = gradients(*args, stop=TIGHT, grad=Implicit(GMRES(1e-13)))
    _, unrolled = gradients(*args, grad=Unrolled(300))
    for a, b in zip(implicit, unrolled):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_implicit_is_the_derivative_by_finite_differences():
    weight, bias, cotangent, x0 = problem(2)
    _, (found, _) = gradients(weight, bias, cotangent, x0, stop=TIGHT, grad=Implicit(GMRES(1e-13)))

    def loss(w):
        with torch.no_grad():
            return (fixed_point(lambda x: torch.tanh(x @ w.mT + bias), x0, stop=TIGHT).value * cotangent).sum()

    step = 1e-5
    for i, j in [(0, 0), (1, 3), (4, 2)]:
        shift = torch.zeros_like(weight)
        shift[i, j] = step
        assert abs((loss(weight + shift) - loss(weight - shift)) / (2 * step) - found[i, j]) < 1e-8


def test_one_step_takes_the_cotangent_as_it_is():
    weight, bias, cotangent, x0 = problem(3)
    solution, (_, found) = gradients(weight, bias, cotangent, x0, grad=OneStep(), stop=TIGHT)
    torch.testing.assert_close(found, cotangent * (1 - solution.value.detach() ** 2))
    _, (_, exact) = gradients(weight, bias, cotangent, x0, stop=TIGHT)
    assert (found - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("solver", [GMRES(1e-13), Dense()], ids=lambda s: type(s).__name__)
def test_gradient_is_right_where_the_map_does_not_contract(solver):
    """A slope of -3 everywhere: plain iteration and the Neumann series fail, the implicit function theorem holds."""
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    how = {"iteration": Damped(0.2), "stop": TIGHT}
    solution = fixed_point(lambda x: theta - 3 * x, torch.zeros(4, 2, dtype=torch.float64), grad=Implicit(solver), **how)
    torch.testing.assert_close(solution.value, (theta / 4).expand(4, 2))
    (found,) = torch.autograd.grad(solution.value.sum(), theta)
    torch.testing.assert_close(found, torch.ones_like(theta))


def test_a_failing_solver_says_so_and_the_gradient_stays_finite():
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    grad = Implicit(Neumann(1e-10, 2000))
    solution = fixed_point(lambda x: theta - 3 * x, torch.zeros(2, 1, dtype=torch.float64), grad=grad, iteration=Damped(0.2))
    with pytest.warns(FixedPointWarning, match="one-step gradient.*GMRES"):
        (found,) = torch.autograd.grad(solution.value.sum(), theta)
    assert found.isfinite().all()


def test_the_series_of_one_set_does_not_end_with_that_of_another():
    slopes = torch.tensor([100.0, 0.8], dtype=torch.float64).unsqueeze(-1)  # the first leaves the finite numbers sooner
    u = Neumann(1e-12, 1000)(lambda v: slopes * v, torch.ones(2, 1, dtype=torch.float64))
    assert not u[0].isfinite()
    torch.testing.assert_close(u[1], torch.tensor([5.0], dtype=torch.float64))


def test_gmres_serves_sets_that_need_different_numbers_of_steps():
    """One set has no Jacobian at all, one a rank-1 Jacobian, one a full one: complete spaces must not spoil the rest."""
    torch.manual_seed(0)
    jacobian = torch.stack([torch.zeros(6, 6), torch.outer(torch.randn(6), torch.randn(6)), torch.randn(6, 6)]).double()
    g = torch.randn(3, 6, dtype=torch.float64)
    u = GMRES(1e-14)(lambda v: (jacobian.mT @ v.unsqueeze(-1)).squeeze(-1), g)
    exact = torch.linalg.solve(torch.eye(6) - jacobian.mT, g.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(u, exact, rtol=1e-9, atol=1e-9)
    assert (GMRES()(lambda v: 0.5 * v, torch.zeros(2, 6)) == 0).all()


@pytest.mark.parametrize("iteration", ITERATIONS, ids=repr)
def test_a_set_does_not_feel_its_companions(iteration):
    weight, bias, _, x0 = problem(4, sets=6)
    bias = bias.detach() * torch.logspace(-3, 1, 6, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        batch = fixed_point(lambda x: torch.tanh(x @ weight.mT + bias), x0, iteration=iteration)
        for i in range(6):
            alone = fixed_point(lambda x, i=i: torch.tanh(x @ weight.mT + bias[i]), x0[i], iteration=iteration)
            torch.testing.assert_close(batch.value[i], alone.value, rtol=1e-12, atol=1e-12)
            assert batch.iterations[i] == alone.iterations
    assert batch.iterations.unique().numel() > 1


def test_anderson_needs_fewer_steps():
    weight, bias, _, x0 = problem(5, gain=0.99, size=20)
    with torch.no_grad():
        plain, fast = (
            fixed_point(lambda x: x @ weight.mT + bias, x0, iteration=i, stop=Stop(2000, 1e-9, 1e-9))
            for i in (Plain(), Anderson(8))
        )
    assert fast.converged.all()
    assert fast.iterations.max() < plain.iterations.max()
    torch.testing.assert_close(fast.value, plain.value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("step", "start", "period"), [
    (lambda x: 1 - x, 0.2, 2),
    (lambda x: 3.5 * x * (1 - x), 0.4, 4),
    (lambda x: 3.83 * x * (1 - x), 0.5, 3),
])  # fmt: skip
def test_cycles_are_named_with_their_period(step, start, period):
    x0 = torch.full((2, 1), start, dtype=torch.float64)
    with pytest.warns(FixedPointWarning, match=f"cycle .period {period}.*Damped"):
        solution = fixed_point(step, x0, stop=Stop(max_steps=1000))
    assert solution.status.tolist() == [Status.CYCLE] * 2
    assert solution.period.tolist() == [period] * 2
    calmed = fixed_point(step, x0, iteration=Damped(0.2), stop=Stop(max_steps=1000))
    assert calmed.converged.all()


def test_a_slowly_swinging_contraction_is_not_taken_for_a_cycle():
    x0 = torch.ones(1, 1, dtype=torch.float64)
    solution = fixed_point(lambda x: -0.99 * x, x0, stop=Stop(5000, 1e-8, 1e-8))
    assert solution.converged.all()


def test_not_converging_is_a_result_and_raised_only_on_demand():
    x0 = torch.zeros(1, 3)
    slow = {"step": lambda x: 0.999 * x + 1, "x0": x0, "stop": Stop(max_steps=5)}
    with pytest.warns(FixedPointWarning, match="1 of 1 sets are not converged after 5 steps.*max_steps"):
        solution = fixed_point(**slow)
    assert solution.status.item() == Status.NOT_CONVERGED
    assert solution.trace.shape == (5, 1)
    assert solution.value.isfinite().all()
    with pytest.raises(RuntimeError, match="raise max_steps"):
        fixed_point(**slow, throw=True)


def test_divergence_returns_the_last_finite_point():
    x0 = torch.tensor([[2.0], [0.5]])
    theta = torch.ones((), requires_grad=True)
    with pytest.warns(FixedPointWarning, match="1 of 2 sets left the finite numbers"):
        solution = fixed_point(lambda x: theta * x**2, x0, stop=Stop(max_steps=50))
    assert solution.status.tolist() == [Status.DIVERGED, Status.CONVERGED]
    assert solution.value.isfinite().all()


def test_a_first_step_beyond_measure_is_divergence_and_no_randomness():
    x0, scale = torch.tensor([[0.3], [0.3]]), torch.tensor([[1e30], [0.5]], requires_grad=True)
    with pytest.warns(FixedPointWarning, match="1 of 2 sets left the finite numbers"):
        solution = fixed_point(lambda x: scale * (x**2 + 0.1), x0)  # 2e29 is finite, its square is not
    assert solution.status.tolist() == [Status.DIVERGED, Status.CONVERGED]
    assert solution.value.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_set_whose_solution_has_no_derivative_spoils_no_other(solver):
    theta = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([[1.0], [0.5]], dtype=torch.float64)  # the first map is the identity at theta = 1
    solution = fixed_point(lambda x: rate * x + theta - 1, torch.zeros(2, 1).double(), grad=Implicit(solver), stop=TIGHT)
    with pytest.warns(FixedPointWarning, match="in 1 of 2 sets"):
        solution.value.sum().backward()
    assert theta.grad.isfinite().all()
    assert theta.grad[1].item() == pytest.approx(2.0)


@pytest.mark.parametrize("rate", [2.0, 3.0, 10.0])
def test_a_point_whose_norm_is_infinite_is_divergence_whatever_its_tolerance(rate):
    theta = torch.tensor([0.5, 0.3], requires_grad=True)
    with pytest.warns(FixedPointWarning, match="1 of 1 sets left the finite numbers"):
        solution = fixed_point(lambda x: rate * x + theta, torch.ones(2), stop=Stop(max_steps=200))
    assert solution.status.item() == Status.DIVERGED
    unrolled = fixed_point(lambda x: rate * x + theta, torch.ones(2), grad=Unrolled(math.ceil(45 / math.log(rate))))
    assert unrolled.status.item() == Status.NOT_CONVERGED


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed_point(lambda x: None, torch.ones(2)), "step: returned NoneType"),
        (lambda: fixed_point(torch.cos, [1.0]), "x0: got list, wanted a tensor"),
        (lambda: fixed_point(torch.cos, torch.ones(2), grad="implicit"), "grad: got 'implicit', wanted a strategy"),
        (lambda: fixed_point(torch.cos, torch.ones(2), grad=OneStep), "grad: got .*OneStep.*not its class"),
    ],
)
def test_what_is_no_map_point_or_strategy_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def saved_floats(how):
    weight, bias, cotangent, x0 = problem(6)
    sizes = []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients(weight, bias, cotangent, x0, **how)
    return sum(sizes)


def test_memory_of_implicit_does_not_grow_with_the_iterations():
    stops = [Stop(max_steps=k, atol=0.0, rtol=0.0) for k in (2, 20, 60)]
    implicit = [saved_floats({"grad": Implicit(Dense()), "stop": stop}) for stop in stops]
    unrolled = [saved_floats({"grad": Unrolled(k)}) for k in (2, 20, 60)]
    assert implicit[0] == implicit[1] == implicit[2]
    assert unrolled[2] > 2.5 * unrolled[1] > 15 * unrolled[0]


def test_gradient_reaches_what_the_map_closes_over():
    """Not only leaves: features computed outside, a module's parameters, an input."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4).double()
    weight = torch.nn.Parameter(0.1 * torch.randn(4, 4, dtype=torch.float64))
    inputs = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    features = torch.relu(layer(inputs))
    x0 = torch.zeros(2, 4, dtype=torch.float64)
    value = fixed_point(lambda x: torch.tanh(x @ weight + features), x0, stop=TIGHT, grad=Implicit(GMRES(1e-13))).value
    wanted = fixed_point(lambda x: torch.tanh(x @ weight + features), x0, grad=Unrolled(100)).value
    leaves = [weight, inputs, *layer.parameters()]
    for a, b in zip(torch.autograd.grad(value.sum(), leaves, retain_graph=True), torch.autograd.grad(wanted.sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_backward_runs_the_map_under_the_autocast_of_the_forward():
    seen = []
    weight = torch.eye(3, requires_grad=True)

    def step(x):
        y = 0.1 * x @ weight
        seen.append(y.dtype)
        return y.float() + 1

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = fixed_point(step, torch.zeros(2, 3), grad=Implicit(GMRES(1e-2)), stop=Stop(atol=1e-2)).value
    value.sum().backward()
    assert set(seen) == {torch.bfloat16}


def test_without_gradients_nothing_is_kept():
    weight, bias, _, x0 = problem()
    with torch.no_grad():
        assert not fixed_point(lambda x: torch.tanh(x @ weight.mT + bias), x0).value.requires_grad
    assert not fixed_point(lambda x: 0.5 * x + 1, x0).value.requires_grad


def test_entries_may_be_problems_of_their_own_and_matrices_one_problem():
    theta = torch.tensor([0.5, -0.3, 0.9], dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(3, dtype=torch.float64)
    one_each = fixed_point(lambda x: theta * torch.cos(x), x0, grad=Implicit(Dense()), event_ndim=0, stop=TIGHT)
    assert one_each.status.shape == (3,)
    wanted = torch.cos(one_each.value) / (1 + theta * torch.sin(one_each.value))
    torch.testing.assert_close(torch.autograd.grad(one_each.value.sum(), theta)[0], wanted)
    matrix = fixed_point(lambda x: theta * torch.cos(x), x0.expand(2, 4, 3), event_ndim=2, stop=TIGHT)
    assert matrix.status.shape == (2,)
    torch.testing.assert_close(matrix.value, one_each.value.expand(2, 4, 3))


def test_lipschitz_is_the_spectral_norm_of_the_jacobian():
    weight, bias, _, x0 = problem(7)
    x = torch.randn_like(x0)
    found = lipschitz(lambda x: torch.tanh(x @ weight.mT + bias), x, iterations=200)
    slope = 1 - torch.tanh(x @ weight.mT + bias) ** 2
    torch.testing.assert_close(found, torch.linalg.matrix_norm(slope.unsqueeze(-1) * weight, 2), rtol=1e-6, atol=0)
    assert (lipschitz(lambda x: torch.ones_like(x), x) == 0).all()
    assert (lipschitz(lambda x: x.detach() @ weight.requires_grad_(), x) == 0).all()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 0.5 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        return 0.5 * cotangent


def test_a_map_that_is_differentiated_once_has_no_estimate():
    with pytest.raises(ValueError, match="step: its derivative cannot be differentiated again"):
        lipschitz(Once.apply, torch.ones(2, 3))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: fixed_point(lambda x: x, torch.zeros(3, dtype=torch.int64)), "x0: got torch.int64"),
    (lambda: fixed_point(lambda x: x, torch.zeros(3), event_ndim=2), "x0: got shape .3,. with event_ndim 2"),
    (lambda: fixed_point(lambda x: x, torch.zeros(3), stop=Stop(0)), "stop: got .*max_steps >= 1"),
    (lambda: fixed_point(lambda x: x[..., :2], torch.zeros(3)), "step: made .* wanted the same shape"),
    (lambda: fixed_point(lambda x: x.double(), torch.zeros(3)), "step: made torch.float64"),
    (lambda: fixed_point(lambda x: x / 0, torch.zeros(3)), "step: is not finite at x0"),
    (lambda: fixed_point(lambda x: x / 0, torch.zeros(3), grad=Unrolled(2)), "step: is not finite at x0"),
    (lambda: Damped(0.0), "rate: got 0.0"),
    (lambda: Anderson(0), "memory: got 0"),
    (lambda: Unrolled(0), "steps: got 0"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_random_map_is_refused():
    theta = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="gave another value at the same point"):
        fixed_point(lambda x: theta * torch.rand(3), torch.zeros(3))
