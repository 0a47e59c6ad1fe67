"""The alarm for collapsing costs: it rings once, also across a break, and every task with a solver has one."""

import warnings

import pytest
import torch

from distset.checkpoints import Checkpoints
from distset.collapse import CollapseAlarm
from distset.noise import TwoPoint
from distset.optim import Optimisation
from distset.problems import globe, keypoints, terrain
from distset.seeds import seeded
from distset.sets import InMemory
from distset.solve import Identity
from distset.tasks.globe_tsp import globe_task
from distset.tasks.keypoints import matching_task
from distset.tasks.retrieval import retrieval_task
from distset.tasks.terrain import terrain_task
from distset.train import Example, Plan, Watch, fit, predict_all


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_rings_once_and_where_it_was_called():
    alarm, w = CollapseAlarm(), randn(8, 5)
    assert alarm(w) == pytest.approx(w.norm(dim=1).mean().item())
    alarm(0.11 * w)
    assert alarm.figures(w)["collapsed"] == 0
    with pytest.warns(UserWarning, match="the costs collapse; use a projection") as said:
        alarm(0.09 * w)
    assert said[0].filename == __file__
    alarm(0.01 * w)
    assert alarm.figures(w) == {"cost_norm": pytest.approx(w.norm(dim=1).mean().item()), "collapsed": 1}


def test_it_takes_grids():
    w = randn(8, 3, 5)
    assert CollapseAlarm(ndim=2)(w) == pytest.approx(w.flatten(1).norm(dim=1).mean().item())


# In training


@pytest.fixture(scope="module")
def tours():
    """Made flags whose tours of 4 a bare Identity collapses within a few steps: most chords are part of a tour."""
    points = torch.nn.functional.normalize(randn(12, 3), dim=-1)
    world = globe.Globe(torch.rand(12, 3, 20, 40, generator=torch.Generator().manual_seed(0)), points, torch.zeros(12, 2))
    countries = world.combinations(40, 4, seed=0)
    return globe.Combinations(world, countries, world.tours(countries))


class Stop(Watch):
    def __init__(self, at):
        self.at = at

    def stepped(self, step, sets, elements, loss):
        if step == self.at:
            raise KeyboardInterrupt


def train(tours, strategy, folder=None, watch=None):
    """12 steps with a checkpoint after each; the task, of the same weights every time."""
    with seeded(0, torch.device("cpu")):
        # The published loss: its gradient moves the costs of right tours, too.
        task = globe_task(size=(20, 40), grad=strategy, loss="hamming")
    plan = Plan(epochs=None, max_steps=12, batch=20, monitor=None, checkpoint_every=1)
    adam = Optimisation(torch.optim.Adam, lr=1e-3, schedule="constant")
    fit(task, tours, plan=plan, optimisation=adam, checkpoints=folder and Checkpoints(folder), watch=watch)
    return task, task.metrics(*predict_all(task, tours))


def test_it_rings_in_a_bare_run_and_not_in_one_with_a_margin(tours):
    with pytest.warns(UserWarning, match="the costs collapse"):
        _, bare = train(tours, Identity("none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, kept = train(tours, Identity(margin=TwoPoint(0.2)))
    assert bare["collapsed"] == 1
    assert kept["collapsed"] == 0
    assert bare["cost_norm"] < 0.1 * kept["cost_norm"]


@pytest.mark.parametrize("at", [6, 10], ids=["before it rang", "after it rang"])
def test_it_goes_on_from_a_checkpoint(tours, tmp_path, at):
    with pytest.warns(UserWarning, match="the costs collapse") as rings:
        whole, wanted = train(tours, Identity("none"), tmp_path / "whole")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            train(tours, Identity("none"), tmp_path / "broken", Stop(at))
        assert len(said) == (at == 10)
        again, found = train(tours, Identity("none"), tmp_path / "broken")
    assert [str(each.message) for each in said] == [str(rings[0].message)]
    assert found == wanted
    assert found["collapsed"] == 1
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))


def images():
    labels = torch.arange(32) % 4
    return [Example(InMemory(randn(32, 12), name="images"), labels)]


TASKS = {
    "terrain": lambda: (terrain_task(), terrain.drawn((2, 1, 1), size=6).train),
    "keypoints": lambda: (matching_task(n=4), keypoints.clouds((2, 1, 1), n=4).train),
    "retrieval": lambda: (retrieval_task(shape=(12,), width=4), images()),
}


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_every_task_with_a_solver_has_one(make):
    task, examples = make()
    assert {"alarm.first", "alarm.rung"} < set(task.model.state_dict())
    task.batch_loss(examples, seed=0)
    before = task.metrics(*predict_all(task, examples))
    assert before["collapsed"] == 0
    assert before["cost_norm"] > 0
    with torch.no_grad():  # with these weights each network says the same of everything, and softplus says 0
        for parameter in task.model.parameters():
            parameter.fill_(-10)
    with pytest.warns(UserWarning, match="the costs collapse"):
        task.batch_loss(examples, seed=0)
    after = task.metrics(*predict_all(task, examples))
    assert after["collapsed"] == 1
    assert after["cost_norm"] < 0.1 * before["cost_norm"]
