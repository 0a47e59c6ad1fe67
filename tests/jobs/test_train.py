"""jobs.train: every configuration trains, goes on after a kill to the same bits, and says what is wrong in one line."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from distset import DeepSets
from distset.build import build
from distset.data import Bag, Split, StoreWriter
from distset.runs import RunFolder, make_task
from jobs import train
from jobs._overrides import CONF, check_overrides

ROOT = Path(__file__).parents[2]
SMALL = (
    "cluster=none",
    "run.bar=false",
    "run.plots=false",
    "data.make.bags=[8,6,6]",
    "data.make.size=[4,7]",
    "data.chunk_size=3",
    "plan.batch=4",
    "plan.epochs=1",
)
TINY = ("model.width=8", "model.slots=2", "model.heads=2", "backbone=cnn", "backbone.widths=[4]", "backbone.dim=8")


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Run the job in this process, on one thread; returns its exit code and what it wrote to the terminal."""

    def run(*overrides: str, small: bool = True) -> tuple[int, str, str]:
        args = [f"run.dir={tmp_path / 'run'}", *(SMALL if small else ()), *overrides]
        monkeypatch.setattr(sys, "argv", ["jobs.train", *args])
        try:
            train.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / which / "state.pt", weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem not in ("external", "none"))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_and_is_rebuilt_from_its_run_folder(start, tmp_path, model):
    code, _, err = start(f"model={model}", "model.width=8", "grad=exact")
    assert code == 0, err
    run = RunFolder(tmp_path / "run")
    task, store = run.load_task(), run.store()
    with open(run.path / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["set_id"] for row in rows] == [*run.split().val, *run.split().test]
    for row in rows:
        with torch.no_grad():
            p = task.predict(store.open(row["set_id"], 3))
        assert p[1].item() == pytest.approx(float(row["prob_1"]), abs=1e-6)
        chosen = run.metrics["threshold"]
        assert row["predicted"] == ("1" if float(row["prob_1"]) >= chosen else "0")


@pytest.mark.parametrize(("grad", "optim"), [("sampled", "adam"), ("subset", "sgd"), ("full", "adamw")])
def test_gradients_and_optimisers(start, grad, optim):
    code, _, err = start(f"grad={grad}", f"optim={optim}", "plan.precision=bfloat16", *TINY)
    assert code == 0, err


