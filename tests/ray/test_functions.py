"""A black box on actors: the numbers of a plain call, sooner, also when an actor dies."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

from distset.cluster.functions import RemoteFunction
from distset.expect import expect
from distset.subsets import KSubset

pytestmark = pytest.mark.ray


def cost(z: np.ndarray) -> np.ndarray:
    return (z @ np.arange(z.shape[-1])) ** 2


def simulator(z: np.ndarray) -> np.ndarray:
    time.sleep(0.05)
    return cost(z)


class DiesOnce:
    """Ends its process at the first call that finds no mark on the disk."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self, z: np.ndarray) -> np.ndarray:
        if not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return cost(z)


class Dies:
    def __call__(self, z: np.ndarray) -> np.ndarray:
        os._exit(1)


def gradient(f) -> torch.Tensor:
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    expect(f, KSubset(logits, 3), 32, seed=0).backward()
    assert logits.grad is not None
    return logits.grad


def test_the_numbers_of_a_plain_call(cluster) -> None:
    remote = RemoteFunction(cost, workers=2, piece=5)
    assert (gradient(remote) == gradient(lambda z: cost(np.asarray(z)))).all()
    remote.close()


def test_a_dead_actor_changes_nothing(cluster, tmp_path: Path) -> None:
    remote = RemoteFunction(DiesOnce(tmp_path / "died"), workers=2, piece=3)
    assert (gradient(remote) == gradient(lambda z: cost(np.asarray(z)))).all()
    assert (tmp_path / "died").exists()
    remote.close()


def test_two_actors_are_nearly_twice_as_fast_as_one(cluster) -> None:
    """The simulator sleeps, so the ratio holds on a busy machine too."""
    seconds = []
    for workers in (1, 2):
        remote = RemoteFunction(simulator, workers=workers)
        remote.start()
        rounds = []
        for _ in range(3):
            begin = time.perf_counter()
            gradient(remote)
            rounds.append(time.perf_counter() - begin)
        seconds.append(min(rounds))
        remote.close()
    assert seconds[0] / seconds[1] >= 1.8


def test_what_goes_wrong_is_said(cluster) -> None:
    bad = RemoteFunction(lambda z: z, workers=1)
    with pytest.raises(ValueError, match="f: returned shape"):
        bad(torch.zeros(2, 4))
    bad.close()
    dead = RemoteFunction(Dies(), workers=1, retries=1)
    with pytest.raises(RuntimeError, match="died 2 times"):
        dead(torch.zeros(2, 4))
    dead.close()
    with pytest.raises(ValueError, match="piece: got 0"):
        RemoteFunction(cost, piece=0)
