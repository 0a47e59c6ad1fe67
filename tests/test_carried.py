"""What a model learns without gradients, over several processes: alike on all of them, and on resumption."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_distributed_test
from torch import Tensor, nn

from distset import InMemory
from distset.checkpoints import Checkpoints
from distset.expect import IMLE, AdaptiveTarget, Past, ScoreFunction, expect
from distset.optim import Optimisation
from distset.sets import ChunkedSet
from distset.subsets import KSubset
from distset.train import Example, Plan, Watch, fit

RANKS, N, K = 2, 6, 3
PLAN = Plan(epochs=None, max_steps=12, batch=3, checkpoint_every=3, log_every=1, monitor=None)  # 10 sets: 3, 3, 3 and 1


class Model(nn.Module):
    """A subset of features, and every kind of state that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(N, dtype=torch.float64))
        self.past, self.target, self.norm = Past(N), AdaptiveTarget(step=0.05), nn.BatchNorm1d(N).double()
        self.register_buffer("fixed", torch.full((3,), 1 / 3, dtype=torch.float64))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


class FeatureTask:
    def __init__(self) -> None:
        self.model = Model()

    def loss(self, example: Example, *, seed: int) -> Tensor:
        x, subset = self.model.norm(example.set.elements), KSubset(self.model.logits, K)

        def cost(z: Tensor) -> Tensor:
            return ((z @ x.T).tanh() - example.target).square().mean(-1)

        self.model.scratch = torch.rand(1)  # nobody else's business
        learned = expect(cost, subset, 8, grad=ScoreFunction(self.model.past), seed=seed)
        return learned + expect(cost, subset, 4, grad=IMLE(self.model.target), seed=seed)

    def predict(self, set: ChunkedSet) -> Tensor:
        return self.model.logits.detach()

    def metrics(self, outputs: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, float]:
        return {"loss": 0.0}


class StopAt(Watch):
    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        if step == self.step:
            raise InterruptedError


def train(checkpoints: Checkpoints | None = None, watch: Watch | None = None, plan: Plan = PLAN) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(7, N, generator=generator, dtype=torch.float64) * (1 + i) for i in range(10)]
    examples = [Example(InMemory(x, name=str(i)), float(i % 2)) for i, x in enumerate(sets)]
    task = FeatureTask()
    fit(task, examples, plan=plan, optimisation=Optimisation(lr=0.1), checkpoints=checkpoints, watch=watch)
    return task.model.state_dict()


def train_on_a_rank(rank: int, folder: str) -> None:
    whole = train()
    with contextlib.suppress(InterruptedError):
        train(Checkpoints(f"{folder}/checkpoints"), StopAt(7))
    dist.barrier()
    resumed = train(Checkpoints(f"{folder}/checkpoints"))
    single = train(plan=PLAN._replace(max_steps=7, batch=1))  # rank 1 never has a set
    torch.save((whole, resumed, single), f"{folder}/rank-{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], ...]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_distributed_test(train_on_a_rank, RANKS, str(folder))
    return [torch.load(Path(folder) / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("run", [0, 1, 2], ids=["whole", "resumed", "one set a step"])
def test_all_ranks_carry_the_same(found, run: int) -> None:
    first, second = (states[run] for states in found)
    assert {"past.slope", "target.beta", "target.found", "norm.running_mean", "fixed"} <= first.keys()
    assert "scratch" not in first
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["past.slope"].abs().min() > 0
    assert first["target.found"] != 1
    assert torch.equal(first["fixed"], Model().fixed)


def test_a_resumed_run_of_several_ranks_has_the_bits_of_a_whole_one(found) -> None:
    whole, resumed, _ = found[0]
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_rank_without_sets_takes_over_what_the_other_learned(found) -> None:
    """One set a step: the run of one process, to its bits."""
    alone = train(plan=PLAN._replace(max_steps=7, batch=1))
    for name, value in alone.items():
        assert torch.equal(value, found[1][2][name]), name
