"""The subset tasks from the job: every estimator trains two steps, is rebuilt, and draws its pictures."""

from __future__ import annotations

import copy
import functools
import gzip
import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from distset.build import build
from distset.problems.pixels import neighbours
from distset.problems.runs import load_problem
from distset.runs import RunFolder
from distset.training import train_run
from jobs._overrides import CONF

ESTIMATORS = sorted(path.stem for path in (CONF / "estimator").glob("*.yaml"))
SHORT = [
    "plan.epochs=null", "plan.max_steps=2", "plan.log_every=1", "plan.evaluate_every=2", "plan.checkpoint_every=2",
    "run.bar=false", "cluster=none", "task.num_samples=6",
]  # fmt: skip


@functools.cache
def _composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)


def composed(*overrides: str, grad: str | None = None) -> dict[str, Any]:
    """As on the command line; ``grad`` is a file of conf/estimator, read once the rest is composed, which saves time."""
    config = copy.deepcopy(_composed(*overrides))
    if grad is not None:
        config["task"]["grad"] = yaml.safe_load((CONF / "estimator" / f"{grad}.yaml").read_text())
        config["run"]["plots"] = grad == "ridge"
    return config


def test_an_estimator_is_chosen_by_its_group() -> None:
    """`composed(grad=...)` is what the command line makes."""
    typed = _composed(
        "task=subset_vae", "estimator@task.grad=gs", "task.grad.tau=0.5", "data.examples.path=x", "run.plots=false"
    )
    assert typed == composed("task=subset_vae", "data.examples.path=x", grad="gs")


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + np.asarray(values.shape, ">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(head + values.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory) -> Path:
    """Images of 6 x 6 pixels whose class is the bright half."""
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for part, count in (("train", 90), ("t10k", 30)):
        labels = rng.integers(0, 2, count)
        images = rng.integers(0, 120, (count, 6, 6))
        images[:, :3] += 100 * labels[:, None, None]
        images[:, 3:] += 100 * (1 - labels)[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def run(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and measure the rebuilt task anew."""
    metrics = train_run(config, folder)
    assert metrics["steps"] == 2
    task, parts = load_problem(RunFolder(folder)), build(config["data"]["examples"])
    with torch.no_grad():
        again = task.metrics([task.predict(e.set) for e in parts.test], [e.target for e in parts.test])
    assert again == pytest.approx(metrics["test"], abs=1e-9)
    return metrics


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_feature_selection_with_every_estimator(estimator, idx_folder, tmp_path) -> None:
    config = composed(
        "task=feature_selection", f"data.examples.path={idx_folder}",
        "data.examples.val=20", "task.k=5", "task.hidden=8", *SHORT,
        grad=estimator,
    )  # fmt: skip
    if estimator == "past":
        config["task"]["grad"]["baseline"]["n"] = 36
    metrics = run(config, tmp_path)
    assert 0 < metrics["test"]["loss"] < 2
    simple = metrics["baselines"]
    assert simple["mean_image_nats_an_image"] == 36 * simple["mean_image_nats_a_pixel"]
    assert (tmp_path / "plots" / "chosen.png").exists() == (estimator == "ridge")


@pytest.mark.parametrize("estimator", ["ridge", "simple_cv", "gs", "imle_adaptive", "ncpss", "identity"])
def test_the_autoencoder(estimator, idx_folder, tmp_path) -> None:
    config = composed(
        "task=subset_vae", f"data.examples.path={idx_folder}", "data.examples.val=20",
        "task.subsets=3", "task.size=5", "task.k=2", *SHORT,
        grad=estimator,
    )  # fmt: skip
    metrics = run(config, tmp_path)["test"]
    assert metrics["divergence"] > 0
    assert metrics["loss"] == pytest.approx(metrics["reconstruction"] + metrics["divergence"])
    assert (tmp_path / "plots" / "reconstructions.png").exists() == (estimator == "ridge")


@pytest.mark.parametrize("estimator", ["ridge", "leave_one_out", "simple", "imle", "sfess_published"])
def test_neighbours(estimator, idx_folder, tmp_path) -> None:
    config = composed(
        "task=stochastic_knn", f"data.examples.path={idx_folder}",
        "data.examples.val=20", "task.k=3", *SHORT, "plan.batch=20",
        grad=estimator,
    )  # fmt: skip
    metrics = run(config, tmp_path)
    assert 0.3 < metrics["test"]["accuracy"] <= 1
    assert (tmp_path / "plots" / "embedding.png").exists() == (estimator == "ridge")


@pytest.fixture(scope="session")
def review_archive(tmp_path_factory) -> Path:
    """Reviews of different length whose class one word tells, four of each fold and class."""
    path = tmp_path_factory.mktemp("reviews") / "movie_reviews.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for label, fold, number in itertools.product(("neg", "pos"), range(10), range(2)):
            words = [f"word{i}" for i in rng.integers(0, 20, rng.integers(6, 12))]
            words[3] = "bad" if label == "neg" else "good"
            file.writestr(f"movie_reviews/{label}/cv{fold}{number:02}_1.txt", " ".join(words))
    return path


BLACK_BOX = ("ridge", "sfess_published")
DIFFERENTIABLE = ("simple", "simple_cv", "gs", "imle_adaptive", "ncpss", "identity")


@pytest.mark.parametrize(
    ("task", "estimator"),
    [*itertools.product(["explain_words"], BLACK_BOX + DIFFERENTIABLE), *itertools.product(["explain_judge"], BLACK_BOX)],
)
def test_kept_words(task, estimator, review_archive, tmp_path) -> None:
    config = composed(
        f"task={task}", f"data.examples.path={review_archive}", "task.k=3",
        "task.width=4", *SHORT,
        grad=estimator,
    )  # fmt: skip
    metrics = run(config, tmp_path)
    assert {"loss", "accuracy", "agreement"} == set(metrics["test"])
    assert {"judge_accuracy", "judge_on_10_random_words"} == set(metrics["baselines"])
    assert (tmp_path / "plots" / "kept_words.html").exists() == (estimator == "ridge")


def test_learned_baselines_are_saved(idx_folder, tmp_path) -> None:
    config = composed(
        "task=feature_selection", "estimator@task.grad=past", f"data.examples.path={idx_folder}", "data.examples.val=20",
        "task.k=5", "task.grad.baseline.n=36", *SHORT, "task.num_samples=8", "run.plots=false",
    )  # fmt: skip
    train_run(config, tmp_path)
    assert float(load_problem(RunFolder(tmp_path), "last").model.learned[0].slope.abs().sum()) > 0


def test_numbers_of_images_that_are_not_there(idx_folder) -> None:
    for bad, message in (("val=90", "val: got 90 images, wanted 1 to 89"), ("train=80", "train: got 80 images")):
        config = composed("task=feature_selection", f"data.examples.path={idx_folder}", "data.examples.val=20")
        config["data"]["examples"] |= {bad.split("=")[0]: int(bad.split("=")[1])}
        with pytest.raises(ValueError, match=message):
            build(config["data"]["examples"])


@pytest.mark.parametrize("references", [-1, 0, 91])
def test_neighbours_among_images_that_are_not_there(references, idx_folder) -> None:
    with pytest.raises(ValueError, match=f"references: got {references} images, wanted 1 to "):
        neighbours(str(idx_folder), val=20, references=references)
