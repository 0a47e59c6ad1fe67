"""k of n features that lie on actors: the samples and gradients of one process, and a support that is found."""

from __future__ import annotations

import pytest
import torch

from distset import InMemory
from distset.cluster.ray_set import RaySet
from distset.cluster.set_actors import SetActors
from distset.expect import LeaveOneOut, ScoreFunction, expect, expect_chunked
from distset.sets import Chunk
from distset.states import Sum
from distset.subsets import ChunkedKSubset, KSubset, LogitTable

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def chosen_sum(chunk: Chunk, chosen: torch.Tensor) -> Sum:
    """The sum of the chosen features, ``(S, m)``, of those of the chunk; runs where the features are."""
    total = chunk.elements.new_zeros(len(chosen), chunk.elements.shape[-1])
    sample, place = ((chosen >= chunk.start) & (chosen < chunk.start + chunk.size)).nonzero().unbind(-1)
    total.index_add_(0, sample, chunk.elements[chosen[sample, place] - chunk.start])
    return Sum(total, torch.tensor(float(chunk.size)))


class Regression:
    """``k`` of ``n`` features hold a noisy copy of the response each; the loss of answering by the mean of the chosen."""

    def __init__(self, n: int, k: int, examples: int = 64, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.support = torch.randperm(n, generator=generator)[:k]
        response = torch.randn(examples, generator=generator)
        self.response = response / response.square().mean().sqrt()
        self.features = noise * torch.randn(n, examples, generator=generator)
        self.features[self.support] += self.response

    def loss(self, features, chosen: torch.Tensor) -> torch.Tensor:
        answer = features.merge(chosen_sum, chosen).total / chosen.shape[-1]
        return (answer - self.response).square().mean(-1)


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


def learn(features, made: Regression, n: int, k: int, *, samples: int, steps: int, rate: float) -> list[float]:
    """The share of the support in the samples, step by step."""
    logits, shares = torch.zeros(n), []
    for step in range(steps):
        seen: list[torch.Tensor] = []

        def f(chosen: torch.Tensor, seen=seen) -> torch.Tensor:
            seen.append(chosen)
            return made.loss(features, chosen)

        subset = ChunkedKSubset(features, k, logits=LogitTable(logits))
        estimate = expect_chunked(f, subset, samples, seed=step)
        scale = estimate.gradient.abs().mean().clamp_min(1e-12)
        logits.index_add_(0, estimate.positions, (-rate * estimate.gradient / scale).float())
        shares.append(float(torch.isin(seen[0], made.support).float().mean()))
    return shares


@pytest.mark.slow
def test_a_support_is_found_on_actors(crew):
    made = Regression(2_000, 20)
    features = RaySet(InMemory(made.features, 250), crew)
    shares = learn(features, made, 2_000, 20, samples=64, steps=25, rate=0.3)
    assert shares[0] < 0.05
    assert shares[-1] > 0.5


@pytest.mark.slow
def test_a_thousand_of_a_million_features_on_actors(crew):
    """64 numbers a feature stay where they are, 256 MB; one logit a feature travels. Some steps, towards the support."""
    n, k = 1_000_000, 1_000
    made = Regression(n, k)
    features = RaySet(InMemory(made.features, 50_000), crew)
    shares = learn(features, made, n, k, samples=128, steps=20, rate=0.3)
    assert shares[0] < 0.003
    assert shares[-1] > 0.03  # thirty times chance
