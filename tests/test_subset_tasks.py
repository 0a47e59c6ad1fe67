"""The tasks of k-subsets against their definitions, by enumeration."""

import itertools
import math

import pytest
import torch
from small_subsets import subsets
from torch import Tensor

from distset.expect import LeaveOneOut, ScoreFunction, Simple
from distset.perturb_and_map import PerturbAndMap
from distset.sets import InMemory
from distset.solve import Blackbox, Identity
from distset.tasks.subset_knn import Labelled, SubsetKNN, SubsetKNNTask, nearest_labels
from distset.tasks.subset_vae import SubsetVAE, SubsetVAETask, categorical_divergence, divergence
from distset.train import Example


def batch(count: int, n: int, classes: int = 2) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(InMemory(torch.rand(n, 1, generator=generator), name=str(i)), torch.tensor(i % classes))
        for i in range(count)
    ]


def within_error(task, examples, wanted, runs: int = 100, bound: float = 5.0) -> None:
    parameters = list(task.model.parameters())
    found = [torch.autograd.grad(task.batch_loss(examples, seed=seed), parameters) for seed in range(runs)]
    for want, got in zip(wanted, zip(*found)):
        draws = torch.stack(got)
        assert ((draws.mean(0) - want).abs() / (draws.std(0) / runs**0.5 + 1e-9)).max() < bound


@pytest.fixture
def vae() -> SubsetVAE:
    torch.manual_seed(0)
    return SubsetVAE(4, d=2, n=3, k=2, hidden=(6,)).double()


def exact_bound(model: SubsetVAE, images: Tensor) -> Tensor:
    """The negative bound ``(B,)`` by going through all latents."""
    z, logits = subsets(3, 2), model.posterior(images).logits
    log_q = (logits @ z.T).log_softmax(-1)  # (B, d, 3)
    pairs = list(itertools.product(range(3), repeat=2))
    total = torch.zeros(len(images), dtype=torch.float64)
    for a, b in pairs:
        q = (log_q[:, 0, a] + log_q[:, 1, b]).exp()
        painted = torch.sigmoid(model.decode(torch.stack([z[a], z[b]])))
        surprise = -(images * painted.log() + (1 - images) * (1 - painted).log()).sum(-1)
        total = total + q * (surprise + q.log() - math.log(1 / 9))
    return total


@pytest.mark.parametrize("grad", [None, ScoreFunction(LeaveOneOut())], ids=repr)
def test_the_bound_and_its_gradient_are_the_enumerated_ones(vae, grad) -> None:
    task, examples = SubsetVAETask(vae, grad, num_samples=6, width=2, measured=20_000), batch(3, 4)
    images = torch.stack([example.set.elements.squeeze(-1) for example in examples]).double()
    truth = exact_bound(vae, images)
    with torch.no_grad():
        measured = torch.stack([task.predict(example.set) for example in examples])
    torch.testing.assert_close(measured[:, 0], truth.detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(measured[:, 0] - measured[:, 1], divergence(vae.posterior(images)).detach())
    within_error(task, examples, torch.autograd.grad(truth.mean(), list(vae.parameters())))


def test_divergences(vae) -> None:
    """Exact: log of the number of subsets less the entropy. Published: another one, of categoricals."""
    images = torch.rand(5, 4).double()
    latent = vae.posterior(images)
    log_q = (latent.logits @ subsets(3, 2).T).log_softmax(-1)
    torch.testing.assert_close(divergence(latent), (log_q.exp() * (log_q + math.log(3))).sum((-1, -2)))
    p = latent.logits.softmax(-1)
    torch.testing.assert_close(categorical_divergence(latent.logits), (p * (p * 3).log()).sum((-1, -2)))


@pytest.mark.parametrize("k", [0, 3])
def test_latents_without_a_choice_are_deterministic(k: int) -> None:
    task = SubsetVAETask(SubsetVAE(4, d=2, n=3, k=k, hidden=(6,)), num_samples=6, width=2)
    loss = task.batch_loss(batch(3, 4), seed=0)
    torch.testing.assert_close(loss, task.batch_loss(batch(3, 4), seed=1))
    loss.backward()
    assert all((p.grad == 0).all() for p in task.model.encoder.parameters())
    assert any((p.grad != 0).any() for p in task.model.decoder.parameters())


@pytest.mark.parametrize("k", [-1, 4])
def test_latents_of_more_than_there_is(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: got {k}, wanted 0 <= k <= n = 3"):
        SubsetVAE(4, n=3, k=k)


def test_the_neighbours_loss_and_its_gradient() -> None:
    """Six candidates, all subsets of two of them; SIMPLE is unbiased since the loss is linear."""
    torch.manual_seed(0)
    examples = batch(12, 4, classes=3)
    images = torch.stack([example.set.elements.squeeze(-1) for example in examples]).double()
    labels = torch.stack([example.target for example in examples])
    for grad in (None, Simple()):
        task = SubsetKNNTask(SubsetKNN(4, dim=2, hidden=(5,)).double(), 2, grad, num_samples=8, at_once=12)
        embedded = task.model(images)
        logits = -(embedded[:6, None] - embedded[None, 6:]).square().sum(-1).sqrt()
        z = subsets(6, 2)
        q = (logits @ z.T).softmax(-1)
        share = (z[None] * (labels[:6, None, None] == labels[None, None, 6:])).sum(-1) / 2
        truth = -(q * share).sum(-1).mean()
        within_error(task, examples, torch.autograd.grad(truth, list(task.model.parameters())), runs=60)


def test_neighbours_are_found_among_the_others() -> None:
    points, labels = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([0, 0, 1, 1])
    assert nearest_labels(torch.tensor([[0.2], [9.0]]), points, labels, 3).tolist() == [[0, 0, 1], [1, 1, 0]]
    task = SubsetKNNTask(SubsetKNN(1), 3)
    targets = [Labelled(labels, False), Labelled(torch.tensor([0, 0]), True)]
    assert task.metrics([points, torch.tensor([[0.2], [9.0]])], targets) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="references: got 4 images"):
        nearest_labels(points, points, labels, 5)
    with pytest.raises(ValueError, match="targets: wanted images to find"):
        task.metrics([points], targets[:1])


def test_too_few_candidates() -> None:
    with pytest.raises(ValueError, match="k: got 10, wanted 1 to 4"):
        SubsetKNNTask(SubsetKNN(4), 10, at_once=8)
    with pytest.raises(ValueError, match=r"plan.batch: a group has 8 images"):
        SubsetKNNTask(SubsetKNN(4), 5).batch_loss(batch(8, 4), seed=0)


@pytest.mark.parametrize("strategy", [Identity("none"), Identity("mean"), Blackbox(5.0)], ids=repr)
def test_perturb_and_map_passes_the_strategy_on(strategy) -> None:
    """f is linear: with the negative identity its slope comes back, projected; with Blackbox a difference of solutions."""
    from distset.expect import expect
    from distset.subsets import KSubset

    cost = torch.randn(6, dtype=torch.float64)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    expect(lambda z: z @ cost, KSubset(logits, 3), 20, grad=PerturbAndMap(strategy), seed=0).backward()
    if isinstance(strategy, Identity):
        torch.testing.assert_close(logits.grad, cost - cost.mean() if strategy.projection == "mean" else cost)
    else:
        assert logits.grad is not None
        assert logits.grad.abs().sum() > 0
        torch.testing.assert_close(logits.grad.sum(), torch.zeros((), dtype=torch.float64))
