"""A cluster that does not fit the run: too small, too busy, of other versions, open to strangers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from distset.cluster import preflight, resources, train
from distset.cluster.config import Cluster
from distset.cluster.resources import room_for, runs_that_fit
from distset.cluster.train import train_on_ray
from distset.train import Watch
from distset.versions import differences, installed

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def unused(*, watch: Watch, device: torch.device) -> None:
    raise AssertionError("never started")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            Cluster(workers=9),
            r"cluster.workers: 5 of 9 workers lack a place: 9 workers of 1 CPU ask for 9 CPU; the cluster's 1 node have "
            r"4 CPU \(.* free\). Either lower cluster.workers or cluster.cpus, add nodes, or raise cluster.wait",
        ),
        (
            Cluster(workers=2, cpus=3, wait_seconds=0.2),
            r"1 of 2 workers lack a place after 0.2 s of waiting: .* ask for 6 CPU",
        ),
        (
            Cluster(workers=1, gpu=True),
            r"1 of 1 workers lack a place: .* 1 CPU and 1 GPU; .* and 0 GPU \(0 free\)",
        ),
        (
            Cluster(workers=1, actors=4),
            r"1 of 4 actors lack a place: 1 workers of 1 CPU with 4 actors of 1 CPU ask for 5 CPU",
        ),
        (
            Cluster(workers=1, actors=2, actor_resources={"preemptible": 1}),
            r"2 of 2 actors lack a place: .* 2 actors of 1 CPU and 1 preemptible ask .* and 0 preemptible \(0 free\)",
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
    with pytest.raises(ValueError, match=r"others are using what the workers need: .* have 4 CPU \(1 free\)"):
        train_on_ray(unused, Cluster(workers=3))
    cluster.kill(other)
    end = time.monotonic() + 20
    while room_for(Cluster(workers=4)).free["CPU"] < 4 and time.monotonic() < end:
        time.sleep(0.1)
    assert room_for(Cluster(workers=4)).free["CPU"] == 4


def test_placing_lost_workers_again_has_an_end(monkeypatch):
    monkeypatch.delenv(train.PLACING, raising=False)
    limits = [
        train._trainer({}, cluster, "unused").run_config.failure_config.controller_failure_limit
        for cluster in (Cluster(), Cluster(wait_seconds=1800), Cluster(max_failures=0))
    ]
    assert limits == [3, 30, 0]  # attempts beyond the first, a minute each


@pytest.mark.slow
def test_lost_workers_that_find_no_place_again_end_the_run_with_what_is_missing(cluster, tmp_path, monkeypatch):
    """As with a node that is lost: while a killed worker's place is free, somebody else takes it."""
    monkeypatch.setenv(train.PLACING, "1")

    @cluster.remote(num_cpus=1)
    class Other:
        def here(self) -> None: ...

    def process(*, watch: Watch, device: torch.device) -> None:
        (tmp_path / "begun").touch()
        while not (tmp_path / "asked").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    others = []

    def ask() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.1)
        others.append(Other.remote())  # there is no room for it yet
        time.sleep(1)
        (tmp_path / "asked").touch()

    asking = threading.Thread(target=ask)
    asking.start()
    missing = r"^cluster.workers: others are using what the workers need after 3 s of waiting: .* 4 CPU \(3 free\)"
    try:
        with pytest.raises(ValueError, match=missing + r".*the same command goes on from the last checkpoint$"):
            train_on_ray(process, Cluster(workers=1, cpus=4, max_failures=1, wait_seconds=2))
    finally:
        asking.join()
        cluster.kill(others[0])


