"""Searches on Ray Tune: trials fail, stop, go on, take over; the best one is trained again from its configuration."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from distset.cluster import tune
from distset.cluster.config import Cluster
from distset.data import Bag, Split, StoreWriter
from distset.runs import RunFolder
from distset.search import Search
from distset.search.run import run_search
from distset.search.trial import TrialFolder
from distset.training import train_run
from jobs import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
TINY = (
    *("task=oracle", "method@task=diffmf", "data.examples.sets=12", "data.examples.size=20", "data.examples.chosen=3"),
    *("plan.epochs=null", "plan.max_steps=12", "plan.batch=4", "plan.evaluate_every=2", "plan.patience=null"),
    *("run.bar=false", "run.plots=false"),
)


def search(folder: Path, *overrides: str) -> str:
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("tune", overrides=[*TINY, *overrides, f"run.dir={folder}"]), resolve=True)
    return run_search(config, folder)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("trials/*/trial.json"))]


@pytest.fixture
def threads():
    """Sets the threads of this process, and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def train_best(folder: Path, monkeypatch, threads) -> Path:
    """What best/command.txt says, in this process."""
    command = (folder / "best" / "command.txt").read_text().split()
    if command[0].startswith("OMP_NUM_THREADS="):
        threads(int(command.pop(0).partition("=")[2]))
    assert command[:3] == ["python", "-m", "jobs.train"]
    monkeypatch.setattr(sys, "argv", command[2:])
    train.main()
    return folder / "best" / "run"


def check_best(folder: Path, monkeypatch, threads) -> dict[str, Any]:
    """The best trial's command ends with the trial's own figures, to the last bit; returns search.json."""
    found = json.loads((folder / "search.json").read_text())
    again, trial = train_best(folder, monkeypatch, threads), folder / "trials" / f"{found['best']['number']:04d}" / "run"
    for name in ("metrics.json", "metrics.jsonl"):
        assert (again / name).read_text() == (trial / name).read_text()
    metrics = json.loads((again / "metrics.json").read_text())
    assert metrics["val"][found["metric"].removeprefix("val/")] == found["best"]["value"]
    return found


def test_a_failing_trial_is_reported_and_the_search_goes_on(tmp_path, monkeypatch, capfd, threads):
    grid = ("search=grid", "~search.space.optim.weight_decay", "search.space.optim.lr.grid=[0.001,0.01]")
    args = (*grid, "+search.space.data.examples.chosen={grid:[3,40]}")
    said = search(tmp_path, *args, "search.concurrency=1")
    assert [record["status"] for record in records(tmp_path)] == ["finished", "failed", "finished", "failed"]
    assert "4 trials: 2 finished, 2 failed" in said
    assert "40" in records(tmp_path)[1]["error"]
    assert "Traceback" in (tmp_path / "trials" / "0003" / "error.txt").read_text()
    out, err = capfd.readouterr()
    assert len([line for line in out.splitlines() if line.startswith("trial 000")]) == 4
    assert not err
    found = check_best(tmp_path, monkeypatch, threads)
    # A trial that was killed before it was done goes on; the finished one stays, the others are tried again.
    killed, kept = TrialFolder(tmp_path / "trials" / "0002"), tmp_path / "trials" / "0000"
    before = killed.record
    killed.write("running", killed.lineage)
    (killed.run / "metrics.json").unlink()
    stamp = (kept / "trial.json").stat().st_mtime_ns
    capfd.readouterr()
    search(tmp_path, *args, "search.concurrency=2")
    assert "3 of 4 trials to train" in capfd.readouterr().out
    assert killed.record == before
    assert (kept / "trial.json").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "search.json").read_text()) == found
    with pytest.raises(ValueError, match=r"run.dir: .* holds a search of another configuration \(plan.batch 4 -> 5"):
        search(tmp_path, *args, "plan.batch=5")


def test_what_a_trial_asks_for_and_how_many_run_at_a_time(cluster):
    """Its actors have places of their own; workers' trials are as many as asked for, or find room."""

    def asked(concurrency: int | None = None, **how: Any) -> list[dict[str, float]]:
        return tune._resources(Search(concurrency=concurrency), Cluster(**how), trials=16).bundles

    assert asked(workers=0, cpus=0.5) == [{"CPU": 0.5}]
    assert asked(workers=0, actors=2, actor_resources={"own": 1}) == [{"CPU": 1}, *2 * [{"CPU": 1, "own": 1}]]
    places = [next(iter(asked(n, workers=2)[0].values())) for n in (None, 1, 7)]  # of the one that this machine is
    assert [int(1 / place) for place in places] == [2, 1, 7]


