"""Chaos on a local cluster of several nodes: actors, workers, nodes and drivers die at random steps, and no bit changes.

A schedule is a pure function of its number: the layout (two workers, a worker with two set actors, or two workers that share
each set) and what dies when.
Whatever happened, the run ends with the weights and the history of the run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
DRIVER = Path(__file__).with_name("chaos_driver.py")
LAYOUTS = {"two workers": (2, 0, 1), "a worker, two actors": (1, 2, 1), "two workers a set": (2, 0, 2)}
"""Workers, actors of each, workers a set."""
TITLES = {"worker": "ray::RayTrainWorker", "actor": "ray::SetActor"}
LAST = 24


class Death(NamedTuple):
    """What is killed once so many steps are done; ``node`` may be the one of a worker or of an actor."""

    what: str
    step: int


def schedule(number: int) -> tuple[str, list[Death]]:
    """A layout and one or two deaths in it."""
    draw = random.Random(number)
    layout = list(LAYOUTS)[number % 2] if number < 20 else "two workers a set"
    kinds = ["actor", "node", "driver", "worker"] if LAYOUTS[layout][1] else ["worker", "node", "driver"]
    steps = sorted(draw.sample(range(1, LAST - 2), draw.choice([1, 1, 2])))
    return layout, [Death(draw.choice(kinds), step) for step in steps]


class Machines:
    """A head without cores and three nodes of one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        }
        settings = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_timeout_ms": 2000}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": settings})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(3)]

    def start(self, folder: Path, layout: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, str(DRIVER), str(folder), self.cluster.address, *map(str, LAYOUTS[layout])]
        log = (folder / "driver.log").open("ab")
        root = {**self.environment, "PYTHONPATH": str(DRIVER.parents[2])}
        return subprocess.Popen(words, cwd=DRIVER.parents[2], env=root, stdout=log, stderr=log)

    def kill(self, what: str, layout: str, driver: subprocess.Popen[bytes], draw: random.Random) -> bool:
        """Whether there was one to kill."""
        if what == "driver":
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            return True
        kind = what if what != "node" else "actor" if LAYOUTS[layout][1] else "worker"
        found = [(node, pid) for node in self.nodes for pid in children(raylet(node)) if title(pid).startswith(TITLES[kind])]
        if not found:
            return False
        node, pid = draw.choice(sorted(found, key=lambda pair: pair[1]))
        if what == "node":
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.remove(node)
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        else:
            os.kill(pid, signal.SIGKILL)
        return True

    def close(self) -> None:
        self.cluster.shutdown()


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except (OSError, IndexError):
            continue
    return found


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0")
    except OSError:
        return ""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    pytest.importorskip("ray")
    found = Machines()
    yield found
    found.close()


@pytest.fixture(scope="module")
def undisturbed(machines, tmp_path_factory) -> dict[str, Path]:
    """A run of each layout that nothing happens to, made when it is asked for."""
    return {}


def run(machines: Machines, folder: Path, layout: str, deaths: list[Death], draw: random.Random) -> list[str]:
    """Train to the end whatever dies; returns what died."""
    folder.mkdir()
    driver, died, waiting = machines.start(folder, layout), [], list(deaths)
    end = time.monotonic() + 270  # a test has two runs: this says why before its own time is over
    while not (folder / "history.json").exists():
        assert time.monotonic() < end, f"not done; died so far: {died}\n{(folder / 'driver.log').read_text()[-2000:]}"
        if driver.poll() is not None:
            assert driver.returncode in (0, -signal.SIGKILL), (folder / "driver.log").read_text()[-3000:]
            if driver.returncode != 0:
                driver = machines.start(folder, layout)
        if waiting and step_of(folder) >= waiting[0].step and machines.kill(waiting[0].what, layout, driver, draw):
            died.append(waiting.pop(0).what)
        time.sleep(0.02)
    assert driver.wait(60) == 0
    return died


def step_of(folder: Path) -> int:
    path = folder / "step"
    return int(path.read_text()) if path.exists() else 0


def check(machines: Machines, undisturbed: dict[str, Path], tmp_path: Path, number: int) -> None:
    layout, deaths = schedule(number)
    if layout not in undisturbed:
        whole = tmp_path.parent / f"whole-{LAYOUTS[layout]}"
        assert run(machines, whole, layout, [], random.Random(0)) == []
        undisturbed[layout] = whole
    folder = tmp_path / "run"
    assert run(machines, folder, layout, deaths, random.Random(number)) == [death.what for death in deaths]
    histories = [json.loads((path / "history.json").read_text()) for path in (folder, undisturbed[layout])]
    assert histories[0] == histories[1]
    assert histories[0][-1]["step"] == LAST
    states = [
        torch.load(path / "checkpoints" / "last" / "state.pt", weights_only=True) for path in (folder, undisturbed[layout])
    ]
    for key, tensor in states[1]["model"].items():
        assert torch.equal(states[0]["model"][key], tensor), key


# A node with an actor is lost; an actor dies, then its worker. (test_train.py has the death of one of several workers.)
@pytest.mark.parametrize("number", [3, 5])
def test_a_death_changes_no_bit(machines, undisturbed, tmp_path, number):
    check(machines, undisturbed, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(28))
def test_deaths_at_random_steps_change_no_bit(machines, undisturbed, tmp_path, number):
    check(machines, undisturbed, tmp_path, number)


def test_schedules_have_every_death_in_every_layout():
    met = {(layout, death.what) for layout, deaths in map(schedule, range(28)) for death in deaths}
    assert met == {
        *(("two workers", what) for what in ("worker", "node", "driver")),
        *(("two workers a set", what) for what in ("worker", "node", "driver")),
        *(("a worker, two actors", what) for what in ("actor", "worker", "node", "driver")),
    }