def test_a_model_of_ones_own_by_its_dotted_path(start, tmp_path, monkeypatch):
    (tmp_path / "ones_own.py").write_text("from distset.tasks.bag_models import deepsets as model\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = start("model=external", "model._target_=ones_own.model", "+model.pool=max", "+model.width=8")
    assert code == 0, err
    encoder = RunFolder(tmp_path / "run").load_task().model.encoder.encoder
    assert isinstance(encoder, DeepSets)
    assert encoder.pool == "max"
    code, _, err = start("model=external")
    assert code == 1
    assert "model._target_" in err


def test_a_run_folder_explains_itself_and_says_when_it_is_finished(start, tmp_path):
    more = ("task.class_weights=balanced", "plan.epochs=2", "plan.log_every=1", "run.plots=true")
    code, out, err = start(*TINY, *more)
    assert code == 0, err
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.yaml", "versions.json", "train.log", "metrics.jsonl", "metrics.json", "tensorboard", "data"),
        *("speed.jsonl", "checkpoints", "predictions.csv", "predictions.parquet", "plots"),
    }
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "metrics.png", "roc.png", "confusion.png"}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "val/auroc" in r] == [2, 4]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["sets"] == {"train": 8, "val": 6, "test": 6}
    assert metrics["test"]["auroc"]["low"] <= metrics["test"]["auroc"]["value"] <= metrics["test"]["auroc"]["high"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["task"]["class_weights"] == [1.0, 1.0]
    assert f"auroc              {metrics['test']['auroc']['value']:.3f}" in out
    assert str(folder) in out
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    code, again, _ = start(*TINY, *more)
    assert code == 0
    assert "finished" in again
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_killed_driver_goes_on_to_the_same_bits_without_double_lines(tmp_path, start):
    args = (
        *TINY,
        "plan.epochs=10",
        "plan.checkpoint_every=3",
        "plan.evaluate_every=5",
        "plan.log_every=2",
        "model.dropout=0.2",
    )
    command = [sys.executable, "-m", "jobs.train", f"run.dir={tmp_path / 'run'}", *SMALL, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "run" / "checkpoints" / "last" / "state.pt"
    until(checkpoint.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = torch.load(checkpoint, weights_only=True)["progress"]["step"]
    assert 3 <= reached < 20
    code, out, err = start(*args)
    assert code == 0, err
    assert f"goes on at step {reached} of 20" in out
    code, _, err = start(*args, f"run.dir={tmp_path / 'whole'}")
    assert code == 0, err
    for which in ("last", "best"):
        assert same(weights(tmp_path / "run", which), weights(tmp_path / "whole", which))
    for name in ("metrics.jsonl", "metrics.json", "predictions.csv"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text(), name


def until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_folds_are_trained_and_summarised(start, tmp_path):
    store = write(tmp_path / "store", labels=["no", "yes"] * 9, folds=3)
    args = ("data=store", f"data.path={store}", "backbone=standardise", "folds=all", *TINY[:3])
    own = ("cluster=none", "run.bar=false", "data.chunk_size=4", "plan.batch=4", "plan.epochs=2")
    code, out, err = start(*own, *args, small=False)
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    values = [summary["by_run"][f"fold-{fold}"]["auroc"] for fold in range(3)]
    assert summary["auroc"]["mean"] == pytest.approx(np.mean(values))
    assert summary["auroc"]["std"] == pytest.approx(np.std(values, ddof=1))
    folds = [RunFolder(tmp_path / "run" / f"fold-{fold}") for fold in range(3)]
    assert sorted(set_id for fold in folds for set_id in fold.split().test) == sorted(folds[0].store().ids)
    mean = folds[1].load_task().model.encoder.extractor.mean  # standardised by the training sets of the fold alone
    chunks = (folds[1].store().open(set_id).map(lambda chunk: chunk.elements.numpy()) for set_id in folds[1].split().train)
    rows = np.concatenate([rows for parts in chunks for rows in parts])
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "run" / "plots" / "spread.png").exists()
    assert "fold-0/" in (tmp_path / "run" / "README.md").read_text()
    assert f"{summary['auroc']['mean']:.4f} ±" in out


def write(path: Path, labels: list[str | None], folds: int = 0, split: Split | None = None) -> Path:
    """A store of small vectors; the second class is shifted."""
    from distset.data import make_splits

    generator = np.random.default_rng(0)
    with StoreWriter(path) as writer:
        for i, label in enumerate(labels):
            x = generator.standard_normal((5 + i % 4, 6)).astype(np.float32) + 3 * (label == "yes")
            writer.add(Bag(f"bag-{i}", x, label=label))
        given = {f"bag-{i}": label for i, label in enumerate(labels)}
        writer.finish(splits=make_splits(given, folds=folds) if folds else [split])
    return path


def bad_store(path: Path, problem: str) -> Path:
    ids = [f"bag-{i}" for i in range(8)]
    labels: list[str | None] = ["no", "yes"] * 4
    split = Split(ids[:4], ids[4:6], ids[6:])
    if problem == "one class":
        labels = ["no"] * 4 + ["no", "yes"] * 2
    if problem == "one class in val":
        labels = ["no", "yes"] * 2 + ["no", "no"] + ["no", "yes"]
    if problem == "no label":
        labels[1] = None
    write(path, labels, split=split)
    if problem == "leak":
        with open(path / "splits" / "default.csv", "a") as file:
            file.write("0,test,bag-0\n")
    return path


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("one class", "the train sets are {'no': 4} of the classes no, yes; wanted sets of every class"),
        ("one class in val", "the val sets are {'no': 2} of the classes no, yes; wanted at least two classes"),
        ("no label", "labels: 1 sets have none, the first is 'bag-1'"),
        ("leak", "the set 'bag-0' is in train and in test"),
    ],
)
def test_bad_labels_and_splits_end_before_anything_is_written(start, tmp_path, problem, message):
    store = bad_store(tmp_path / "store", problem)
    code, _, err = start("cluster=none", "data=store", f"data.path={store}", "backbone=mlp", small=False)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.chunk_size=0"], "chunk_size: got 0, wanted at least 1"),
        (["grad=sampled", "grad.m=9"], "grad.m: got 9 sampled chunks, but the training set"),
        (["backbone=mlp"], "backbone: is for vectors, but elements have shape (1, 8, 8)"),
        (["backbone=none"], "backbone: got none, but elements are (1, 8, 8)"),
        (["model.heads=3"], "heads"),
        (["+model.slot=3"], "model.slot: distset.tasks.bag_models.umbc has no argument 'slot'; did you mean 'slots'?"),
        (["plan.epochs=0"], "epochs: got 0"),
        (["optim.lr=-1"], "lr: got -1"),
        (["data.split=other"], "split: got 'other'"),
        (["task.class_weights=[1,2,3]"], "class_weights: got [1, 2, 3], wanted 2 positive numbers"),
        (["backbone=external", "backbone.module._target_=timm_is_not_here.make"], "there is no package 'timm_is_not_here'"),
    ],
)
def test_bad_settings_are_one_line(start, overrides, message):
    code, _, err = start(*overrides)
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


