"""Projections: idempotent, orthogonal to what they take away, silent where the cost has no direction."""

import numpy as np
import pytest
import torch

from distset.projections import (
    Plane,
    project_mean,
    project_norm,
    project_plane,
    project_std,
    projection_for,
)
from distset.solve import Identity, solve
from distset.solvers import FunctionSolver, Ranking, TopK

NORMAL = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
MASK = torch.rand(4, 5, generator=torch.Generator().manual_seed(4)) < 0.7
PROJECTIONS = {
    "mean": lambda w, mask: project_mean(w, ndim=2, mask=mask),
    "norm": lambda w, mask: project_norm(w, ndim=2, mask=mask),
    "std": lambda w, mask: project_std(w, ndim=2, mask=mask),
    "plane": lambda w, mask: project_plane(w, NORMAL, ndim=2, mask=mask),
}


def costs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, dtype=torch.float64, generator=generator).mul(10).add(2).to(dtype)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_idempotent(name, mask, dtype):
    once = PROJECTIONS[name](costs(dtype), mask)
    twice = PROJECTIONS[name](once, mask)
    assert once.dtype == dtype
    assert (twice - once).abs().max() <= 8 * torch.finfo(dtype).eps * once.abs().max()


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_gradient_is_orthogonal_to_what_was_taken_away(name, mask):
    w = costs().requires_grad_()
    g = torch.randn_like(w, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(PROJECTIONS[name](w, mask), w, g)
    seen = torch.ones(4, 5, dtype=torch.bool) if mask is None else mask
    taken = {"mean": [torch.ones_like(w)], "norm": [w], "std": [torch.ones_like(w), w], "plane": [NORMAL.expand_as(w)]}
    for direction in taken[name]:
        direction = (direction * seen).detach()
        cosine = (grad * direction).sum((1, 2)) / (grad.norm(dim=(1, 2)) * direction.norm(dim=(1, 2)))
        assert cosine.abs().max() < 20 * torch.finfo(torch.float64).eps
    assert (grad[:, ~seen] == 0).all()
    assert torch.autograd.gradcheck(lambda w: PROJECTIONS[name](w, mask), (w,))


def test_closed_forms():
    w = costs().flatten(1).requires_grad_()
    g = torch.randn_like(w, generator=torch.Generator().manual_seed(1))
    (through_mean,) = torch.autograd.grad(project_mean(w), w, g)
    torch.testing.assert_close(through_mean, g - g.mean(1, keepdim=True), rtol=1e-12, atol=1e-12)
    (through_norm,) = torch.autograd.grad(project_norm(w), w, g)
    norm = w.norm(dim=1, keepdim=True)
    wanted = g / norm - (g * w).sum(1, keepdim=True) * w / norm**3
    torch.testing.assert_close(through_norm, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30])
