"""Training on Ray Train workers: the same run as in one process, and no bit lost where a worker dies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from distset import InMemory, Sampled
from distset.checkpoints import Checkpoints, read_state
from distset.cluster.config import Cluster
from distset.cluster.storage import StorageCheckpoints
from distset.cluster.train import train_on_ray
from distset.optim import Optimisation
from distset.run_log import RunLog
from distset.tasks.bag_models import umbc
from distset.tasks.bags import BagTask
from distset.train import Example, Plan, Watch, fit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
PLAN = Plan(epochs=4, batch=5, log_every=2, checkpoint_every=2, evaluate_every=3)


def process_of(
    folder: Path | str, kill_at: int | None = None, *, mark: Path | None = None, poison: bool = False, dtype=torch.float32
):
    """A process for `train_on_ray`; made inside a function, so that it travels by value."""

    def process(*, watch: Watch, device: torch.device):
        generator = torch.Generator().manual_seed(3)
        bags = [
            Example(InMemory((torch.randn(4 + i, 3, generator=generator) + i % 2).to(dtype), 3, name=f"bag-{i}"), i % 2)
            for i in range(12)
        ]
        if poison:
            bags[5].set.elements.fill_(torch.nan)
        torch.manual_seed(0)
        task = BagTask.of(*umbc(3, 1, slots=2, width=8, heads=2, dropout=0.2), classes=["no", "yes"], grad=Sampled(1))
        task.model.to(device, dtype)
        if kill_at is not None:
            watch = Killing(watch, kill_at, (mark or Path(folder)) / "killed")
        checkpoints = StorageCheckpoints(folder) if "://" in str(folder) else Checkpoints(folder)
        recipe = Optimisation(torch.optim.SGD, lr=0.1)
        return fit(task, bags, bags[:6], plan=PLAN, optimisation=recipe, checkpoints=checkpoints, watch=watch).history

    class Killing(Watch):
        """Ends its process with SIGKILL after a step, once."""

        def __init__(self, watch: Watch, step: int, mark: Path) -> None:
            self.watch, self.at, self.mark = watch, step, mark
            self.started, self.recorded = watch.started, watch.recorded

        def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
            self.watch.stepped(step, sets, elements, loss)
            if step == self.at and not self.mark.exists():
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    return process


def same(a: Path, b: Path) -> bool:
    """Whether two folders of checkpoints hold the same last and best weights, bit for bit."""
    states = [[read_state(folder / which / "state.pt")["model"] for which in ("last", "best")] for folder in (a, b)]
    pairs = zip(*states)
    return all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs)


def alone(folder: Path, **how) -> list[dict[str, float]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    history = process_of(folder, **how)(watch=Watch(), device=torch.device("cpu"))
    torch.set_num_threads(threads)
    return history


def test_a_killed_worker_is_replaced_and_no_bit_is_lost(tmp_path):
    """One worker, killed between two checkpoints; the run folder's lines are those of a run that was not."""
    history = alone(tmp_path / "alone")
    folder = tmp_path / "ray"
    folder.mkdir()
    with RunLog(folder, bar=False) as log:
        got = train_on_ray(process_of(folder, kill_at=7), Cluster(workers=1), watch=log)
    assert (folder / "killed").exists()
    assert same(folder, tmp_path / "alone")
    assert got == history
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == history
    assert "goes on at step 6 of 12" in (folder / "train.log").read_text()


@pytest.mark.slow
def test_two_workers_make_the_steps_of_one_and_survive_a_death(tmp_path):
    """In float64; the batches of 5, 5 and 2 sets divide unevenly. Bits within a layout, rounding between them."""
    history = alone(tmp_path / "alone", dtype=torch.float64)
    for name, kill_at in (("calm", None), ("killed", 7)):
        (tmp_path / name).mkdir()
        got = train_on_ray(process_of(tmp_path / name, kill_at, dtype=torch.float64), Cluster(workers=2))
        assert got == [pytest.approx(record, rel=1e-6) for record in history]  # a logged loss travels as float32
    assert (tmp_path / "killed" / "killed").exists()
    assert same(tmp_path / "calm", tmp_path / "killed")
    one, two = (read_state(tmp_path / name / "last" / "state.pt")["model"] for name in ("alone", "calm"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_checkpoints_in_storage_named_by_uri(tmp_path):
    history = alone(tmp_path / "alone")
    (tmp_path / "marks").mkdir()
    uri = f"file://{tmp_path}/stored"
    got = train_on_ray(process_of(uri, kill_at=7, mark=tmp_path / "marks"), Cluster(workers=1))
    assert got == history
    StorageCheckpoints(uri).fetch(tmp_path / "fetched")
    assert same(tmp_path / "fetched", tmp_path / "alone")
    assert (tmp_path / "marks" / "killed").exists()


@pytest.mark.slow
def test_bad_input_on_a_worker_is_one_message(tmp_path):
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"^loss: the loss is nan at step \d+ \(sets .*bag-5") as error:
            train_on_ray(process_of(tmp_path / str(workers), poison=True), Cluster(workers=workers))
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_a_bug_is_not_tried_again_and_shows_where_it_is():
    def process(*, watch: Watch, device: torch.device) -> None:
        {}["no such key"]

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'no such key'"):
        train_on_ray(process, Cluster(workers=1))


@pytest.mark.slow
def test_a_worker_that_always_dies_is_given_up():
    def process(*, watch: Watch, device: torch.device) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="cluster: training failed after 0 restarts"):
        train_on_ray(process, Cluster(workers=1, max_failures=0))
