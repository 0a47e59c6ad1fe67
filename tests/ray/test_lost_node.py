"""A node lost in the middle of a step: its actors' chunks are done by the others, to the same bits."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAM = """
import os, threading, time, warnings
os.environ["RAY_health_check_initial_delay_ms"] = "500"
os.environ["RAY_health_check_period_ms"] = "300"
os.environ["RAY_health_check_failure_threshold"] = "3"
os.environ.setdefault("RAY_worker_niceness", "0")
import ray, torch
from ray.cluster_utils import Cluster
from distset import DeepSets, Exact, InMemory, encode_set
from distset.cluster.ray_set import RaySet
from distset.cluster.set_actors import SetActors

torch.set_num_threads(1)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

class Slow(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.1)
        return x

def encode(chunks):
    encoder.zero_grad()
    z = encode_set(encoder, chunks, grad=Exact(), seed=1)
    z.square().sum().backward()
    return [z.detach(), *(p.grad.clone() for p in encoder.parameters())]

torch.manual_seed(0)
encoder = DeepSets(torch.nn.Sequential(torch.nn.Linear(3, 4), Slow()), "mean")
memory = InMemory(torch.randn(320, 3), 8)
crew = SetActors(2, num_cpus=1, start_seconds=120)
calm = encode(RaySet(memory, crew))
where = lambda actor: ray.get_runtime_context().get_node_id()
assert len({ray.get(member.actor.__ray_call__.remote(where)) for member in crew.members}) == 2
threading.Timer(1.0, lambda: cluster.remove_node(nodes[0], allow_graceful=False)).start()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    lost = encode(RaySet(memory, crew))
assert all(torch.equal(a, b) for a, b in zip(calm, lost))
assert torch.equal(calm[0], encode_set(encoder, memory, seed=1))
assert any("died" in str(warning.message) for warning in said)
cluster.add_node(num_cpus=1)  # and one comes back
deadline = time.monotonic() + 60
while not all(crew.usable(number) for number in range(2)):
    assert time.monotonic() < deadline
    time.sleep(0.5)
assert all(torch.equal(a, b) for a, b in zip(calm, encode(RaySet(memory, crew))))
crew.close()
ray.shutdown()
cluster.shutdown()
print("same bits")
"""


def test_a_node_lost_in_a_step_changes_no_bit():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "same bits"
