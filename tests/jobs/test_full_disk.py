"""jobs.train on a disk that fills up: one line says so; once there is room the same command ends as if it had not been."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from jobs import train

ARGS = (
    *("cluster=none", "run.bar=false", "run.plots=false", "data.make.bags=[8,6,6]", "data.make.size=[4,7]"),
    *("data.chunk_size=3", "plan.batch=4", "plan.epochs=3", "plan.checkpoint_every=2", "model.width=64"),
)


@pytest.fixture
def start(monkeypatch, capsys):
    def run(folder: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jobs.train", f"run.dir={folder}", *ARGS])
        try:
            train.main()
            code = 0
        except SystemExit as end:
            code = int(end.code)
        return code, capsys.readouterr().err

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last" / "state.pt", weights_only=True)["model"]


def test_a_full_disk_ends_the_run_and_it_goes_on_later(start, tmp_path):
    assert start(tmp_path / "calm")[0] == 0
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # room for logs and data, not for a checkpoint
    try:
        code, err = start(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith(f"error: checkpoint: {folder}/checkpoints/")
    assert "MiB are free there" in line
    assert not list(folder.rglob("*.tmp"))
    assert start(folder) == (0, "")
    first, second = weights(tmp_path / "calm"), weights(folder)
    assert all(torch.equal(first[key], second[key]) for key in first)
