"""Problems that are no bags of a store: every task trains from the job, resumes, explains itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from idx_files import write_idx
from image_folders import write_celeba
from omegaconf import OmegaConf

from distset.build import build
from distset.problems.runs import check_problem, describe, load_problem
from distset.runs import RunFolder
from distset.tasks.offer_encoders import DeepDTA, ImageCNN
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


@pytest.mark.parametrize("seeds", ["[]", "[3,3]", "3"])
def test_seeds_that_make_no_runs_are_refused(seeds):
    with pytest.raises(ValueError, match=r"seeds: got .*wanted different numbers"):
        list(members(composed("task=oracle", f"seeds={seeds}")))


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


ODD = ["data.examples.sets=[6,3,3]", "data.examples.size=5"]
ENCODED = {
    "odd_images": ["encoder@task.encoder=image_cnn", "data.examples.chosen=[1,2]"],
    "celeba": ["encoder@task.encoder=image_cnn", "data.examples.chosen=[1,2]", "data.examples.side=25"],
    "compounds": ["encoder@task.encoder=deepdta", "data.examples.chosen=2", "data.examples.features=sequences"],
}


@pytest.fixture(scope="module")
def elements_that_are_no_vectors(tmp_path_factory) -> dict[str, str]:
    """The path of the data, by name."""
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder, count=200, side=28, classes=3)
    write_celeba(folder, [0] * 24 + [1] * 16 + [2] * 20)
    rows = [f"C{'N' * d},M{'K' * t},{d + 10 * t}" for d in range(7) for t in range(6)]
    (folder / "table.csv").write_text("\n".join(["drug,target,affinity", *rows]))
    return {"odd_images": str(folder), "celeba": str(folder), "compounds": str(folder / "table.csv")}


@pytest.mark.parametrize("method", ["idiffmf_2", "diffmf", "equivset_copula"])
@pytest.mark.parametrize("data", ENCODED)
def test_published_encoders_train_and_are_rebuilt(data, method, tmp_path, elements_that_are_no_vectors):
    chosen = ["task=oracle", f"method@task={method}", "task.width=8", "task.hidden=8", f"data={data}", *ODD, *ENCODED[data]]
    config = composed(*chosen, f"data.examples.path={elements_that_are_no_vectors[data]}", *SHORT)
    metrics = train_run(config, tmp_path)
    assert metrics["steps"] == 2
    assert set(metrics["baselines"]) == {"random", "classifier"}
    parts, task = build(config["data"]["examples"]), load_problem(RunFolder(tmp_path))
    again = task.metrics([task.predict(e.set).detach() for e in parts.test], [e.target for e in parts.test])
    assert again["jaccard"] == pytest.approx(metrics["test"]["jaccard"], abs=1e-12)
    assert isinstance(task.model.utility.encoder, {"compounds": DeepDTA}.get(data, ImageCNN))
    assert (tmp_path / "plots" / "chosen.png").is_file() == (data != "compounds")


def test_an_encoder_that_does_not_fit_the_data_is_named():
    config = composed("task=oracle", "encoder@task.encoder=deepdta", *SMALL, *SHORT)
    with pytest.raises(ValueError, match=r"encoder: got elements of 2 numbers.*data=compounds data.examples.features=seq"):
        check_problem(config)


STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
TASKS = {
    "terrain": ["data.examples.maps=[8,4,4]", "data.examples.size=6"],
    "keypoints": ["data.examples.pairs=[8,4,4]", "data.examples.n=4"],
    "graph_matching": ["data.examples.pairs=[8,4,4]", "data.examples.n=3", "data.examples.outliers=1"],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", TASKS)
def test_every_strategy_trains_every_made_solver_task(task, strategy, tmp_path):
    config = composed(f"task={task}", f"strategy@task.grad={strategy}", *TASKS[task], *SHORT)
    metrics = train_run(config, tmp_path)
    assert metrics["steps"] == 2
    assert np.isfinite(list(metrics["test"].values())).all()
    assert list((tmp_path / "plots").glob("*.png"))


def test_neighbours_of_true_and_found_paths_are_set_in_one_place():
    config = composed("task=terrain", "task.neighbours=4")
    assert config["task"]["neighbours"] == config["data"]["examples"]["neighbours"] == 4
    assert composed("task=keypoints", "data=terrain")["data"]["examples"]["neighbours"] == 8
