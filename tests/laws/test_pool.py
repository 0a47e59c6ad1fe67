"""The local pool: the same bits for any number of workers, limits, lost workers, and the choice of where to solve."""

import os
import pickle
import time

import numpy as np
import pytest
import torch

from distset.solve import Blackbox, Identity, solve, solve_with_status
from distset.solvers import Assignment, FunctionSolver, ShortestPath, Solver, Status, TimeLimit, TopK, Tour
from distset.solvers.check import check_solver
from distset.solvers.pool import LocalPool


def costs(*shape, batch=17, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 1, size=(batch, *shape))


def cheapest(w):
    return np.eye(w.shape[1])[w.argmin(1)]


def here(w):
    """The number of the process that solved an instance, as its solution."""
    return np.full_like(w, os.getpid())


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("solver", "shape"),
    [(ShortestPath(), (6, 7)), (Assignment(), (5, 5)), (TopK(2), (6,)), (Tour(dynamic=4), (6, 6))],
    ids=str,
)
def test_same_bits_for_any_number_of_workers(solver, shape, workers):
    w = costs(*shape)
    with LocalPool(solver, workers, when="always") as pool:
        assert np.array_equal(pool.solve(w), solver.solve(w))
        assert np.array_equal(pool.solve(w[:1]), solver.solve(w[:1]))
        assert pool.solve(w[:0]).shape == (0, *shape)


def test_a_pool_is_a_solver():
    with LocalPool(ShortestPath(), 2, when="always") as pool:
        assert max(check_solver(pool, costs(5, 5))) < 1e-15
        w = torch.from_numpy(costs(5, 5)).requires_grad_()
        g = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(0))
        for strategy in (Identity(), Blackbox(2.0)):
            pooled, alone = (
                torch.autograd.grad(solve(w, solver, grad=strategy), w, g)[0] for solver in (pool, ShortestPath())
            )
            assert torch.equal(pooled, alone)
        with pytest.raises(ValueError, match="forbids negative costs"):
            solve(-w, pool)


class FromOneUp(Solver):
    """Its costs are at least 1."""

    def clip(self, costs):
        return costs.clamp_min(1.0)

    nonnegative = True

    def solve(self, costs):
        assert (costs >= 1).all()
        return cheapest(costs)


def test_a_pool_has_the_cost_domain_of_its_solver():
    w = torch.from_numpy(1 + costs(4)).requires_grad_()
    g = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(0))
    with LocalPool(FromOneUp(), 0) as pool:
        pooled, alone = (torch.autograd.grad(solve(w, s, grad=Blackbox(9.0)), w, g)[0] for s in (pool, FromOneUp()))
    assert torch.equal(pooled, alone)


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__("odd")


@pytest.mark.parametrize("local", [False, True])
def test_an_error_that_does_not_travel_is_told(local):
    class Local(Exception):
        pass

    def fails(w):
        raise Local("odd") if local else Odd(1, 2)

    with (
        LocalPool(fails, 1, when="always") as pool,
        pytest.raises(RuntimeError, match=r"(Local|Odd) in a worker of the pool: odd(.|\n)*in fails"),
    ):
        pool.solve(costs(3))


@pytest.mark.parametrize(("seconds", "then"), [(-1, "fail"), (float("nan"), "fail"), (float("inf"), "fail"), (1.0, "fial")])
def test_wrong_limits_are_named(seconds, then):
    with pytest.raises(ValueError, match=r"^(seconds|then): got .*, wanted"):
        TimeLimit(seconds, then)


def test_order_is_kept_and_chunks_are_contiguous():
    def slow_where_large(w):
        time.sleep(0.05 * w[0, 0])
        return w

    w = np.arange(8.0)[::-1, None].copy()
    with LocalPool(slow_where_large, 3, when="always") as pool:
        assert np.array_equal(pool.solve(w), w)


# Lost workers


def test_a_lost_worker_is_replaced_and_its_chunk_done_again(tmp_path):
    def dies_once(w):
        if w[0, 0] == 0 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        return cheapest(w)

    w = costs(4, batch=8)
    w[0, 0] = 0
    with LocalPool(dies_once, 2, when="always") as pool:
        assert np.array_equal(pool.solve(w), cheapest(w))
        assert (tmp_path / "died").exists()


def test_a_worker_killed_between_calls_is_replaced():
    with LocalPool(cheapest, 2, when="always") as pool:
        w = costs(4)
        pool.solve(w)
        pool._processes[0].kill()
        pool._processes[0].join()
        assert np.array_equal(pool.solve(w), cheapest(w))


def test_a_chunk_that_always_ends_its_worker_is_named():
    with (
        LocalPool(lambda w: os._exit(1), 1, when="always", retries=1) as pool,
        pytest.raises(RuntimeError, match="chunk 0 lost its worker 2 times"),
    ):
        pool.solve(costs(4))