@pytest.mark.slow
def test_trials_with_actors_do_not_starve_each_other(tmp_path):
    """Four cores, three for each trial: one after the other, and none waits for its actors in vain."""
    write_bags(tmp_path / "store")
    bags = ("search=grid", "~search.space.optim.weight_decay", "model=deepsets", "plan.epochs=1", "plan.max_steps=null")
    found = search_bags(tmp_path, *bags, "cluster.actors=2")
    assert [record["status"] for record in found] == ["finished"] * 3


@pytest.mark.slow
def test_a_search_over_folds(tmp_path):
    """A trial's figure is the mean over its folds, at the weights that each keeps."""
    write_bags(tmp_path / "store")
    found = search_bags(tmp_path, "search=asha", "search.trials=3", "folds=all", "plan.epochs=2", "plan.max_steps=null")
    best = json.loads((tmp_path / "search" / "search.json").read_text())["best"]
    assert found[best["number"]]["status"] == "finished"
    assert {record["status"] for record in found} <= {"finished", "stopped"}
    values = []
    for fold in (0, 1):
        run = tmp_path / "search" / "trials" / f"{best['number']:04d}" / "run" / f"fold-{fold}"
        told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        values.append(min(record["val/loss"] for record in told if "val/loss" in record))
    assert found[best["number"]]["values"] == {"fold-0": values[0], "fold-1": values[1]}
    assert best["value"] == pytest.approx(sum(values) / 2, abs=1e-15)
    assert min(record["value"] for record in found) == best["value"]


def write_bags(path: Path) -> None:
    generator = np.random.default_rng(0)
    ids = [f"bag-{i}" for i in range(12)]
    with StoreWriter(path) as writer:
        for i, set_id in enumerate(ids):
            writer.add(Bag(set_id, generator.normal(i % 2, 1, (20 + i, 6)).astype(np.float32), label=str(i % 2)))
        writer.finish(splits=[Split(ids[:8], ids[8:10], ids[10:]), Split(ids[4:], ids[:2], ids[2:4])])


def search_bags(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    chosen = ("data=store", f"data.path={folder}/store", "data.chunk_size=8", "plan.batch=4", "plan.patience=null")
    with initialize_config_module("conf", version_base="1.3"):
        said = [*chosen, "plan.evaluate_every=1", "run.bar=false", "run.plots=false", f"run.dir={folder}/search", *overrides]
        config = OmegaConf.to_container(compose("tune", overrides=said), resolve=True)
    run_search(config, folder / "search")
    return records(folder / "search")


@pytest.mark.slow
def test_a_population_takes_over_states_and_its_best_trial_is_trained_again(tmp_path, monkeypatch, threads):
    """Rates from useless to good, two trials at a time in turns: the useless ones take over the good ones' state."""
    args = ("search=pbt", "search.trials=4", "search.scheduler.every=30", "search.scheduler.quantile=0.5", "cluster.cpus=2")
    search(tmp_path, *args, "search.space.optim.lr.loguniform=[1e-6,1e-1]", "search.seed=3")
    found = records(tmp_path)
    assert [record["status"] for record in found] == ["finished"] * 4
    assert [record["number"] for record in found] == [0, 1, 2, 3]
    taken = [record for record in found if record["changes"]]
    assert taken
    for record in taken:
        steps = [change["step"] for change in record["changes"]]
        assert steps == sorted(steps)
        assert all(0 < step < 12 and step % 2 == 0 for step in steps)
    # Any trial's configuration, its changes written down, trains to what the trial came to.
    name = tmp_path / "trials" / f"{taken[0]['number']:04d}" / "run"
    threads(2)
    train_run(RunFolder(name).config, tmp_path / "again")
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == (name / "metrics.jsonl").read_text()
    check_best(tmp_path, monkeypatch, threads)


@pytest.mark.slow
def test_trials_are_runs_on_ray_train_workers_of_their_own(tmp_path, monkeypatch, threads, cluster):
    """Two workers a trial, of half a core each; a trial that is stopped gives them back and stays stopped."""
    args = ("search=asha", "search.trials=null", "search.scheduler.grace=20", "search.scheduler.factor=2")
    args += ("~search.space.optim.weight_decay", "~search.space.optim.lr", "+search.space.optim.lr={grid:[0.01,1e-7]}")
    search(tmp_path, *args, "search.concurrency=1", "cluster=local", "cluster.workers=2", "cluster.cpus=0.5")
    found = records(tmp_path)
    assert [record["status"] for record in found] == ["finished", "stopped"]
    again = train_best(tmp_path, monkeypatch, threads)
    best = json.loads((tmp_path / "search.json").read_text())["best"]
    first = tmp_path / "trials" / f"{best['number']:04d}" / "run"
    assert (again / "metrics.json").read_text() == (first / "metrics.json").read_text()
    assert json.loads((again / "metrics.json").read_text())["val"]["jaccard"] == best["value"]
    end = time.monotonic() + 30
    while cluster.available_resources()["CPU"] < 4:  # what a run that has just ended held comes back within moments
        assert time.monotonic() < end
        time.sleep(0.2)
