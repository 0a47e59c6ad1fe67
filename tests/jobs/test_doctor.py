"""jobs.doctor: every check has something that makes it fail, and what it passes jobs.train passes too."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from distset.data import Bag, Split, Store, StoreWriter
from distset.doctor import examine as examine_module
from distset.doctor import machine
from distset.doctor.examine import examine
from distset.doctor.findings import Finding, findings_of, table, worst
from distset.doctor.footprint import measure, measure_problem
from distset.training import train_run
from jobs import doctor

ROOT = Path(__file__).parents[2]
IDS = [f"bag-{i}" for i in range(20)]
SPLIT = Split(IDS[:12], IDS[12:16], IDS[16:])


def write(path: Path, labels: list[str | None] | None = None, split: Split = SPLIT, width: int = 6) -> Path:
    """Twenty sets of small vectors of ten cases."""
    generator = np.random.default_rng(0)
    labels = labels or ["no", "yes"] * 10
    with StoreWriter(path) as writer:
        for i, (set_id, label) in enumerate(zip(IDS, labels)):
            rows = generator.standard_normal((5 + i % 4, width)).astype(np.float32)
            writer.add(Bag(set_id, rows, label=label, case_id=f"case-{i // 2}"))
        writer.finish(splits=[split])
    return path


@pytest.fixture
def store(tmp_path) -> Path:
    return write(tmp_path / "store")


def composed(store: Path, run: Path, *overrides: str) -> dict:
    given = ["data=store", f"data.path={store}", f"run.dir={run}", "cluster=none", "run.bar=false", "run.plots=false"]
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=[*given, *overrides]), resolve=True)


def look(store: Path, *overrides: str, seconds: float = 5.0) -> dict[str, list[Finding]]:
    """The findings of each check."""
    found: dict[str, list[Finding]] = {}
    for finding in examine(composed(store, store.parent / "run", *overrides), seconds=seconds):
        found.setdefault(finding.check, []).append(finding)
    return found


def failed(found: dict[str, list[Finding]]) -> str:
    """``"check: message"`` of all that failed."""
    return "\n".join(f"{f.check}: {f.message}" for findings in found.values() for f in findings if f.level == "fail")


def warned(found: dict[str, list[Finding]]) -> str:
    return "\n".join(f"{f.check}: {f.message}" for findings in found.values() for f in findings if f.level == "warn")


def test_a_sound_run_passes_every_check_and_trains(store, tmp_path):
    found = look(store, "plan.epochs=1")
    assert failed(found) == warned(found) == ""
    assert list(found) == ["software", "data", "splits", "labels", "settings", "run", "disk", "memory", "cluster"]
    assert not (tmp_path / "run").exists()
    train_run(composed(store, tmp_path / "run", "plan.epochs=1"), tmp_path / "run")


def test_a_store_that_is_not_there_or_damaged(tmp_path, store):
    assert "data: path: " in failed(look(tmp_path / "none"))
    assert "holds no finished store" in failed(look(tmp_path / "none"))
    (shard,) = (store / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[300] ^= 1  # a bit of an element
    shard.write_bytes(content)
    assert "its checksum differs" in failed(look(store))
    assert "read in 0 s" in look(store, seconds=-1)["data"][0].message.replace("-1 s", "0 s")
    shard.write_bytes(content[:-9])
    assert "the store is damaged" in failed(look(store))


def test_a_store_still_to_be_made_is_said(tmp_path):
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides=[f"run.dir={tmp_path}/run"]), resolve=True)
    data = next(finding for finding in examine(config) if finding.check == "data")
    assert data.level == "warn"
    assert "first makes it from distset.data.DigitBags" in data.advice


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["no", None, "yes", None] * 5, "labels: 10 of 20 sets have no label, the first is 'bag-1'"),
        ([None] * 20, "labels: 20 of 20 sets have no label"),
        (["no"] * 12 + ["no", "yes"] * 4, "labels: no train set is of class yes"),
        (["no", "yes"] * 6 + ["no"] * 4 + ["no", "yes"] * 2, "labels: no val set is of class yes"),
    ],
)
def test_labels(tmp_path, labels, message):
    assert message in failed(look(write(tmp_path / "store", labels)))


def test_labels_that_are_only_rare(tmp_path):
    found = look(write(tmp_path / "store", ["yes"] + ["no"] * 11 + ["no", "yes"] * 2 + ["no"] * 4))
    assert failed(found) == ""
    assert "labels: no test set is of class yes" in warned(found)
    assert "labels: few training sets of some classes: {'yes': 1}" in warned(found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,test,bag-0", "splits: fold 0: the set 'bag-0' is in train and in test"),
        ("0,test,bag-99", "splits: fold 0: test names the set 'bag-99', which the store does not hold"),
        ("1,train,bag-0\n1,test,bag-1", "splits: fold 1: case 'case-0' is in train (set 'bag-0') and in test (set 'bag-1')"),
        ("1,train,bag-0\n2,val,bag-1", "splits: fold 2: has no training sets"),
    ],
)
def test_splits_that_leak(store, line, message):
    with open(store / "splits" / "default.csv", "a") as file:
        file.write(line + "\n")
    assert message in failed(look(store, "folds=all"))


def test_splits_that_lack_a_part(tmp_path):
    found = look(write(tmp_path / "store", split=Split(IDS[:12], [], [])))
    assert "no validation sets" in warned(found)
    assert "no test sets" in warned(found)
    assert "8 sets in none" in found["splits"][0].message
    assert "fold: got 3, wanted 0 to 0" in failed(look(tmp_path / "store", "data.fold=3"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.chunk_size=0", "settings: chunk_size: got 0"),
        ("model.heads=3", "heads"),
        ("backbone=cnn", "settings: backbone: is for images"),
        ("plan.epochs=0", "settings: epochs: got 0"),
        ("optim.lr=-1", "settings: lr: got -1"),
        ("task.class_weights=[1,2,3]", "settings: class_weights: got [1, 2, 3]"),
    ],
)
def test_settings(store, override, message):
    assert message in failed(look(store, override))


def test_the_run_folder(store, tmp_path):
    overrides = ("plan.epochs=1", "plan.checkpoint_every=1")
    folder = tmp_path / "run"
    folder.mkdir()
    assert "holds no run yet" in look(store, *overrides)["run"][0].message
    train_run(composed(store, folder, *overrides), folder)
    assert "holds this run, finished" in warned(look(store, *overrides))
    (folder / "metrics.json").unlink()
    assert "goes on from its last checkpoint" in look(store, *overrides)["run"][0].message
    assert "run: run.dir: " in failed(look(store, *overrides, "seed=1"))
    (folder / "checkpoints" / "last" / "state.pt").unlink()
    assert "starts from the beginning" in look(store, *overrides)["run"][0].message


def test_a_disk_that_is_full_or_closed(store, monkeypatch):
    free = [10]
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    assert "disk: checkpoints take about" in failed(look(store))
    free[0] = 2**29
    assert "512 MiB are free" in warned(look(store))
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert "cannot be written" in failed(look(store))


def test_memory_that_does_not_suffice(store, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 2**20)
    assert "memory: a worker takes about" in failed(look(store))
    need = 2**20
    monkeypatch.setattr(machine, "available_memory", lambda: int(1.1 * need))
    assert [f.level for f in machine.check_memory(need, 1, int(1.1 * need))] == ["warn"]
    assert [f.level for f in machine.check_memory(need, 2, int(1.1 * need))] == ["fail"]


def test_memory_of_a_container(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available_memory() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory() > 2**20


def test_software_out_of_range(store, monkeypatch):
    version = machine.importlib.metadata.version
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "0.1" if name == "torch" else version(name))
    assert "software: torch is 0.1, wanted >=" in failed(look(store))
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.8.1")
    assert "software: Python is 3.8.1, wanted >=3.11" in failed(look(store))


def test_cores_and_gpus(store, monkeypatch):
    assert "65 cores each on a machine of" in warned(look(store, "cluster.cpus=65"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "cluster: 1 workers want 1 GPU each, torch finds 0 here" in failed(look(store, "cluster.gpu=true"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "the run will not use it" in warned(look(store))


def test_actors_count_with_and_without_workers(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    actors = 2 * len(os.sched_getaffinity(0))
    found = look(store, "cluster=none", f"cluster.actors={actors}", "cluster.actor_cpus=0.5", "cluster.actor_gpus=1")
    assert f"1 workers of 1 cores each and {actors} actors of 0.5 on a machine" in warned(found)
    assert f"1 workers want 0 GPU each and {actors} actors 1, torch finds 0 here" in failed(found)
    assert f"for {1 + actors}" in found["memory"][0].message
    assert "cluster.address: nothing answers" in failed(look(store, "cluster.actors=1", "cluster.address=127.0.0.1:9"))
    monkeypatch.setattr(examine_module.importlib.util, "find_spec", lambda name: None)
    assert "cluster: cluster.workers or cluster.actors asks for Ray" in failed(look(store, "cluster.actors=1"))


def test_a_task_with_examples_of_its_own_is_told_what_its_checkpoints_take(tmp_path):
    tiny = ("task=oracle", "method@task=diffmf", "data.examples.sets=12", "data.examples.size=20", "data.examples.chosen=3")
    with initialize_config_module("conf", version_base="1.3"):
        asked = [*tiny, "cluster=none", "plan.max_steps=2", "plan.epochs=null", "plan.batch=4", "plan.patience=null"]
        asked += ["plan.evaluate_every=1", f"run.dir={tmp_path}/run", "run.bar=false", "run.plots=false"]
        config = OmegaConf.to_container(compose("train", overrides=asked), resolve=True)
    found = {finding.check: finding for finding in examine(config)}
    assert list(found) == ["software", "settings", "run", "disk", "memory", "cluster"]
    assert "checkpoints take about" in found["disk"].message
    assert "not estimated for this task" in found["memory"].message
    train_run(config, tmp_path / "run")
    last, best = (tmp_path / "run" / "checkpoints" / name / "state.pt" for name in ("last", "best"))
    files = 2 * last.stat().st_size + best.stat().st_size
    assert 0.7 * files < measure_problem(config).checkpoints <= 1.1 * files


def test_storage_that_cannot_be_written(store, tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = look(store, "cluster=local", f"cluster.storage={tmp_path}/file/run")
    assert "storage: cluster.storage: " in failed(found)
    assert look(store, "cluster=local", f"cluster.storage={tmp_path}/good")["storage"][0].level == "ok"


def test_a_cluster_that_is_not_there(store):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = look(store, "cluster=ray", f"cluster.address=127.0.0.1:{port}")
    assert f"cluster: cluster.address: nothing answers at 127.0.0.1:{port}" in failed(found)
    assert "nodes" not in found
    assert "cluster.storage is null" in warned(found)


def test_the_estimate_of_checkpoints_is_that_of_the_files(store, tmp_path):
    config = composed(store, tmp_path / "run", "plan.epochs=1")
    foot = measure(config, Store(store))
    train_run(config, tmp_path / "run")
    last, best = (tmp_path / "run" / "checkpoints" / name / "state.pt" for name in ("last", "best"))
    files = 2 * last.stat().st_size + best.stat().st_size
    assert 0.7 * files < foot.checkpoints <= 1.1 * files


MEMORY = """
import re, sys
from pathlib import Path
import torch
from distset.checkpoints import Checkpoints
from distset.bags.runs import train_bags
from distset.data import Store
from distset.doctor.footprint import measure
from tests.jobs.test_doctor import composed