def test_a_solvers_error_comes_home():
    def refuses(w):
        raise ValueError("no instance pleases me")

    with LocalPool(refuses, 2, when="always") as pool:
        with pytest.raises(ValueError, match="no instance pleases me") as caught:
            pool.solve(costs(4))
        assert "in a worker of the pool" in caught.value.__notes__[0]
        pool.solver = FunctionSolver(cheapest)
        assert np.array_equal(pool.solve(costs(4)), cheapest(costs(4)))  # and the pool goes on


# Time limits


def sleeps_on_large(w):
    time.sleep(60 if w.max() > 1 else 0)
    return cheapest(w)


def late(batch=5):
    w = costs(4, batch=batch)
    w[2] = 2 + w[2]
    return w


def test_limit_skip():
    w = torch.from_numpy(late()).requires_grad_()
    with LocalPool(sleeps_on_large, 2, limit=TimeLimit(0.5, "skip")) as pool:
        start = time.monotonic()
        found = solve_with_status(w, pool, grad=Identity("none"))
        assert time.monotonic() - start < 20
        assert found.status.tolist() == [0, 0, Status.NOTHING, 0, 0]
        found.value.sum().backward()
        assert (w.grad[2] == 0).all()
        assert (w.grad[[0, 1, 3, 4]] == -1).all()


@pytest.mark.parametrize("then", ["fail", "best"])
def test_limit_fail(then):
    with (
        LocalPool(sleeps_on_large, 2, limit=TimeLimit(0.5, then)) as pool,
        pytest.raises(TimeoutError, match=r"1 of 5 instances were not solved .*instance 2, nothing feasible"),
    ):
        solve(torch.from_numpy(late()), pool, grad=Identity("none"))


def test_a_solvers_own_limit_goes_through():
    points = np.random.default_rng(0).normal(size=(4, 20, 2))
    w = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    with LocalPool(Tour(limit=TimeLimit(1e-4, "best")), 2, when="always") as pool:
        found = solve_with_status(torch.from_numpy(w), pool)
    assert (found.status == Status.BEST_FOUND).all()
    assert (found.value.sum((1, 2)) == 40).all()


# Where a batch is solved


def test_quick_instances_stay_in_process():
    with LocalPool(FunctionSolver(here), 2) as pool:
        for batch in (1, 2, 64, 512):
            assert (pool.solve(costs(4, batch=batch)) == os.getpid()).all()
        assert pool.pooled_calls == 0


def test_slow_instances_go_to_the_workers():
    def slow(w):
        time.sleep(0.02 * len(w))
        return here(w)

    with LocalPool(slow, 2) as pool:
        assert pool.solve(costs(4, batch=1))[0, 0] == os.getpid()  # one instance has nobody to share with
        first = pool.solve(costs(5, batch=16))
        assert (first[:7] == os.getpid()).all()  # 1, 2 and 4 of them are timed here, and used
        second = pool.solve(costs(5, batch=16))
        assert len(np.unique(second)) == 2
        assert os.getpid() not in second


def test_no_more_than_one_chunk_a_worker_is_sent():
    class Watched(LocalPool):
        most = 0

        def _submit(self, worker, costs):
            self.sent = getattr(self, "sent", 0) + 1
            Watched.most = max(Watched.most, self.sent)
            super()._submit(worker, costs)

        def _receive(self, worker):
            self.sent -= 1
            return super()._receive(worker)

    with Watched(cheapest, 2, limit=TimeLimit(10.0)) as pool:  # a limit sends each instance alone
        pool.solve(costs(4, batch=20))
    assert Watched.most == 2


class Counted(LocalPool):
    def _submit(self, worker, costs):
        self.sizes = [*getattr(self, "sizes", []), len(costs)]
        super()._submit(worker, costs)


def test_long_instances_are_dealt_out_a_few_at_a_time():
    """Unequal ones would leave a worker idle; what they take is known from the first call."""

    def slow(w):
        time.sleep(0.01 * len(w))
        return cheapest(w)

    w = costs(4, batch=16)
    with Counted(slow, 2, when="always") as pool:
        assert np.array_equal(pool.solve(w), cheapest(w))
        assert np.array_equal(pool.solve(w), cheapest(w))
        assert pool.sizes == [8, 8, *[2] * 8]
        for seconds, size in ((1e-6, 8), (1e-3, 5), (0.01, 2), (0.02, 2), (0.04, 1), (1.0, 1)):
            pool._seconds[4,] = seconds
            assert pool._chunk(w) == size


def test_a_pool_can_be_pickled_and_closed_twice():
    pool = LocalPool(ShortestPath(), 2, when="always")
    w = costs(4, 4)
    wanted = pool.solve(w)
    copy = pickle.loads(pickle.dumps(pool))
    pool.close()
    pool.close()
    assert np.array_equal(copy.solve(w), wanted)
    assert np.array_equal(pool.solve(w), wanted)
    copy.close()
    pool.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalPool(cheapest, -1), "workers: got -1"),
        (lambda: LocalPool(cheapest, 2, when="never"), "when: got 'never', wanted 'auto' or 'always'"),
        (lambda: LocalPool(cheapest, 0, limit=TimeLimit(1.0)), "limit: .* workers=0 has none"),
        (lambda: LocalPool(Solver), "solver: got"),
    ],
)
def test_wrong_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
