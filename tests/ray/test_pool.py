"""`SolverPool` on Ray actors: the same bits as in process, limits, lost actors, backward through it."""

import os
import pickle
import time

import numpy as np
import pytest
import torch
from ray import exceptions

from distset.cluster.pool import SolverPool
from distset.solve import Blackbox, Identity, solve, solve_with_status
from distset.solvers import Assignment, ShortestPath, Status, TimeLimit, TopK

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def costs(*shape, batch=17, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 1, size=(batch, *shape))


@pytest.fixture(scope="module")
def paths():
    with SolverPool(ShortestPath(), 2, when="always") as pool:
        yield pool


def test_same_bits_for_0_1_and_2_workers(paths):
    w = costs(12, 12)
    wanted = ShortestPath().solve(w)
    assert np.array_equal(paths.solve(w), wanted)
    for workers in (0, 1):
        with SolverPool(ShortestPath(), workers, when="always") as pool:
            assert np.array_equal(pool.solve(w), wanted)


def test_the_same_call_has_the_same_gradient(paths):
    w = torch.from_numpy(costs(6, 7)).requires_grad_()
    g = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(0))
    for strategy in (Identity(), Blackbox(2.0)):
        pooled, alone = (torch.autograd.grad(solve(w, s, grad=strategy), w, g)[0] for s in (paths, ShortestPath()))
        assert torch.equal(pooled, alone)


def test_a_killed_actor_is_replaced_and_its_chunk_done_again(cluster, tmp_path):
    died = tmp_path / "died"

    def dies_once(w):
        if w[0, 0] == 0 and not died.exists():
            died.touch()
            os._exit(1)
        return np.eye(w.shape[1])[w.argmin(1)]

    w = costs(4, batch=8)
    w[0, 0] = 0
    with SolverPool(dies_once, 2, when="always") as pool:
        assert np.array_equal(pool.solve(w), np.eye(4)[w.argmin(1)])
        assert died.exists()
        cluster.kill(pool._actors[0])
        assert np.array_equal(pool.solve(w), np.eye(4)[w.argmin(1)])


@pytest.mark.parametrize("kind", [exceptions.ObjectLostError, exceptions.OwnerDiedError])
def test_a_chunk_whose_answer_was_lost_is_done_again(cluster, monkeypatch, kind):
    """As where a node goes down with an answer on it; such a loss is made here, for one node cannot lose itself."""
    get, losses = cluster.get, []

    def get_or_lose(ref):
        if losses and not isinstance(ref, list):
            losses.pop()
            raise kind("0" * 56, b"", "")
        return get(ref)

    w = costs(5, 5, batch=8)
    with SolverPool(Assignment(), 2, when="always") as pool:
        pool.solve(w)
        monkeypatch.setattr(cluster, "get", get_or_lose)
        losses[:] = [1]
        assert np.array_equal(pool.solve(w), Assignment().solve(w))
        assert not losses


def test_limits_and_errors():
    def sleeps_or_refuses(w):
        if w.max() > 5:
            raise ValueError("too large for me")
        time.sleep(60 if w.max() > 1 else 0)
        return np.eye(w.shape[1])[w.argmin(1)]

    w = costs(4, batch=5)
    with SolverPool(sleeps_or_refuses, 2, limit=TimeLimit(2.0, "skip")) as pool:
        pool.solve(w)
        w[2] += 2
        found = solve_with_status(torch.from_numpy(w), pool, grad=Identity("none"))
        assert found.status.tolist() == [0, 0, Status.NOTHING, 0, 0]
        assert (found.value.sum(1) == torch.tensor([1, 1, 0, 1, 1])).all()
        with pytest.raises(ValueError, match="too large for me"):
            pool.solve(w + 5)


@pytest.mark.slow
def test_more_actors_than_free_cores_do_not_starve():
    w = costs(5, 5, batch=8)
    with SolverPool(Assignment(), 6, when="always") as pool:
        assert np.array_equal(pool.solve(w), Assignment().solve(w))


def test_quick_instances_stay_in_process():
    with SolverPool(TopK(2), 2) as pool:
        pool.solve(costs(10, batch=512))
        assert pool.pooled_calls == 0
        assert pool._actors == []


def test_a_pool_can_be_pickled(paths):
    w = costs(6, 7)
    with pickle.loads(pickle.dumps(paths)) as copy:
        assert np.array_equal(copy.solve(w), paths.solve(w))
