"""A cluster that does not fit the run: too small, too busy, of other versions, open to strangers."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from distset.cluster import train
from distset.cluster.config import Cluster
from distset.cluster.resources import room_for
from distset.cluster.train import train_on_ray
from distset.train import Watch
from distset.versions import differences, installed

pytestmark = pytest.mark.ray


def unused(*, watch: Watch, device: torch.device) -> None:
    raise AssertionError("never started")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            Cluster(workers=9),
            r"cluster.workers: 5 of 9 workers lack a place: 9 workers of 1 CPU ask for 9 CPU; the cluster's 1 node have "
            r"4 CPU \(.* free\), room for 4. Either lower cluster.workers or cluster.cpus, add nodes, or raise cluster.wait",
        ),
        (Cluster(workers=2, cpus=3, wait_seconds=0.2), r"1 of 2 workers lack a place after 0.2 s of waiting: .* room for 1"),
        (
            Cluster(workers=1, gpu=True),
            r"1 of 1 workers lack a place: .* 1 CPU and 1 GPU; .* and 0 GPU \(0 free\), room for 0",
        ),
    ],
)
def test_a_cluster_smaller_than_asked_says_what_is_missing(asked, message, monkeypatch):
    monkeypatch.setattr("distset.cluster.resources.SETTLE_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(ValueError, match=message):
        train_on_ray(unused, asked)
    assert time.monotonic() - started < 10


def test_a_busy_cluster_says_so_and_is_free_again_afterwards(cluster, monkeypatch):
    monkeypatch.setattr("distset.cluster.resources.SETTLE_SECONDS", 0.5)

    @cluster.remote(num_cpus=3)
    class Other:
        def here(self) -> None: ...

    other = Other.remote()
    cluster.get(other.here.remote())
    with pytest.raises(ValueError, match=r"others are using what the workers need: .* have 4 CPU \(1 free\), room for 4"):
        train_on_ray(unused, Cluster(workers=3))
    cluster.kill(other)
    end = time.monotonic() + 20
    while room_for(Cluster(workers=4)).free["CPU"] < 4 and time.monotonic() < end:
        time.sleep(0.1)
    assert room_for(Cluster(workers=4)).free["CPU"] == 4


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_of_another_version_ends_the_run(monkeypatch):
    monkeypatch.setattr(train, "installed", lambda: {**installed(), "torch": "9.9.0"})
    with pytest.raises(
        ValueError, match=rf"a worker on [\d.]+ has torch {torch.__version__.split('+')[0]}.* instead of 9.9.0"
    ):
        train_on_ray(unused, Cluster(workers=1))


def test_a_worker_of_another_version_is_named():
    train.check_versions(installed())
    with pytest.raises(ValueError, match=rf"a worker on [\d.]+ has distset {installed()['distset']} instead of 9.9.0"):
        train.check_versions({**installed(), "distset": "9.9.0"})


def test_versions_that_matter():
    ours = {"python": "3.11.2", "torch": "2.13.0", "ray": "2.60.0"}
    assert differences(ours, {**ours, "python": "3.11.9"}) == []
    assert differences(ours, {**ours, "python": "3.12.2"}) == ["python 3.12.2 instead of 3.11.2"]
    assert differences(ours, {"python": "3.11.2", "torch": "2.13.0"}) == ["ray none instead of 2.60.0"]
    assert set(installed()) == {"python", "distset", "torch", "numpy", "pyarrow", "ray"}


STRANGER = """
import json, urllib.error, urllib.request
import ray
from distset.cluster.config import Cluster
from distset.cluster.train import start_ray

start_ray(Cluster())
node = ray.nodes()[0]["NodeManagerAddress"]
job = json.dumps({"entrypoint": "true"}).encode()
request = urllib.request.Request(f"http://{node}:52365/api/job_agent/jobs/", job, {"Content-Type": "application/json"})
try:
    print("answer", urllib.request.urlopen(request, timeout=10).status)
except urllib.error.HTTPError as error:
    print("answer", error.code)
print("dashboard", ray._private.worker._global_node.webui_url or "none")
"""


def test_a_ray_of_ones_own_has_no_dashboard_and_takes_no_jobs_from_strangers(tmp_path):
    """Ray's agents listen on every interface; what they ask for is a token."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STRANGER], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["answer 401", "dashboard none"]
