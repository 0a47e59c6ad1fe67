"""A black box on actors: the numbers of a plain call, sooner, also when an actor dies."""

import os
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent

pytest.importorskip("ray")

import ray

from distset.cluster.functions import RemoteFunction
from distset.expect import expect
from distset.subsets import KSubset

pytestmark = pytest.mark.ray


def cost(z: np.ndarray) -> np.ndarray:
    return (z @ np.arange(z.shape[-1])) ** 2


def simulator(z: np.ndarray) -> np.ndarray:
    time.sleep(0.05)
    return cost(z)


class DiesMidway:
    """Leaves a file for each call, and ends its process once when there are five."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, z: np.ndarray) -> np.ndarray:
        (self.folder / uuid.uuid4().hex).touch()
        if len(list(self.folder.iterdir())) >= 5 and not (self.folder / "died").exists():
            (self.folder / "died").touch()
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


def test_several_subsets_together(cluster) -> None:
    """A draw is two subsets of one batch row: f gives a value for each row."""

    def together(z: np.ndarray) -> np.ndarray:
        return cost(np.asarray(z)).prod(-1)

    def gradients(f) -> torch.Tensor:
        logits = torch.zeros(3, 2, 8, dtype=torch.float64, requires_grad=True)
        mean = expect(f, Independent(KSubset(logits, 3), 1), 8, seed=0)
        mean.sum().backward()
        return logits.grad

    remote = RemoteFunction(together, workers=1, piece=3)
    assert (gradients(remote) == gradients(together)).all()
    remote.close()


def test_an_actor_killed_midway_changes_nothing(cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 11 calls of 3 samples the fifth is lost and made again; never more than two an actor are on their way."""
    in_flight, wait = [], ray.wait

    def watched(refs, **settings):
        in_flight.append(len(refs))
        return wait(refs, **settings)

    monkeypatch.setattr(ray, "wait", watched)
    remote = RemoteFunction(DiesMidway(tmp_path), workers=2, piece=3, in_flight=2)
    assert (gradient(remote) == gradient(lambda z: cost(np.asarray(z)))).all()
    remote.close()
    calls = {path.name for path in tmp_path.iterdir()}
    assert "died" in calls
    again = len(calls - {"died"}) - 11
    assert again in (1, 2)  # the lost one, and one whose answer was on its way from the same actor
    assert max(in_flight) == 4


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
