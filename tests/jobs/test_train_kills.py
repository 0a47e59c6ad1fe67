"""Kill schedules of jobs.train: SIGKILL of the driver, on Ray and without, at any step and while a checkpoint is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ARGS = (
    "run.bar=false",
    "run.plots=false",
    "data.make.bags=[12,8,8]",
    "data.make.size=[4,9]",
    "data.chunk_size=3",
    "grad=sampled",
    "grad.choice=weighted",
    "model.width=8",
    "model.slots=2",
    "model.heads=2",
    "model.random_slots=true",
    "model.dropout=0.2",
    "plan.batch=5",
    "plan.epochs=12",
    "plan.checkpoint_every=2",
    "plan.evaluate_every=5",
    "plan.log_every=3",
)
RESULTS = ("metrics.jsonl", "metrics.json", "predictions.csv")

DIES_IN_SAVE = """
import os, signal, sys, torch
saves, save = 0, torch.save
def half(state, path):
    global saves
    saves += 1
    save(state, path)
    if saves == int(os.environ["DIE_AT"]):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
from jobs.train import main
main()
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def command(folder: Path, cluster: str) -> list[str]:
    return [sys.executable, "-m", "jobs.train", f"run.dir={folder}", f"cluster={cluster}", *ARGS]


def complete(folder: Path, cluster: str) -> None:
    done = subprocess.run(command(folder, cluster), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    complete(folder, "none")
    return folder


def check_same(folder: Path, whole: Path) -> None:
    for which in ("last", "best"):
        states = [torch.load(f / "checkpoints" / which / "state.pt", weights_only=True)["model"] for f in (folder, whole)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    for name in RESULTS:
        assert (folder / name).read_text() == (whole / name).read_text(), name


def kill_after(process: subprocess.Popen, folder: Path, saves: int) -> None:
    """SIGKILL once that many new checkpoints are there (0: as soon as the run folder is)."""
    path, seen = folder / "checkpoints" / "last" / "state.pt", set()
    before = path.stat().st_mtime_ns if path.exists() else None
    end = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.stat().st_mtime_ns != before:
            seen.add(path.stat().st_mtime_ns)
        if len(seen) >= saves and (folder / "config.yaml").exists():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("schedule", [(0, 1), (3, 2, 1), (1, 1, 1, 1)], ids=str)
def test_a_driver_killed_again_and_again(tmp_path, whole, schedule):
    folder = tmp_path / "run"
    for saves in schedule:
        process = subprocess.Popen(command(folder, "none"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        kill_after(process, folder, saves)
        assert process.returncode == -signal.SIGKILL
    complete(folder, "none")
    check_same(folder, whole)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_driver_killed_on_ray(tmp_path, whole):
    """Its Ray dies with it; the next start finds the checkpoint, and one worker of one thread makes the same bits."""
    folder = tmp_path / "run"
    for saves in (0, 2):
        process = subprocess.Popen(command(folder, "local"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        kill_after(process, folder, saves)
        assert process.returncode == -signal.SIGKILL
    complete(folder, "local")
    check_same(folder, whole)


@pytest.mark.parametrize("save", [1, 2, 5, 8])
def test_killed_while_a_checkpoint_is_half_written(tmp_path, whole, save):
    folder = tmp_path / "run"
    words = [sys.executable, "-c", DIES_IN_SAVE, *command(folder, "none")[3:]]
    died = subprocess.run(words, cwd=ROOT, env=environment(DIE_AT=str(save)), capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert list((folder / "checkpoints").rglob("*.tmp"))
    complete(folder, "none")
    check_same(folder, whole)
    assert not list((folder / "checkpoints").rglob("*.tmp"))