@pytest.mark.parametrize("name", ["norm", "std"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cost_without_direction_gives_zero_and_no_gradient(name, value, dtype):
    if name == "norm" and value:
        pytest.skip("a constant cost has a direction before its mean has gone")
    w = torch.full((1, 4, 5), value, dtype=dtype, requires_grad=True)
    projected = PROJECTIONS[name](w, None)
    projected.sum().backward()
    assert (projected == 0).all()
    assert (w.grad == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norm_of_extreme_costs(scale):
    unit = project_norm(torch.tensor([3.0, 4.0]) * scale)
    torch.testing.assert_close(unit, torch.tensor([0.6, 0.8]))


def one_hot_of_least(w):
    return torch.nn.functional.one_hot(torch.from_numpy(w).argmin(-1), w.shape[-1]).double().numpy()


AWARE = FunctionSolver(one_hot_of_least, scale_free=False, hyperplane=1.0)


@pytest.mark.parametrize(
    ("projection", "solver", "reason"),
    [
        ("mean", FunctionSolver(one_hot_of_least), "declares no hyperplane"),
        ("std", FunctionSolver(one_hot_of_least), "declares no hyperplane"),
        ("norm", AWARE, "depends on the scale"),
        ("std", AWARE, "depends on the scale"),
        ("mean", FunctionSolver(one_hot_of_least, hyperplane=1.0, nonnegative=True), "makes costs negative"),
        (Plane(torch.tensor([1.0, 2.0, 3.0])), TopK(1), "another normal"),
    ],
)
def test_an_invalid_projection_is_refused_with_the_reason(projection, solver, reason):
    with pytest.raises(ValueError, match=rf"^projection: got .* {reason}"):
        projection_for(projection, solver, (3,))


def test_auto_follows_the_declaration():
    w = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weighted = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    cases = [
        (TopK(1), project_std(w)),
        (Ranking(), project_std(w)),
        (FunctionSolver(one_hot_of_least), project_norm(w)),
        (FunctionSolver(one_hot_of_least, scale_free=False), w),
        (AWARE, project_mean(w)),
        (FunctionSolver(one_hot_of_least, hyperplane=weighted.numpy()), project_norm(project_plane(w, weighted))),
        (FunctionSolver(one_hot_of_least, hyperplane=1.0, nonnegative=True), project_norm(w)),
    ]
    for solver, wanted in cases:
        torch.testing.assert_close(projection_for("auto", solver, (3,))(w), wanted, rtol=1e-13, atol=1e-13)


def test_a_plane_given_by_the_caller_declares_a_bare_function():
    w, normal = torch.randn(5, 3), torch.tensor([1.0, 2.0, 3.0])
    project = projection_for(Plane(normal), FunctionSolver(one_hot_of_least), (3,))
    torch.testing.assert_close(project(w), project_plane(w, normal))


def test_zero_normal():
    with pytest.raises(ValueError, match=r"^normal: got the zero vector"):
        project_plane(torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_the_length_of_a_normal_says_nothing(length):
    normal = torch.tensor([3.0, -1.0, 2.0, 0.0])
    cost = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1e9, 0.0, -1e9, 1e9]])
    torch.testing.assert_close(project_plane(cost, length * normal), project_plane(cost, normal))


def test_a_plane_of_an_array_is_that_of_a_tensor():
    w, normal = torch.randn(5, 3), np.array([1.0, 2.0, 3.0])
    wanted = project_plane(w, torch.from_numpy(normal))
    torch.testing.assert_close(project_plane(w, normal), wanted)
    torch.testing.assert_close(projection_for(Plane(normal), FunctionSolver(one_hot_of_least), (3,))(w), wanted)
    assert solve(w, one_hot_of_least, grad=Identity(Plane(normal))).sum() == 5


def bare(**declared):
    return FunctionSolver(one_hot_of_least, **declared)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: project_plane(w, torch.ones(4)), r"normal: got shape \(4,\), wanted \(3,\), the shape of an instance"),
        (lambda w: project_plane(w, torch.ones(2, 3)), r"normal: got shape \(2, 3\), wanted \(3,\)"),
        (lambda w: project_plane(w, torch.tensor([1, torch.nan, 1])), "normal: got a normal with NaN"),
        (lambda w: project_mean(w, mask=torch.ones(4, dtype=torch.bool)), r"mask: got shape \(4,\), wanted \(3,\)"),
        (lambda w: project_norm(w, mask=torch.ones(2, 3, dtype=torch.bool)), r"mask: got shape \(2, 3\), wanted \(3,\)"),
        (lambda w: project_norm(w, mask=torch.ones(3)), "mask: got torch.float32, wanted torch.bool"),
        (lambda w: solve(w, TopK(1), grad=Identity(Plane(torch.ones(4)))), r"projection: got shape \(4,\), wanted \(3,\)"),
        (lambda w: solve(w, bare(), grad=Identity(Plane(np.ones(4)))), r"projection: got shape \(4,\), wanted \(3,\)"),
        (lambda w: Identity(Plane("mean")), "projection: got 'mean' as a normal, wanted a tensor"),
        (lambda w: Identity(np.ones(3)), r"projection: got array\(.*, wanted 'auto'"),
        (lambda w: solve(w, bare(hyperplane=np.ones(4))), r"hyperplane: that of FunctionSolver.* \(4,\), wanted \(3,\)"),
        (lambda w: solve(w, bare(hyperplane=np.ones(4)), grad=Identity("mean")), "hyperplane: that of FunctionSolver"),
        (lambda w: solve(w, bare(hyperplane="sum")), "hyperplane: that of FunctionSolver.* got 'sum' as a normal"),
        (lambda w: solve(w, bare(mask=np.ones(4, bool))), r"mask: that of FunctionSolver.* \(4,\), wanted \(3,\)"),
        (
            lambda w: solve(w, bare(mask=np.array([1, 0, 1]))),
            "mask: that of FunctionSolver.* torch.int64, wanted torch.bool",
        ),
    ],
)
def test_what_does_not_fit_an_instance_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(torch.randn(2, 3))


def test_a_second_derivative_is_refused():
    w = costs().requires_grad_()
    (grad,) = torch.autograd.grad(project_std(w, ndim=2).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
