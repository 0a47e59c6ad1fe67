"""fit(): what a step is, exact resume, bad input."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

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


@pytest.mark.parametrize(
    ("stop", "grad"), [(1, Exact()), (4, Sampled(1, "weighted")), (8, Exact()), (12, Sampled(2))], ids=str
)
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


def test_a_paced_task_is_told_how_far_training_is_also_after_a_stop(tmp_path):
    class Paced(BagTask):
        def progress(self, share: float) -> None:
            told.append(share)

    told: list[float] = []
    plan = Plan(epochs=2, batch=4, seed=1)  # 6 steps
    model = make_task().model
    for watch in (StopAt(4), None):
        with contextlib.suppress(Stop):
            fit(Paced(model, ["no", "yes"]), make_bags(), [], plan=plan, checkpoints=Checkpoints(tmp_path), watch=watch)
    whole = [step / 6 for step in range(6)]
    assert told == pytest.approx([*whole[:4], *whole[3:]])  # the checkpoint is that of the first epoch's last step


def test_every_epoch_reads_every_set_once_in_an_order_of_its_own():
    plan = Plan(epochs=3, batch=4, seed=1)
    epochs = [[i for step in range(3) for i in plan.indices(epoch * 3 + step, 10)] for epoch in range(3)]
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


def test_without_a_monitor_the_last_weights_stay(tmp_path):
    bags, task = make_bags(8), make_task()
    fitted = fit(task, bags[:4], bags[4:], plan=Plan(epochs=3, batch=2, monitor=None), checkpoints=Checkpoints(tmp_path))
    assert fitted.best["step"] == fitted.step == 6
    for name, weight in task.model.state_dict().items():
        assert torch.equal(fitted.best["model"][name], weight)
    assert (tmp_path / "best" / "state.pt").exists()
    with pytest.raises(ValueError, match="patience: got no monitor"):
        fit(task, bags[:4], bags[4:], plan=Plan(monitor=None, patience=1))


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


UNEVEN = PLAN._replace(epochs=2, batch=11, evaluate_every=2)  # batches of 11 and 1 sets


def _fit_double(checkpoints: Checkpoints | None = None, watch: Watch | None = None):
    """In float64 with SGD, whose steps do not blow rounding up as Adam's do where a gradient is next to nothing."""
    bags = [Example(InMemory(b.set.elements.double(), 4, name=b.set.name), b.target) for b in make_bags()]
    task = make_task(Sampled(1))
    task.model.double()
    recipe = Optimisation(torch.optim.SGD, lr=0.1, clip=1.0)
    fitted = fit(task, bags, bags[:4], plan=UNEVEN, optimisation=recipe, checkpoints=checkpoints, watch=watch)
    return task.model.state_dict(), fitted.history


def _train_together(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(_fit_double(Checkpoints(Path(folder))), f"{folder}/rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_a_step_does_not_depend_on_the_number_of_workers(tmp_path):
    """Two workers, one of them without a set at every second step, go on from what one left: the same run to rounding."""
    weights, history = _fit_double()
    with pytest.raises(Stop):
        _fit_double(Checkpoints(tmp_path), StopAt(4))
    assert Checkpoints(tmp_path).load()["progress"]["step"] == 3
    mp.spawn(_train_together, args=(2, str(tmp_path)), nprocs=2)
    (first, first_history), (second, _) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert same(first, second)
    for name, value in weights.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)
    for got, want in zip(first_history, history, strict=True):
        assert got == pytest.approx(want, rel=1e-6)  # a logged loss travels as float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: got 0, wanted at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every: got -1"),
        ({"precision": "float16"}, "precision: got 'float16'"),
        ({"monitor": "auroc2"}, "monitor: got 'auroc2', which the task does not measure; did you mean 'auroc'?"),
        ({"patience": 0}, "patience: got 0"),
    ],
)
def test_plans_out_of_range(change, message):
    bags = make_bags(4)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        fit(make_task(), bags, bags, plan=Plan(epochs=1, batch=2)._replace(**change))


def test_patience_needs_validation_sets():
    with pytest.raises(ValueError, match="patience: got no validation sets"):
        fit(make_task(), make_bags(4), plan=Plan(patience=2))


def test_a_loss_that_is_not_finite_names_the_sets_and_spares_the_checkpoint(tmp_path):
    bags = make_bags(6)
    bags[3].set.elements[0, 0] = torch.inf
    plan = Plan(epochs=2, batch=1, checkpoint_every=1)
    bad = [plan.indices(step, 6) for step in range(6)].index([3])
    with pytest.raises(ValueError, match=rf"the loss is nan at step {bad + 1} \(sets bag-3\); lower optim.lr"):
        fit(make_task(), bags, plan=plan, checkpoints=Checkpoints(tmp_path))
    saved = Checkpoints(tmp_path).load()
    assert saved is None if bad == 0 else saved["progress"]["step"] == bad
    assert all(tensor.isfinite().all() for tensor in (saved or {"model": {}})["model"].values())


