"""k of n features that lie on actors: the samples and gradients of one process, and a support that is found."""

from __future__ import annotations

import pytest
import torch

from benchmarks.large_choice import Regression, learn
from distset import InMemory
from distset.cluster.ray_set import RaySet
from distset.cluster.set_actors import SetActors
from distset.expect import LeaveOneOut, ScoreFunction, expect, expect_chunked
from distset.subsets import ChunkedKSubset, KSubset, LogitTable

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def crew(cluster):
    with SetActors(2, num_cpus=0.1) as made:
        yield made


def test_samples_and_gradients_are_those_of_one_process(crew):
    made = Regression(3_000, 20)
    logits = torch.randn(3_000, generator=torch.Generator().manual_seed(1))
    memory = InMemory(made.features, 256)
    found = []
    for features in (memory, RaySet(memory, crew), RaySet(memory, crew, slices=3)):
        subset = ChunkedKSubset(features, 20, logits=LogitTable(logits))
        found.append(expect_chunked(lambda chosen, on=features: made.loss(on, chosen), subset, 16, seed=5))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    whole = logits.clone().requires_grad_()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return (z @ made.features / 20 - made.response).square().mean(-1)

    value = expect(loss, KSubset(whole, 20), 16, grad=ScoreFunction(LeaveOneOut()), seed=5)
    value.backward()
    dense = torch.zeros(3_000, dtype=torch.float64).index_put_((found[0].positions,), found[0].gradient)
    torch.testing.assert_close(found[0].value.float(), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense.float(), whole.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_support_is_found_on_actors(crew):
    made = Regression(2_000, 20)
    records = learn(RaySet(InMemory(made.features, 250), crew), made, samples=64, steps=60)
    assert records[0]["found"] < 0.3
    assert records[-1]["found"] > 0.9


@pytest.mark.slow
def test_a_thousand_of_a_million_features_on_actors(crew):
    """64 numbers a feature stay where they are, 256 MB; one logit a feature travels. Some steps, towards the support
    (`benchmarks.large_choice --full` learns it to the end)."""
    made = Regression(1_000_000, 1_000)
    records = learn(RaySet(InMemory(made.features, 50_000), crew), made, samples=128, steps=20, rate=0.3)
    assert records[0]["found"] < 0.01
    assert records[-1]["found"] > 0.05  # fifty times chance