@pytest.mark.parametrize(
    ("nodes", "asked", "fits", "actors", "runs"),
    [
        ([3, 3, 3], Cluster(workers=1, cpus=2, actors=3, actor_cpus=2), 3, 2, 0),  # a core is left over on each
        ([4, 3], Cluster(workers=1, cpus=3, actors=1, actor_cpus=4), 2, 1, 1),  # the worker leaves the larger one alone
        ([5, 3], Cluster(workers=1, cpus=2, actors=2, actor_cpus=3), 3, 2, 1),
        ([8], Cluster(workers=2, cpus=1, actors=1, actor_cpus=1), 8, 6, 2),
        ([1], Cluster(workers=1, cpus=0.1, actors=3, actor_cpus=0.3), 10, 3, 1),
        ([4], Cluster(workers=0, actors=3), 4, 4, 9),  # this process asks for nothing
    ],
)
def test_room_is_counted_node_by_node(nodes, asked, fits, actors, runs, monkeypatch):
    monkeypatch.setattr(resources.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": float(n)}} for n in nodes])
    monkeypatch.setattr(resources.ray, "available_resources", lambda: {"CPU": float(sum(nodes))})
    room = room_for(asked)
    assert (room.fits, room.actors_fit) == (fits, actors)
    assert bool(room.missing) == (actors < room.actors)
    assert runs_that_fit(asked, 9) == runs


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


def answers_to_a_stranger(node: dict) -> set[int]:
    """What the agents of a node say to one without a token who wants code to run."""
    asked = [f"{node['RuntimeEnvAgentPort']}/get_or_create_runtime_env"]
    if node["DashboardAgentListenPort"] > 0:  # where another Ray of the machine has the port, this one does without
        asked.append(f"{node['DashboardAgentListenPort']}/api/job_agent/jobs/")
    job, codes = json.dumps({"entrypoint": "true"}).encode(), set()
    for place in asked:
        where = f"http://{node['NodeManagerAddress']}:{place}"
        request = urllib.request.Request(where, job, {"Content-Type": "application/json"})
        try:
            codes.add(urllib.request.urlopen(request, timeout=10).status)
        except urllib.error.HTTPError as error:
            codes.add(error.code)
    return codes


def test_nothing_is_run_for_strangers(cluster):
    """Ray's agents listen on every interface; what they ask for is a token."""
    assert answers_to_a_stranger(cluster.nodes()[0]) == {401}


def test_a_ray_of_ones_own_has_no_dashboard(monkeypatch):
    asked: dict = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(train.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(train.ray, "init", lambda **how: asked.update(how))
    monkeypatch.setattr(train.ray, "cluster_resources", dict)
    train.start_ray(Cluster())
    assert asked["include_dashboard"] is False
    assert asked["address"] == "local"  # no Ray of somebody else's that runs here
    assert "dashboard_host" not in asked


ALONE = """
import ray
from distset.cluster.config import Cluster
from distset.cluster.train import start_ray
from tests.ray.test_faults import answers_to_a_stranger

start_ray(Cluster())
print("answers", answers_to_a_stranger(ray.nodes()[0]))
print("dashboard", ray._private.worker._global_node.webui_url or "none")
"""


@pytest.mark.slow
def test_a_ray_started_by_a_job_is_closed_to_strangers(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["answers {401}", "dashboard none"]


def test_an_address_where_nothing_answers_is_said_at_once(monkeypatch):
    monkeypatch.setattr(train.ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ValueError, match=rf"cluster.address: nothing answers at 127.0.0.1:{port} .*refused"):
        train.start_ray(Cluster(address=f"127.0.0.1:{port}"))


@pytest.mark.usefixtures("cluster")
def test_the_doctor_asks_every_node(tmp_path, monkeypatch):
    (tmp_path / "store.json").touch()
    storage = str(tmp_path / "checkpoints")
    asked = Cluster(workers=2, address="auto", storage=storage)
    assert [finding.level for finding in preflight.check_cluster(asked, need=2**20)] == ["ok"]
    assert [finding.level for finding in preflight.check_nodes(tmp_path / "store.json", storage)] == ["ok"]
    (small,) = preflight.check_cluster(asked._replace(workers=9), need=None)
    assert (small.level, small.message[:15]) == ("fail", "9 workers of 1 ")
    (waiting,) = preflight.check_cluster(asked._replace(workers=9, wait_seconds=60), need=None)
    assert (waiting.level, waiting.advice[:19]) == ("warn", "training waits 60 s")
    large = list(preflight.check_cluster(asked, need=2**50))
    assert "the smallest node has" in large[-1].message
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "asks for no token" in list(preflight.check_cluster(asked, need=None))[-1].message
    monkeypatch.setattr(preflight, "installed", lambda: {**installed(), "torch": "9.9.0"})
    found = list(preflight.check_nodes(tmp_path / "none", f"{tmp_path}/store.json/run"))
    assert {finding.level for finding in found} == {"fail"}
    told = [finding.message for finding in found]
    assert "instead of 9.9.0" in told[0]
    assert "does not see" in told[1]
    assert "cluster.storage: " in told[2]


def test_a_ray_that_does_not_take_us_is_said(monkeypatch):
    def refuse(**how) -> None:
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr(train.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(train.ray, "init", refuse)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ValueError, match=r"no Ray at 127.0.0.1:\d+ takes this process .* is its token here \(RAY_AUTH_MODE"),
    ):
        train.start_ray(Cluster(address=f"127.0.0.1:{server.getsockname()[1]}"))
