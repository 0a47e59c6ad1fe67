"""Perturb-and-MAP over rows of different length: every row as if it were alone, without its padding."""

import pytest
import torch
from small_subsets import randn
from torch import Tensor

from distset.expect import expect
from distset.noise import Normal, TwoPoint
from distset.perturb_and_map import PerturbAndMap
from distset.solve import Blackbox, Identity
from distset.subsets import KSubset

INF = torch.inf
QUIET = TwoPoint(0.0)
STRATEGIES = [Identity("std"), Identity("mean"), Identity("norm"), Identity("none"), Blackbox(5.0)]
LENGTHS, K = torch.tensor([7, 4, 5, 4, 2]), torch.tensor([3, 3, 1, 3, 3])


def linear(cost: Tensor):
    return lambda z: (z * cost).sum(-1)


def projected(w: Tensor, g: Tensor, projection: str) -> Tensor:
    """The Jacobian of a projection at ``w (m)``, written out, times g."""
    m = len(w)
    centre = torch.eye(m).double() - 1 / m if projection in ("mean", "std") else torch.eye(m).double()
    if projection in ("mean", "none"):
        return centre @ g
    unit = centre @ w / (centre @ w).norm()
    return centre @ (g - unit * (unit @ g)) / (centre @ w).norm()


@pytest.mark.parametrize("projection", ["std", "mean", "norm", "none"])
def test_a_padded_row_has_the_closed_form_of_its_elements(projection) -> None:
    """Without noise, f linear: the slope through the projection's Jacobian over the finite elements, 0 elsewhere."""
    logits, cost = randn(5, 7), randn(5, 7, seed=1)
    there = torch.arange(7) < LENGTHS.unsqueeze(-1)
    leaf = logits.masked_fill(~there, -INF).requires_grad_()
    k = torch.minimum(K, LENGTHS)
    values = expect(linear(cost), KSubset(leaf, k), 2, grad=PerturbAndMap(Identity(projection), noise=QUIET))
    values.sum().backward()
    for row in range(5):
        m, chosen = int(LENGTHS[row]), int(k[row])
        top = logits[row, :m].topk(chosen).indices
        torch.testing.assert_close(values[row], cost[row, top].sum(), rtol=1e-14, atol=1e-14)
        settled = chosen == m  # a short row is taken whole
        wanted = torch.zeros(m).double() if settled else projected(logits[row, :m], cost[row, :m], projection)
        torch.testing.assert_close(leaf.grad[row, :m], wanted, rtol=1e-13, atol=1e-14)
        assert (leaf.grad[row, m:] == 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_padding_changes_no_bit(strategy) -> None:
    """Rows of one length, bare and within a longer batch with gaps anywhere: the same samples, the same gradient."""
    bare, cost = randn(3, 5).requires_grad_(), randn(3, 5, seed=1)
    places = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:5].sort().values for i in range(3)])
    long = torch.full((3, 9), -INF).double().scatter(1, places, bare.detach()).requires_grad_()
    long_cost = randn(3, 9, seed=2).scatter(1, places, cost)
    estimator = PerturbAndMap(strategy)
    expect(linear(cost), KSubset(bare, 2), 6, grad=estimator, seed=0).sum().backward()
    expect(linear(long_cost), KSubset(long, 2), 6, grad=estimator, seed=0).sum().backward()
    assert torch.equal(long.grad.gather(1, places), bare.grad)
    assert (long.grad.scatter(1, places, 0.0) == 0).all()
    assert (bare.grad != 0).any()


def test_subsets_are_of_the_right_size_and_hold_no_padding() -> None:
    seen = []
    leaf = torch.where(torch.arange(7) < LENGTHS.unsqueeze(-1), randn(5, 7), -INF)
    leaf[0, 2] = INF

    def f(z: Tensor) -> Tensor:
        seen.append(z.detach())
        return z.square().sum(-1)

    k = torch.minimum(K, LENGTHS)
    expect(f, KSubset(leaf.requires_grad_(), k), 50, grad=PerturbAndMap(noise=Normal(3.0)), seed=0)
    (z,) = seen
    assert ((z == 0) | (z == 1)).all()
    assert (z.sum(-1) == k).all()
    assert (z[:, leaf == -INF] == 0).all()
    assert (z[:, 0, 2] == 1).all()
    assert (z.mean(0)[0, [0, 1, 3, 4, 5, 6]] > 0).all()  # the others share what is left


@pytest.mark.parametrize("projection", ["std", "norm"])
def test_what_is_forced_in_leaves_the_problem_of_the_others(projection) -> None:
    logits, cost = randn(6), randn(6, seed=1)
    leaf = logits.clone()
    leaf[1] = INF
    leaf.requires_grad_()
    others = torch.tensor([0, 2, 3, 4, 5])
    value = expect(linear(cost), KSubset(leaf, 3), 1, grad=PerturbAndMap(Identity(projection), noise=QUIET))
    value.backward()
    top = others[logits[others].topk(2).indices]
    torch.testing.assert_close(value.detach(), cost[1] + cost[top].sum())
    torch.testing.assert_close(leaf.grad[others], projected(logits[others], cost[others], projection))
    assert leaf.grad[1] == 0


def test_nothing_left_to_choose_is_a_gradient_of_zero() -> None:
    leaf = torch.tensor([[1.0, 2.0, -INF], [INF, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    mean = expect(linear(torch.arange(3.0)), KSubset(leaf, torch.tensor([2, 1, 0])), 2, grad=PerturbAndMap(), seed=0)
    assert mean.tolist() == [1.0, 0.0, 0.0]
    mean.sum().backward()
    assert (leaf.grad == 0).all()
