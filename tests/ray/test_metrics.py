"""The metrics of a run, read where Prometheus reads them."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from distset.cluster import metrics
from distset.cluster.config import Cluster
from distset.cluster.metrics import Metrics
from distset.cluster.train import train_on_ray
from distset.data import Bag, Store, write_store
from distset.tasks.bag_models import deepsets
from distset.tasks.bags import BagTask
from distset.train import Example, Plan, Watch, Watches, fit
from distset.waiting import Stopwatch

pytestmark = pytest.mark.ray


def train(store: Path, watch: Watch) -> None:
    bags = Store(store)
    examples = [Example(bags.open(set_id, 64), index % 2) for index, set_id in enumerate(bags.ids)]
    fit(BagTask.of(*deepsets(4, 1, width=8), classes=["no", "yes"]), examples, plan=Plan(epochs=2, batch=2), watch=watch)


@pytest.fixture
def store(tmp_path) -> Path:
    write_store(tmp_path / "store", [Bag(f"bag-{i}", torch.randn(200 + i, 4), label="ab"[i % 2]) for i in range(4)])
    return tmp_path / "store"


def scraped(ray, run: str = "digits") -> dict[str, float]:
    """``{'name rank': value}`` of the metrics of a run at this node's endpoint."""
    (node,) = ray.nodes()
    text = urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_distset_") and f'run="{run}"' in line:
            labels, value = line.rsplit(" ", 1)
            rank = labels.split('rank="')[1].split('"')[0]
            found[f"{labels.split('{')[0]} {rank}"] = float(value)
    return found


def test_the_endpoint_shows_what_a_run_does(cluster, store):
    @cluster.remote(num_cpus=1)
    class Worker:
        def work(self) -> None:
            torch.set_num_threads(1)
            for rank in (0, 1):  # one process may well tell of two ranks
                train(store, Metrics("digits", rank))

    worker = Worker.remote()
    cluster.get(worker.work.remote())
    end, found = time.monotonic() + 40, {}
    while time.monotonic() < end and not {"ray_distset_loss 0", "ray_distset_step_seconds 1"} <= found.keys():
        time.sleep(0.5)
        found = scraped(cluster)
    told = set(re.findall(r"``(ray_distset_\w+)``", metrics.__doc__))
    assert {name.split()[0] for name in found} == told
    documented = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    assert set(re.findall(r"ray_distset_\w+", documented)) < told
    assert found["ray_distset_step 0"] == found["ray_distset_steps 0"] == 4
    assert found["ray_distset_sets_read_total 0"] == 8
    assert found["ray_distset_elements_read_total 0"] == 2 * (200 + 201 + 202 + 203)
    assert 0 < found["ray_distset_loss 0"] < 10
    for rank in (0, 1):
        assert 0 < found[f"ray_distset_step_seconds {rank}"] <= found[f"ray_distset_step_seconds_sum_total {rank}"] < 60
        assert 0 < found[f"ray_distset_input_wait_seconds {rank}"] < found[f"ray_distset_step_seconds {rank}"]
    assert found["ray_distset_elements_per_second 0"] == pytest.approx(
        found["ray_distset_sets_per_second 0"] * 201.5, rel=0.02
    )
    assert not [name for name in found if name.endswith(" 1") and "seconds" not in name]


@pytest.mark.slow
def test_a_run_on_workers_tells_what_it_does(cluster, store):
    """As `train_on_ray` wires it: under the name of the run, by every rank."""

    def process(*, watch: Watch, device: torch.device) -> dict[str, float]:
        train(store, watch)
        end, found = time.monotonic() + 40, {}
        while time.monotonic() < end and "ray_distset_loss 0" not in found:  # they end with the process
            time.sleep(0.5)
            found = scraped(cluster, "wired")
        return found

    found = train_on_ray(process, Cluster(workers=1), name="wired")
    assert found["ray_distset_step 0"] == 4
    assert found["ray_distset_step_seconds_sum_total 0"] > 0


def test_waiting_for_a_slow_disk_is_told_from_computing(store, monkeypatch):
    """Every chunk comes 10 ms late and is worked on for 5 ms."""

    class Heard(Watch):
        def __init__(self) -> None:
            self.paces: list[tuple[float, float]] = []

        def paced(self, step: int, seconds: float, waited: float) -> None:
            self.paces.append((seconds, waited))

    from distset.data import parquet_set

    def late(elements: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return elements

    monkeypatch.setattr(parquet_set, "page_in", late)
    bag = Store(store).open("bag-0", 64)
    clock = Stopwatch()
    list(bag.map(lambda chunk: time.sleep(0.005)))
    seconds, waited = clock.read()
    assert bag.num_chunks * 0.01 <= waited <= seconds - bag.num_chunks * 0.005
    heard = Heard()
    train(store, Watches(Watch(), heard))
    assert len(heard.paces) == 4
    assert all(2 * 2 * 4 * 0.01 <= waited < seconds for seconds, waited in heard.paces)  # two sets, two sweeps, four chunks