def test_another_configuration_in_the_same_folder_is_refused(start):
    assert start(*TINY)[0] == 0
    code, _, err = start(*TINY, "seed=1")
    assert code == 1
    assert "holds a run of another configuration (seed 0 -> 1)" in err


def test_a_checkpoint_of_another_model_is_refused(start, tmp_path):
    assert start(*TINY)[0] == 0
    folder = tmp_path / "run"
    (folder / "metrics.json").unlink()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["slots"] = 3
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, err = start(*TINY, "model.slots=3")
    assert code == 1
    assert "is of another model: it has encoder.encoder.mu of shape (2, 8), wanted (3, 8)" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.slots=3", "did you mean model.slots?"),
        ("model.slot=3", "did you mean model.slots?"),
        ("+modle.slots=3", "did you mean model.slots?"),
        ("+data.chunksize=3", "did you mean data.chunk_size?"),
        ("plan.epoch=3", "did you mean plan.epochs?"),
        ("model=umcb", "did you mean model=umbc?"),
        ("modl=umbc", "did you mean model?"),
        ("zzzzzzzz=1", "sections are backbone, cluster, data"),
    ],
)
def test_unknown_keys_name_the_nearest(override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        check_overrides("train", ["model=umbc", override])


def test_known_and_new_keys_pass():
    check_overrides(
        "train", ["model=sse", "model.pool=max", "+model.anything=1", "grad=sampled", "grad.m=2", "hydra.run.dir=x"]
    )


GROUPS = [
    (group, path.stem)
    for group in ("data", "task", "backbone", "cluster", "experiment")
    for path in sorted((CONF / group).glob("*.yaml"))
    if "examples:" not in path.read_text() and (group, "override /data" in path.read_text()) != ("task", True)
]  # the others are problems, see test_problems.py


@pytest.mark.parametrize(("group", "choice"), GROUPS, ids=map("=".join, GROUPS))
def test_every_choice_composes_and_builds(group, choice):
    overrides = [f"{group}={choice}", "data.path=store"]
    if choice == "external":
        overrides.append("backbone.module._target_=torch.nn.Flatten")
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True)
    vectors = str(config["backbone"].get("_target_")).endswith(("None", "mlp", "standardise"))
    make_task(config, (10,) if vectors else (3, 40, 40), ["no", "yes"])
    for section in ("plan", "optim", "cluster"):
        build(config[section], section)