torch.set_num_threads(1)
store = Path(sys.argv[1])
config = composed(store, store.parent / "run", "plan.epochs=1", "plan.batch=2", *sys.argv[3:])
told = measure(config, Store(store)).training
# Not ru_maxrss, which begins at what the process that started this one had.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
small = store.parent / "small"
train_bags(composed(Path(sys.argv[2]), small, "plan.epochs=1", "backbone=mlp"), Checkpoints(small))
before = peak()  # with everything loaded that training loads
train_bags(config, Checkpoints(store.parent / "run"))
print(told, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [["data.chunk_size=30000"], ["grad=full", "data.chunk_size=2000"]], ids=["chunk", "full"]
)
def test_the_estimate_of_memory_is_near_the_peak(tmp_path, overrides):
    generator = np.random.default_rng(0)
    with StoreWriter(tmp_path / "store") as writer:
        for i, set_id in enumerate(IDS[:6]):
            writer.add(Bag(set_id, generator.standard_normal((60_000, 128)).astype(np.float32), label=["no", "yes"][i % 2]))
        writer.finish(splits=[Split(IDS[:2], IDS[2:4], IDS[4:6])])
    small = write(tmp_path / "small-store")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "store"), str(small), "backbone=mlp", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told, peak = map(int, done.stdout.split()[-2:])
    assert 0.5 < told / peak < 2, (told, peak)


