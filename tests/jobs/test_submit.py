"""ray job submit: a checkout's jobs on a running cluster, with the runtime environment that stands in the repository."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("ray.dashboard.optional_deps", reason="the job server needs distset[cluster]", exc_type=ImportError)
pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # of the job's python
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": uuid.uuid4().hex,
}
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TINY = (
    *("run.bar=false", "run.plots=false", "data.make.bags=[8,6,6]", "data.make.size=[4,7]", "data.chunk_size=3"),
    *("plan.batch=4", "plan.epochs=2", "model.width=8", "model.slots=2", "model.heads=2"),
    *("backbone=cnn", "backbone.widths=[4]", "backbone.dim=8"),
)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def processes_of(folder: str) -> list[int]:
    """Processes that were started with this folder's name, which is nobody else's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The job server's address of a head of two cores on loopback; its processes are gone afterwards."""
    folder = tempfile.mkdtemp(prefix="head-", dir="/tmp")  # short: Ray's sockets lie in it
    try:
        for last in (False, False, True):  # on a busy machine Ray's own time limits may pass
            process, address = start_head(folder)
            if answers(f"{address}/api/version", process):
                break
            assert not last, Path(folder, "log").read_text()[-4000:]
            end(process, folder)
        yield address
    finally:
        end(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


def start_head(folder: str) -> tuple[subprocess.Popen, str]:
    port, dashboard, agent, client = free_ports(4)
    command = [*RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={folder}"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    return process, f"http://127.0.0.1:{dashboard}"


def answers(url: str, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Whether it does, before its process ends."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {ENVIRONMENT['RAY_AUTH_TOKEN']}"})
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200:
                return True
        time.sleep(0.3)
    return False


def end(process: subprocess.Popen, folder: str) -> None:
    """End the head and all that it started."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def submit(head: str, *entry: str) -> str:
    """Submit from the checkout, wait for the end; returns the job's output."""
    command = [*RAY, "job", "submit", "--address", head, "--runtime-env", "runtime_env.yaml", "--", *entry]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


LOOKS_AND_TRAINS = """
import json, os, pathlib, sys, distset
files = [path for path in pathlib.Path(".").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
seen = {"cwd": os.getcwd(), "code": str(pathlib.Path(distset.__file__).parents[1])}
seen |= {"bytes": sum(path.stat().st_size for path in files), "names": sorted({path.parts[0] for path in files})}
print("looked", json.dumps(seen))
from jobs.train import main
main()
"""


def test_a_submitted_job_trains_from_the_uploaded_checkout(head, tmp_path):
    """The code that trains is what was taken along: no data, no environment, no history."""
    out = submit(head, "python", "-c", LOOKS_AND_TRAINS, f"run.dir={tmp_path / 'run'}", "cluster=none", *TINY)
    seen = json.loads(next(line for line in out.splitlines() if line.startswith("looked ")).partition(" ")[2])
    assert seen["code"] == seen["cwd"] != str(ROOT)
    assert {"distset", "jobs", "conf", "pyproject.toml"} <= set(seen["names"])
    assert not set(seen["names"]) & {".git", ".venv", "runs", "store", "tests", "docs", "benchmarks"}
    assert seen["bytes"] < 10e6
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 4


def test_nobody_submits_without_the_token(head):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head}/api/jobs/", timeout=30)


@pytest.mark.slow
def test_submitted_training_on_a_worker_and_a_search_of_four_trials_run_to_the_end(head, tmp_path):
    submit(head, "python", "-m", "jobs.train", f"run.dir={tmp_path / 'run'}", "cluster=local", *TINY)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 4
    out = submit(head, "python", "-m", "jobs.tune", f"run.dir={tmp_path / 'search'}", "search.trials=4", *TINY)
    assert "4 trials: 4 finished. Best by val/loss (min)" in out
    command = (tmp_path / "search" / "best" / "command.txt").read_text().split()
    assert command[:4] == ["OMP_NUM_THREADS=1", "python", "-m", "jobs.train"]
    done = subprocess.run([sys.executable, *command[2:]], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = json.loads((tmp_path / "search" / "search.json").read_text())["best"]
    trial = tmp_path / "search" / "trials" / f"{best['number']:04d}" / "run"
    assert (tmp_path / "search" / "best" / "run" / "metrics.json").read_text() == (trial / "metrics.json").read_text()