def test_train_mode_batchnorm_is_refused_at_the_first_step():
    encoder, head = deepsets(4, 1)
    encoder.phi.insert(1, nn.BatchNorm1d(128))
    task = BagTask.of(encoder, head, classes=["no", "yes"])
    with pytest.raises(ValueError, match=r"phi\.1 is a BatchNorm1d in training mode"):
        fit(task, make_bags(4), plan=Plan(epochs=1))


def test_logits_of_another_number_of_classes():
    encoder, head = deepsets(4, 2)
    task = BagTask.of(encoder, head, classes=["no", "yes"])
    with pytest.raises(ValueError, match=r"logits of shape \(2,\) for one set, wanted \(1,\) for the 2 classes no, yes"):
        fit(task, make_bags(4), plan=Plan(epochs=1))


def test_bfloat16_trains_and_resumes_to_the_same_bits(tmp_path):
    bags, plan = make_bags(6), PLAN._replace(epochs=2, precision="bfloat16")
    whole = make_task()
    fit(whole, bags, bags, plan=plan)
    with pytest.raises(Stop):
        fit(make_task(), bags, bags, plan=plan, checkpoints=Checkpoints(tmp_path), watch=StopAt(4))
    task = make_task()
    fit(task, bags, bags, plan=plan, checkpoints=Checkpoints(tmp_path))
    assert same(task.model.state_dict(), whole.model.state_dict())
    full = make_task()
    fit(full, bags, bags, plan=plan._replace(precision="float32"))
    assert not same(full.model.state_dict(), whole.model.state_dict())


def test_weight_decay_spares_biases_and_norms():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = Optimisation(lr=1.0, weight_decay=0.1).create(model).param_groups
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decayed[id(p)] for p in model.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_an_unused_parameter_is_treated_alike_by_every_number_of_workers():
    task = make_task()
    task.model.unused = nn.Parameter(torch.ones(2, 2))
    fit(task, make_bags(4), plan=Plan(epochs=1, batch=4), optimisation=Optimisation(lr=0.1, weight_decay=0.5))
    assert torch.all(task.model.unused < 1)  # decayed, as with several workers, whose all-reduce makes zeros of it


class _DiesWhileWriting(Checkpoints):
    """Writes half a file at the third save, as a killed process does."""

    saves = 0

    def _write(self, name, state):
        self.saves += name == "last"
        if self.saves == 3:
            path = self.folder / name / "state.pt"
            content = path.read_bytes()
            path.with_name("state.pt-killed.tmp").write_bytes(content[: len(content) // 2])
            raise Stop
        super()._write(name, state)


def test_half_a_checkpoint_is_never_taken_for_a_whole_one(tmp_path):
    bags = make_bags()
    whole = make_task()
    fit(whole, bags, bags[:6], plan=PLAN)
    with pytest.raises(Stop):
        fit(make_task(), bags, bags[:6], plan=PLAN, checkpoints=_DiesWhileWriting(tmp_path))
    task = make_task()
    fit(task, bags, bags[:6], plan=PLAN, checkpoints=Checkpoints(tmp_path))
    assert same(task.model.state_dict(), whole.model.state_dict())
    assert not list(tmp_path.rglob("*.tmp"))


def test_figures_may_change_on_the_way_but_not_the_past(tmp_path):
    """A run that takes up a change at a step ends as one that had it written down from the start."""
    bags, plan = make_bags(), Plan(epochs=4, batch=4, checkpoint_every=1)
    change = {"step": 5, "lr": 0.02, "weight_decay": 0.3, "clip": 0.5}
    checkpoints = Checkpoints(tmp_path / "run")

    def run(*changes, stop: int | None = None, folder: Path = tmp_path / "run") -> dict:
        task, watch = make_task(), None if stop is None else StopAt(stop)
        recipe = Optimisation(lr=0.01, clip=1.0, schedule="constant", changes=changes)
        fit(task, bags, plan=plan, optimisation=recipe, checkpoints=Checkpoints(folder), watch=watch)
        return task.model.state_dict()

    with pytest.raises(Stop):
        run(stop=6)
    assert checkpoints.load()["progress"]["step"] == 5
    with pytest.raises(ValueError, match=r"changes \[\] -> \[{'step': 4, 'lr': 0.5}\]"):
        run({"step": 4, "lr": 0.5})
    changed = run(change)
    assert checkpoints.load()["optimiser"]["param_groups"][0]["weight_decay"] == 0.3
    assert same(changed, run(change, folder=tmp_path / "whole"))
    assert not same(changed, run(folder=tmp_path / "unchanged"))
    rates = [Optimisation(lr=0.1, schedule="constant", changes=[change]).rate(step, 12) for step in (4, 5, 11)]
    assert rates == [0.1, 0.02, 0.02]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"step": 1, "warmup": 0.1}], r"changes\[0\]: got warmup, wanted a step and any of lr, weight_decay, clip"),
        ([{"lr": 0.1}], r"changes\[0\].step: got None"),
        ([{"step": 4, "lr": 0.1}, {"step": 2, "lr": 0.2}], r"changes\[1\].step: got 2 after 4, wanted rising steps"),
        ([{"step": 1, "lr": -0.1}], r"changes\[0\].lr: got -0.1, wanted a positive rate"),
    ],
)
def test_changes_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Optimisation(changes=changes)
