"""fit(): what a step is, exact resume, bad input."""

from __future__ import annotations

import copy

import pytest
import torch

from distset import Exact, InMemory, Sampled
from distset.checkpoints import Checkpoints
from distset.optim import Optimisation
from distset.tasks.bag_models import deepsets, umbc
from distset.tasks.bags import BagTask
from distset.train import Example, Plan, Watch, fit


def make_bags(count: int = 12, dim: int = 4) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    shifts = [i % 2 for i in range(count)]
    sets = [torch.randn(5 + i, dim, generator=generator) + shift for i, shift in enumerate(shifts)]
    return [Example(InMemory(x, chunk_size=4, name=f"bag-{i}"), shift) for i, (x, shift) in enumerate(zip(sets, shifts))]


def make_task(grad=None, dropout: float = 0.3, random_slots: bool = True) -> BagTask:
    torch.manual_seed(1)
    encoder, head = umbc(4, 1, slots=3, width=8, heads=2, random_slots=random_slots, dropout=dropout)
    return BagTask.of(encoder, head, classes=["no", "yes"], grad=grad)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Stop(Exception):
    pass


class StopAt(Watch):
    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        if step == self.step:
            raise Stop


PLAN = Plan(epochs=4, batch=5, seed=7, log_every=2, evaluate_every=4, checkpoint_every=3, monitor="auroc")


@pytest.mark.parametrize("stop", [1, 3, 4, 8, 12])
@pytest.mark.parametrize("grad", [Exact(), Sampled(1, "weighted")], ids=str)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, stop, grad):
    bags = make_bags()
    whole = make_task(grad)
    wanted = fit(whole, bags, bags[:6], plan=PLAN)
    with pytest.raises(Stop):
        fit(make_task(grad), bags, bags[:6], plan=PLAN, checkpoints=Checkpoints(tmp_path), watch=StopAt(stop))
    task = make_task(grad)
    with torch.no_grad():  # what the restarted process starts from does not matter
        for parameter in task.model.parameters():
            parameter.add_(1.0) if stop >= 4 else None
    resumed = fit(task, bags, bags[:6], plan=PLAN, checkpoints=Checkpoints(tmp_path))
    assert same(task.model.state_dict(), whole.model.state_dict())
    assert same(resumed.best["model"], wanted.best["model"])
    assert resumed.best["step"] == wanted.best["step"]
    assert resumed.history == wanted.history


def test_every_epoch_reads_every_set_once_in_an_order_of_its_own():
    plan = Plan(epochs=3, batch=4, seed=1)
    epochs = [sum((plan.indices(epoch * 3 + step, 10) for step in range(3)), []) for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert plan.indices(5, 10) == plan.indices(5, 10) != plan._replace(seed=2).indices(5, 10)
    assert plan.steps(10) == 9


def test_a_step_is_the_mean_over_its_batch():
    bags = make_bags(6)
    plan = Plan(epochs=1, batch=6)
    recipe = Optimisation(torch.optim.SGD, lr=0.5, schedule="constant")
    task, plain = make_task(dropout=0.0, random_slots=False), make_task(dropout=0.0, random_slots=False)
    fit(task, bags, plan=plan, optimisation=recipe)
    loss = torch.stack([plain.loss(bag, seed=0) for bag in bags]).mean()
    loss.backward()
    for trained, start in zip(task.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(trained, start - 0.5 * start.grad, rtol=1e-5, atol=1e-6)


def test_the_default_generator_is_left_as_it_was():
    bags = make_bags(4)
    task = make_task()
    torch.manual_seed(5)
    fit(task, bags, plan=Plan(epochs=1, batch=2))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_deepsets_learns_and_stops_early():
    bags = make_bags(20)
    encoder, head = deepsets(4, 1, width=16)
    task = BagTask.of(encoder, head, classes=["no", "yes"])
    plan = Plan(epochs=40, batch=4, monitor="auroc", patience=3)
    fitted = fit(task, bags[:12], bags[12:], plan=plan, optimisation=Optimisation(lr=0.01))
    assert fitted.stopped
    assert fitted.best["value"] == 1.0
    evaluations = [record["val/auroc"] for record in fitted.history if "val/auroc" in record]
    assert evaluations[-4] == 1.0 == max(evaluations)  # three evaluations without a better one
    assert fitted.best["step"] == fitted.step - 3 * 3


def test_foreign_checkpoints_are_refused(tmp_path):
    bags = make_bags(4)
    plan = Plan(epochs=1, batch=2)
    fit(make_task(), bags, plan=plan, checkpoints=Checkpoints(tmp_path))
    encoder, head = deepsets(4, 1)
    other = BagTask.of(encoder, head, classes=["no", "yes"])
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(ValueError, match=r"is of another model: it lacks encoder\.phi\.0\.weight"):
        fit(other, bags, plan=plan, checkpoints=Checkpoints(tmp_path))
    assert same(before, other.model.state_dict())
    with pytest.raises(ValueError, match=r"another plan \(batch 2 -> 3, training sets 4 -> 3\)"):
        fit(make_task(), bags[:3], plan=plan._replace(batch=3), checkpoints=Checkpoints(tmp_path))
    (tmp_path / "last" / "state.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        fit(make_task(), bags, plan=plan, checkpoints=Checkpoints(tmp_path))
