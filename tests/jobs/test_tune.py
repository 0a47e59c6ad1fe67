"""jobs.tune: what is wrong is said in one line before Ray starts; a killed search goes on by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import tune

ROOT = Path(__file__).parents[2]
TINY = (
    *("task=oracle", "method@task=diffmf", "data.examples.sets=12", "data.examples.size=20", "data.examples.chosen=3"),
    *(
        "plan.epochs=null",
        "plan.batch=4",
        "plan.evaluate_every=20",
        "plan.patience=null",
        "run.bar=false",
        "run.plots=false",
    ),
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["search.metric=test/jaccard"],
            "error: search.metric: got 'test/jaccard', and settings are not chosen by the test sets",
        ),
        (["search=ahsa"], "error: search=ahsa: there is no such choice; did you mean search=asha?"),
        (["search.trails=4"], "error: search.trails: is not in the configuration of jobs.tune; did you mean search.trials?"),
        (
            ["+search.space.task.sample={choice:[2,5]}"],
            "error: search.space.task.sample: is not in the configuration; did you mean",
        ),
        (["plan.batch=0"], "error: batch: got 0, wanted at least 1"),
        (["data.examples.chosen=50"], "error: sets, size, chosen: got 12, 20, 50, wanted"),
    ],
)
def test_what_is_wrong_is_one_line_before_ray_starts(overrides, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["jobs.tune", *TINY, "plan.max_steps=4", f"run.dir={tmp_path}", *overrides])
    with pytest.raises(SystemExit) as end:
        tune.main()
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert err.startswith(message), err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "trials").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_search_goes_on_and_ends_as_one_that_was_not(tmp_path):
    """SIGKILL of the driver while trials train; each trial then ends with the bits that it would have had."""
    args = (*TINY, "plan.max_steps=600", "search.trials=4")
    environment = {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "OMP_NUM_THREADS": "1"}

    def start(folder: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "jobs.tune", f"run.dir={folder}", *args, *more]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def records(folder: Path) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(folder.glob("trials/*/trial.json"))]

    folder = tmp_path / "killed"
    process = start(folder, "search.concurrency=2")
    ended, end = 0, time.monotonic() + 300
    while not (ended and any(folder.glob("trials/*/run/checkpoints/last/state.pt"))):
        assert process.poll() is None
        assert time.monotonic() < end
        ended = sum(record["status"] == "finished" for record in records(folder))
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(5)  # until Ray's processes have noticed; a trial may still come to its end
    statuses = [record["status"] for record in records(folder)]
    assert "finished" in statuses
    assert set(statuses) - {"finished"}
    stamps = {
        path: path.stat().st_mtime_ns
        for path, s in zip(sorted(folder.glob("trials/*/trial.json")), statuses)
        if s == "finished"
    }
    out, _ = start(folder).communicate()
    left = len(statuses) - statuses.count("finished")
    assert f"{left} of 4 trials to train" in out
    assert "4 trials: 4 finished" in out
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    start(tmp_path / "whole").communicate()
    assert records(folder) == records(tmp_path / "whole")
    out, _ = start(folder).communicate()
    assert "4 trials: 4 finished" in out
    assert "to train;" not in out
