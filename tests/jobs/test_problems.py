"""Problems that are no bags of a store: every task trains from the job, resumes, explains itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from distset.build import build
from distset.problems.runs import describe, load_problem
from distset.runs import RunFolder
from distset.training import members, train_run
from jobs._overrides import CONF

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SMALL = ["data.examples.sets=12", "data.examples.size=20", "data.examples.chosen=3"]
SHORT = ["plan.epochs=null", "plan.max_steps=2", "plan.batch=4", "plan.log_every=1", "run.bar=false", "cluster=none"]


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_oracle_method_trains_and_is_rebuilt(method, tmp_path):
    config = composed("task=oracle", f"method@task={method}", *SMALL, *SHORT)
    metrics = train_run(config, tmp_path)
    assert metrics["steps"] == 2
    assert 0 <= metrics["test"]["jaccard"] <= 1
    assert {"predicted_size/jaccard", "threshold/jaccard", "greedy/jaccard"} <= set(metrics["test"])
    assert set(task_rules := metrics["rules"]) >= {name for name in metrics["test"] if name != "loss"}
    assert task_rules["greedy/jaccard"].startswith("greedy ascent of F, size known")
    parts = build(config["data"]["examples"])
    task = load_problem(RunFolder(tmp_path))
    again = task.metrics([task.predict(e.set).detach() for e in parts.test], [e.target for e in parts.test])
    assert again["jaccard"] == pytest.approx(metrics["test"]["jaccard"], abs=1e-12)


def test_a_finished_problem_is_left_and_a_changed_one_refused(tmp_path):
    config = composed("task=oracle", "method@task=diffmf", *SMALL, *SHORT)
    first = train_run(config, tmp_path)
    assert train_run(config, tmp_path) == first
    with pytest.raises(ValueError, match=r"run.dir: .* holds a run of another configuration \(task.samples 5 -> 7"):
        train_run({**config, "task": {**config["task"], "samples": 7}}, tmp_path)


def test_seeds_and_folds_make_members():
    config = composed("task=oracle", "data=registry", "data.examples.path=x", "folds=all", "seeds=[3,5]")
    found = dict(members(config))
    assert list(found) == [f"fold-{fold}-seed-{seed}" for fold in range(3) for seed in (3, 5)]
    assert found["fold-2-seed-5"]["data"]["examples"]["fold"] == 2
    assert found["fold-2-seed-5"]["seed"] == 5


def test_the_registry_reports_its_baselines(tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(map(str, 1 + rng.choice(40, rng.integers(3, 6), replace=False))) for _ in range(60)]
    (tmp_path / "ids.csv").write_text("\n".join(lines))
    config = composed(
        "task=oracle", "method@task=diffmf", "data=registry", f"data.examples.path={tmp_path / 'ids.csv'}", *SHORT
    )
    metrics = train_run(config, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(stored["baselines"]) == {"random", "most_popular", "classifier"}
    assert stored["rules"]["offers"] == "registry, rest random"
    assert "offers: registry, rest random" in describe(metrics)


STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
TASKS = {
    "terrain": ["data.examples.maps=[8,4,4]", "data.examples.size=6"],
    "keypoints": ["data.examples.pairs=[8,4,4]", "data.examples.n=4"],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", TASKS)
def test_every_strategy_trains_every_made_solver_task(task, strategy, tmp_path):
    config = composed(f"task={task}", f"strategy@task.grad={strategy}", *TASKS[task], *SHORT)
    metrics = train_run(config, tmp_path)
    assert metrics["steps"] == 2
    assert np.isfinite(list(metrics["test"].values())).all()
    assert list((tmp_path / "plots").glob("*.png"))
