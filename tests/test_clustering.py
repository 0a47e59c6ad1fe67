"""Amortized clustering: the likelihood against scipy, the generator, gradients of every mode, consistency, pictures."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import kstest, multivariate_normal
from sklearn.metrics import rand_score

from benchmarks.partitions import ALONE, variances
from distset import Exact, Full, InMemory, Sampled, Subset, encode_set
from distset.data.synthetic_mixtures import MixtureSets
from distset.problems.mixtures import mixtures
from distset.tasks import clustering_models as models
from distset.tasks.clustering import clustering_task, negative_log_likelihood, rand_index, to_mixture
from distset.tasks.set_models import LinearFeatures
from distset.tasks.streams import STREAMS, encodings, stream
from distset.testing import check_encoder
from distset.train import Example, predict_all

CONSISTENT = {
    "deepsets": models.deepsets,
    "sse": models.sse,
    "hierarchical_sse": models.hierarchical_sse,
    "umbc_set_transformer": models.umbc_set_transformer,
    "umbc_fspool": models.umbc_fspool,
    "umbc_diffem": models.umbc_diffem,
}
ACTIVATIONS = ("softmax", "sigmoid", "slot-sigmoid", "slot-softmax", "slot-exp")


def small_task(maker, grad=None, width=16):
    return clustering_task(2, 4, model=functools.partial(maker, width=width), grad=grad)


def test_likelihood_is_that_of_scipy():
    raw = torch.randn(3, 4, 5, dtype=torch.float64)
    points = 3 * torch.randn(3, 20, 2, dtype=torch.float64)
    mixture = to_mixture(raw)
    for b in range(3):
        joint = [
            np.log(float(w)) + multivariate_normal(m.numpy(), np.diag(v.numpy())).logpdf(points[b].numpy())
            for w, m, v in zip(*(part[b] for part in mixture))
        ]
        want = -logsumexp(joint, axis=0).mean()
        assert float(negative_log_likelihood(mixture, points)[b]) == pytest.approx(want, rel=1e-12)


def test_density_of_drawn_mixtures_is_that_of_scipy():
    drawn = MixtureSets(3, size=30, seed=5).draw(2)
    joint = [
        np.log(w) + multivariate_normal(m, np.diag(s**2)).logpdf(drawn.points)
        for w, m, s in zip(drawn.weights, drawn.means, drawn.scales)
    ]
    np.testing.assert_allclose(drawn.log_density(), logsumexp(joint, axis=0), rtol=1e-4)


def test_drawn_sets_have_the_distribution_stated():
    sets = MixtureSets(400, size=200, scale=(0.1, 0.6), seed=1)
    drawn = [sets.draw(i) for i in range(400)]
    means, scales = np.stack([d.means for d in drawn]), np.stack([d.scales for d in drawn])
    assert kstest(means.ravel(), "uniform", (-4, 8)).pvalue > 1e-3
    assert kstest(scales.ravel(), "uniform", (0.1, 0.5)).pvalue > 1e-3
    assert kstest(np.stack([d.weights for d in drawn])[:, 0], "beta", (1, 3)).pvalue > 1e-3  # a Dirichlet's marginal
    z = np.concatenate([(d.points - d.means[d.labels]) / d.scales[d.labels] for d in drawn[:40]])
    assert kstest(z.ravel(), "norm").pvalue > 1e-3
    shares = np.array([np.mean(d.labels == 0) - d.weights[0] for d in drawn])
    assert abs(shares.mean()) < 4 * shares.std() / 20
    np.testing.assert_array_equal(sets.draw(7).points, MixtureSets(9, size=200, seed=1).draw(7).points)


def test_rand_index_is_that_of_sklearn():
    found, true = torch.randint(4, (2, 50)), torch.randint(4, (2, 50))
    want = [rand_score(t.numpy(), f.numpy()) for f, t in zip(found, true)]
    assert rand_index(found, true, 4).tolist() == pytest.approx(want, abs=1e-12)


def test_one_point_has_no_rand_index():
    with pytest.raises(ValueError, match="found: got 1 elements, wanted at least 2"):
        rand_index(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="size: got 1, wanted at least 2 points"):
        mixtures((2, 2, 2), size=1)


@pytest.mark.parametrize("name", CONSISTENT)
def test_encoders_are_consistent_with_right_gradients(name):
    encoder, _ = CONSISTENT[name](2, 3, width=8)
    check_encoder(encoder.eval(), torch.randn(2, 12, 2), max_sampled=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sweeps_that_fold_the_last_layer_give_the_state_with_a_graph(activation, bias):
    encoder, _ = models.umbc_set_transformer(2, 4, width=16, activation=activation)
    assert isinstance(encoder, LinearFeatures)
    if not bias:
        encoder.extractor[-1].bias = None
    encoder = encoder.double()
    set = InMemory(torch.randn(3, 40, 2, dtype=torch.float64))
    query = encoder.query(set.batch_shape, torch.Generator(), None)
    with torch.no_grad():
        swept = encoder(set.chunk(0), query)
    graphed = encoder(set.chunk(0), query)
    for got, want in zip(swept.summands(graphed), graphed.summands(graphed)):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["umbc_set_transformer", "deepsets"])
def test_gradients_of_the_loss_in_every_mode(name):
    """Through the task: Exact is full autograd, the mean of Sampled over all chunks too, Subset is neither."""
    task = small_task(CONSISTENT[name], width=8)
    task.model.double()
    points = torch.randn(2, 24, 2, dtype=torch.float64)
    examples = [Example(InMemory(x, 6), None) for x in points]

    def gradient(grad, seed=0):
        task.model.grad = grad
        task.model.zero_grad()
        task.batch_loss(examples, seed=seed).backward()
        return torch.cat([p.grad.flatten() for p in task.model.parameters()])

    full = gradient(Full())
    torch.testing.assert_close(gradient(Exact()), full, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(_mean_over_chunks(gradient, Sampled(1)), full, rtol=1e-8, atol=1e-10)
    assert (_mean_over_chunks(gradient, Subset(1)) - full).norm() > 5e-4 * full.norm()


def _mean_over_chunks(gradient, grad):
    """Over 4 chunks, each found by trying seeds: the gradients of one chunk have the same bits."""
    by_chunk = {}
    for seed in range(60):
        drawn = gradient(grad, seed)
        by_chunk[round(float(drawn.sum()), 9)] = drawn
    assert len(by_chunk) == 4
    return torch.stack([*by_chunk.values()]).mean(0)


def test_a_batch_is_the_mean_of_its_sets():
    task = small_task(models.umbc_set_transformer, Exact())
    parts = mixtures((6, 2, 2), size=32)
    examples = [parts.train[i] for i in range(4)]
    together = float(task.batch_loss(examples, seed=3).detach())
    assert together == pytest.approx(np.mean([float(task.loss(e, seed=3).detach()) for e in examples]), rel=1e-5)
    with pytest.raises(ValueError, match="examples: got sets of other sizes"):
        task.batch_loss([examples[0], Example(InMemory(torch.randn(5, 2)), None)], seed=0)


@pytest.mark.parametrize("name", CONSISTENT)
def test_likelihoods_of_bfloat16_networks_are_in_float32(name):
    task = small_task(CONSISTENT[name])
    parts = mixtures((1, 2, 1), size=32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss(parts.train[0], seed=0)
    assert loss.dtype == torch.float32
    with torch.no_grad():
        near = negative_log_likelihood(to_mixture(task.predict(parts.train[0].set)), parts.train[0].set.elements)
    assert float(loss.detach()) == pytest.approx(float(near), rel=0.05)
    figures = task.metrics(*predict_all(task, parts.val, precision="bfloat16"))
    assert figures["loss"] == pytest.approx(task.metrics(*predict_all(task, parts.val))["loss"], rel=0.05)


def test_variance_over_partitions():
    """Figure 3: none for compositions with UMBC, even with blocks that are not consistent themselves; else some."""
    found = variances(points=60, partitions=20)
    consistent = {name for name, variance in found.items() if variance < 1e-24}
    assert consistent == set(found) - set(ALONE)
    assert min(found[name] for name in ALONE) > 1e-9


@pytest.mark.parametrize("name", STREAMS)
def test_streams_bring_every_point_once_and_end_with_the_encoding(name):
    pieces = stream(name, torch.randint(3, (40,)), chunks=7)
    assert sorted(torch.cat(pieces).tolist()) == list(range(40))
    encoder, _ = models.umbc_set_transformer(2, 4, width=16)
    points = torch.randn(40, 2)
    *_, last = encodings(encoder.eval(), points, pieces)
    with torch.no_grad():
        torch.testing.assert_close(last, encode_set(encoder, InMemory(points)), rtol=1e-4, atol=1e-5)


def test_pieces_of_streams_are_what_the_settings_say():
    labels = torch.randint(3, (40,))
    sizes = labels.bincount()
    pieces = {name: stream(name, labels, chunks=7) for name in STREAMS}
    assert [len(p) for p in pieces["single point"]] == [1] * 40
    assert [labels[p].unique().tolist() for p in pieces["class"]] == [[0], [1], [2]]
    assert [len(p) for p in pieces["chunk"]] == [6, 6, 6, 6, 6, 5, 5]
    assert all(len(labels[p].unique()) > 1 for p in pieces["chunk"])
    assert [sorted(labels[p].tolist()) for p in pieces["one each"]] == [
        (sizes > i).nonzero().flatten().tolist() for i in range(int(sizes.max()))
    ]
    for name in ("single point", "chunk"):
        order = torch.cat(pieces[name])
        assert not torch.equal(order, order.sort().values)
        assert not torch.equal(order, torch.cat(stream(name, labels, chunks=7, seed=1)))


def test_unknown_streams_and_sizes_are_refused():
    with pytest.raises(ValueError, match="name: got 'x', wanted one of 'single point'"):
        stream("x", torch.zeros(3))
    with pytest.raises(ValueError, match="scale, spread: got"):
        MixtureSets(3, scale=(0.5, 0.1))


def test_pictures_are_drawn(tmp_path):
    parts = mixtures((2, 2, 9), size=48)
    small_task(models.umbc_set_transformer).draw(tmp_path, parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clusterings.png", "streams.png", "streams_nll.png"]
