"""jobs.train with sets shared by workers or worked on by actors: the same run as in one process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from distset import InMemory
from distset.build import build
from distset.checkpoints import read_state
from distset.cluster.config import Cluster
from distset.cluster.resources import room_for
from distset.cluster.world import ClusterWorld, check_sharing
from distset.data import Bag, Split, StoreWriter
from distset.training import train_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twelve bags of vectors in chunks of 16, two of them in one chunk."""
    generator = np.random.default_rng(0)
    sizes = [10, 12, *range(40, 140, 10)]
    bags = [
        Bag(f"bag-{i}", generator.normal(i % 2, 1, (n, 6)).astype(np.float32), label=str(i % 2)) for i, n in enumerate(sizes)
    ]
    ids = [bag.set_id for bag in bags]
    path = tmp_path_factory.mktemp("store") / "s"
    with StoreWriter(path) as writer:
        for bag in bags:
            writer.add(bag)
        writer.finish(splits=[Split(ids[:8], ids[8:10], ids[10:])])
    return path


def run(store, folder, *overrides: str) -> dict[str, torch.Tensor]:
    """Train; the last weights."""
    with initialize_config_module("conf", version_base="1.3"):
        chosen = ["data=store", f"data.path={store}", "data.chunk_size=16", "model=deepsets", "model.width=8", "optim=sgd"]
        plan = ["plan.epochs=2", "plan.batch=4", "run.bar=false", "run.plots=false", f"run.dir={folder}"]
        config = OmegaConf.to_container(compose("train", [*chosen, *plan, *overrides]), resolve=True)
    config.pop("hydra", None)
    config.pop("experiment", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    metrics = train_run(config, folder)
    torch.set_num_threads(threads)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    return read_state(folder / "checkpoints" / "last" / "state.pt")["model"]


def test_sampled_chunks_beside_actors_leave_the_bits_of_one_process(store, tmp_path):
    """However many are sampled: the trainer replays them all (cluster.local is grad.m)."""
    sampled = ("cluster=none", "grad=sampled", "grad.m=3", "data.chunk_size=4")
    alone = run(store, tmp_path / "alone", *sampled)
    beside = run(store, tmp_path / "beside", *sampled, "cluster.actors=2", "cluster.actor_cpus=0.5")
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def composed(*overrides: str) -> Cluster:
    with initialize_config_module("conf", version_base="1.3"):
        return build(OmegaConf.to_container(compose("train", [*overrides]).cluster, resolve=True), "cluster")


def test_what_the_configuration_says_of_actors_reaches_them():
    said = ("cluster.actors=2", "cluster.actor_cpus=2", "cluster.actor_gpus=0.5", "cluster.slices=6")
    cluster = composed(*said, "cluster.actor_resources={preemptible:1}", "grad=sampled", "grad.m=4")
    assert (composed("grad=exact").local, composed("grad=subset", "cluster.local=2").local) == (1, 2)
    placed = ClusterWorld(cluster).place(InMemory(torch.randn(20, 3), 2))
    assert (placed.local, placed.slices, placed.actors.count, placed.actors.threads) == (4, 6, 2, 2)
    assert placed.actors.resources == {"preemptible": 1}
    assert (placed.actors.num_cpus, placed.actors.num_gpus) == (2, 0.5)
    assert room_for(cluster).actor == {"CPU": 2, "GPU": 0.5, "preemptible": 1}
    with pytest.raises(ValueError, match=r"cluster.slices: got 0, wanted at least 1, or null"):
        check_sharing(Cluster(slices=0))
    with pytest.raises(ValueError, match=r"cluster.actor_gpus: got -1, wanted at least 0"):
        check_sharing(Cluster(actor_gpus=-1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["cluster.workers=2", "cluster.set_parallel=2"],
        ["cluster.workers=1", "cluster.actors=2", "cluster.actor_cpus=0.5"],
        ["cluster=none", "cluster.actors=1"],
    ],
    ids=["two workers a set", "a worker with actors", "an actor"],
)
def test_shared_sets_train_as_in_one_process(store, tmp_path, how):
    """float32: the gradients' sums are rounded in another order."""
    alone = run(store, tmp_path / "alone", "cluster=none")
    shared = run(store, tmp_path / "shared", *how)
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, rtol=0, atol=2e-5)