def run_job(monkeypatch, capsys, *overrides: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["jobs.doctor", *overrides])
    try:
        doctor.main()
        code = 0
    except SystemExit as end:
        code = int(end.code)
    return code, capsys.readouterr().out


def test_the_job_prints_a_table_or_json_and_exits_1_where_something_fails(store, tmp_path, monkeypatch, capsys):
    asked = ("data=store", f"data.path={store}", f"run.dir={tmp_path / 'run'}", "cluster=none")
    code, out = run_job(monkeypatch, capsys, *asked, "experiment=classic_umbc")
    assert code == 0, out
    assert "\nok    memory    a worker takes about" in out
    code, out = run_job(monkeypatch, capsys, *asked, "plan.batch=0", "json=true")
    assert code == 1
    (told,) = [finding for finding in json.loads(out) if finding["level"] == "fail"]
    assert told["check"] == "settings"
    assert told["message"] == "batch: got 0, wanted at least 1"
    assert not (tmp_path / "run").exists()
    code, out = run_job(monkeypatch, capsys, "plan.epoch=3")
    assert code == 1


def test_a_table_shows_advice_under_its_finding():
    found = [Finding("ok", "fine", check="a"), Finding("fail", "bad " * 8, "mend it", check="long")]
    assert table(found, width=40).splitlines() == [
        "ok    a     fine",
        "fail  long  bad bad bad bad bad bad bad",
        "            bad",
        "            -> mend it",
    ]
    assert worst(found) == "fail"
    assert worst([]) == "ok"

    def broken():
        yield Finding("ok", "so far")
        raise KeyError("odd")

    assert [(f.level, f.message, f.check) for f in findings_of("c", broken)] == [
        ("ok", "so far", "c"),
        ("fail", "KeyError: 'odd'", "c"),
    ]


def test_data_that_was_read_does_not_count_as_software(tmp_path):
    """A store is mapped while its checksums are compared; a worker maps a chunk of it at a time."""
    generator = np.random.default_rng(0)
    with StoreWriter(tmp_path / "store") as writer:
        for i, set_id in enumerate(IDS):
            rows = generator.standard_normal((40_000, 64)).astype(np.float32)
            writer.add(Bag(set_id, rows, label=["no", "yes"][i % 2]))
        writer.finish(splits=[SPLIT])
    own, files = machine.process_memory()
    found = look(tmp_path / "store", "data.chunk_size=100")["memory"][0]
    told = int(
        float(found.message.split("about ")[1].split(" ")[0].replace(",", "")) * (2**10 if "GiB;" in found.message else 1)
    )
    assert told * 2**20 < own + files + 150 * 2**20  # the store has 200 MB
