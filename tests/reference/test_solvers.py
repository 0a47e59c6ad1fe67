"""Each solver against brute force or an independent library, on seeded small instances."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from distset.solvers import Ranking, TopK


def rng(seed=0):
    return np.random.default_rng(seed)


def brute_force(costs, structures, sense="min"):
    """The best of all structures ``(V, *instance)`` for each instance."""
    flat = np.asarray(structures, float).reshape(len(structures), -1)
    values = costs.reshape(len(costs), -1) @ flat.T
    best = values.argmin(1) if sense == "min" else values.argmax(1)
    return flat[best].reshape(costs.shape)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (6, 3), (7, 7)])
def test_topk_is_the_best_subset(n, k):
    subsets = [v for v in itertools.product((0, 1), repeat=n) if sum(v) == k]
    costs = rng().normal(size=(1000, n))
    assert np.array_equal(TopK(k).solve(costs), brute_force(costs, subsets, "max"))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ranking_is_the_best_permutation(n):
    permutations = list(itertools.permutations(range(1, n + 1)))
    costs = rng().normal(size=(1000, n))
    assert np.array_equal(Ranking().solve(costs), brute_force(costs, permutations))


def test_ranking_is_scipys():
    costs = rng().normal(size=(200, 50))
    assert np.array_equal(Ranking().solve(costs), scipy.stats.rankdata(-costs, axis=-1))


def test_ties_go_to_the_lower_index():
    tied = np.array([[1.0, 2.0, 2.0, 1.0, 2.0]])
    assert TopK(2).solve(tied).tolist() == [[0, 1, 1, 0, 0]]
    assert TopK(4).solve(tied).tolist() == [[1, 1, 1, 0, 1]]
    assert Ranking().solve(tied).tolist() == [[4, 1, 2, 5, 3]]


@pytest.mark.parametrize("solver", [TopK(3), Ranking()], ids=repr)
def test_tensors_and_arrays_agree(solver):
    costs = rng().normal(size=(20, 9)).astype(np.float32)
    before = costs.copy()
    found = solver.solve(costs)
    assert found.dtype == np.float32
    assert np.array_equal(costs, before)
    assert np.array_equal(found, solver.solve_tensor(torch.from_numpy(costs)).numpy())
    assert solver.feasible(found).all()
    assert not solver.feasible(found + 1).any()
