"""The set-encoder experiments train from the job: every model, gradient and data set runs two steps, and draws."""

from __future__ import annotations

import zipfile
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from idx_files import write_idx
from omegaconf import OmegaConf

from distset.training import train_run
from jobs._overrides import CONF

SHORT = ["plan.epochs=null", "plan.max_steps=2", "plan.batch=2", "plan.log_every=1", "run.bar=false", "cluster=none"]
CLUSTERING = sorted(path.stem for path in (CONF / "model" / "clustering").glob("*.yaml"))
POINTS = ["data.examples.sets=[8,2,2]", "data.examples.size=32", "model.width=16"]


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=[*overrides, *SHORT]), resolve=True)


@pytest.mark.parametrize("model", CLUSTERING)
def test_every_clustering_model_trains(model, tmp_path):
    whole = model in ("set_transformer", "fspool", "diffem")
    grad = ["grad=full", "data.examples.chunk_size=null"] if whole else []
    config = composed("task=clustering", f"model=clustering/{model}", "run.plots=false", *POINTS, *grad)
    metrics = train_run(config, tmp_path)
    assert metrics["steps"] == 2
    assert metrics["test"]["loss"] > metrics["baselines"]["true_mixture"]


def test_the_activation_is_an_option_of_every_model_with_slots():
    """Of the three tasks; a hierarchy of slot set encoders keeps the published one."""
    for task in ("clustering", "completion", "documents"):
        for path in sorted((CONF / "model" / task).glob("*.yaml")):
            if path.stem.startswith(("umbc", "sse")):
                config = composed(
                    f"task={task}", f"model={task}/{path.stem}", "model.activation=slot-exp", *given_path(task)
                )
                assert config["model"]["activation"] == "slot-exp"


def given_path(task: str) -> list[str]:
    return [] if task == "clustering" else ["data.examples.path=somewhere"]


@pytest.mark.parametrize("grad", ["exact", "full", "subset"])
def test_clustering_with_every_gradient(grad, tmp_path):
    config = composed("task=clustering", "data=mixtures_wide", f"grad={grad}", "run.plots=false", *POINTS)
    assert train_run(config, tmp_path)["test"]["loss"] > 0


def test_clustering_draws_its_pictures(tmp_path):
    train_run(composed("task=clustering", *POINTS), tmp_path)
    assert {"clusterings.png", "streams.png", "streams_nll.png", "loss.png"} <= {
        path.name for path in (tmp_path / "plots").iterdir()
    }


COMPLETION = sorted(path.stem for path in (CONF / "model" / "completion").glob("*.yaml"))
PIXELS = [
    "data.examples.images=[8,2,2]",
    "data.examples.side=8",
    "data.examples.contexts=[20,40]",
    "task.context=[20,40]",
    "task.chunk_size=10",
    "task.targets=30",
    "task.width=8",
]


@pytest.mark.parametrize("model", COMPLETION)
def test_every_completion_model_trains(model, tmp_path):
    write_idx(tmp_path)
    whole = ["grad=full", "task.chunk_size=null", "data.examples.chunk_size=null"] if model == "set_transformer" else []
    plots = f"run.plots={'true' if model == 'deepsets' else 'false'}"
    given = [f"data.examples.path={tmp_path}", plots, *PIXELS, *whole]
    metrics = train_run(composed("task=completion", f"model=completion/{model}", *given), tmp_path / "run")
    assert {"loss", "context/20", "context/40", "rmse"} <= set(metrics["test"])
    assert (tmp_path / "run" / "plots" / "completions.png").exists() == (model == "deepsets")


DOCUMENTS = sorted(path.stem for path in (CONF / "model" / "documents").glob("*.yaml"))


@pytest.mark.parametrize("model", DOCUMENTS)
def test_every_document_model_trains(model, tmp_path):
    if model == "umbc_bert":
        pytest.importorskip("transformers")
    with zipfile.ZipFile(tmp_path / "movie_reviews.zip", "w") as file:
        for number in range(20):
            kind, word = (("neg", "dull"), ("pos", "fine"))[number % 2]
            file.writestr(f"movie_reviews/{kind}/cv{number // 2}{number:02d}_1.txt", f"a {word} film of {number} minutes")
    given = [f"data.examples.path={tmp_path}", "data.examples.chunk_size=2", "model.width=8", "run.plots=false"]
    metrics = train_run(composed("task=documents", f"model=documents/{model}", *given), tmp_path / "run")
    assert {"loss", "micro_f1", "macro_f1"} == set(metrics["test"])
    assert metrics["baselines"]["naive_bayes"] == 1.0
