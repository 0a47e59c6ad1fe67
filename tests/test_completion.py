"""Image completion: the likelihood against torch's, contexts, gradients of every mode, memory, pictures."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from idx_files import write_idx
from torch import nn

from distset import UMBC, Exact, Full, InMemory, Sampled, Subset
from distset.encoders import ACTIVATIONS
from distset.problems.completion import grey_images
from distset.tasks import completion_models as models
from distset.tasks.completion import Images, completion_task, gaussian_nll, pixel_places
from distset.tasks.set_models import Waves

CONSISTENT = [models.deepsets, models.sse, models.umbc_set_transformer, models.umbc_fspool, models.umbc_diffem]


@pytest.fixture
def parts(tmp_path):
    write_idx(tmp_path)
    return grey_images(str(tmp_path), images=(6, 2, 3), side=8, contexts=(10, 30), chunk_size=8)


def small_task(maker=models.umbc_set_transformer, grad=None, **settings):
    given = {"width": 8, "context": (20, 30), "chunk_size": 8, "targets": 16, **settings}
    return completion_task([8, 8, 1], model=functools.partial(maker, depth=2), grad=grad, **given)


def test_likelihood_is_that_of_torch():
    output, values = torch.randn(3, 10, 4).double(), torch.randn(3, 10, 2).double()
    output[..., 2:] = output[..., 2:].exp()
    want = -torch.distributions.Normal(output[..., :2], output[..., 2:]).log_prob(values).sum(-1)
    torch.testing.assert_close(gaussian_nll(output, values), want)


def test_images_become_pixels_with_places(parts):
    elements = parts.train[2].set.elements
    assert elements.shape == (64, 3)
    torch.testing.assert_close(elements[:, :2], pixel_places(8, 8))
    assert pixel_places(3, 2).tolist()[:3] == [[-1, -1], [-1, 1], [0, -1]]
    image = elements[:, 2].view(8, 8)
    assert float(image[0].abs().sum() + image[:, -1].abs().sum()) == 0  # the border
    assert {e.target.context for e in parts.test} == {10, 30}
    given = parts.test[1]
    assert given.set.elements.shape == (3, 30, 3)
    for image, context in zip(given.target.values, given.set.elements):
        place = ((context[:, :2] + 1) * 3.5).round().long()
        torch.testing.assert_close(image.view(8, 8)[place[:, 0], place[:, 1]], context[:, 2])
        assert len(place.unique(dim=0)) == 30


def test_the_decoder_is_a_network_of_code_and_place():
    task = small_task()
    model, code, places = task.model, torch.randn(3, 8), pixel_places(8, 8)
    joined = nn.Linear(10, 8)
    with torch.no_grad():
        norm, linear = model.from_code
        joined.weight.copy_(torch.cat([linear.weight, model.from_place[1].weight], 1))
        joined.bias.copy_(linear.bias)
        got = model.from_code(code).unsqueeze(-2) + model.from_place(places)
        each = torch.cat([norm(code).unsqueeze(1).expand(-1, 64, -1), places.expand(3, -1, -1)], -1)
        torch.testing.assert_close(got, joined(each))


def test_waves_are_those_of_the_place_alone():
    x = torch.tensor([[0.5, -1.0, 0.75]])
    got = Waves(2)(x)[0].tolist()
    angles = np.array([0.25, 0.5, -0.5, -1.0]) * np.pi
    assert got == pytest.approx([0.5, -1.0, 0.5, *np.sin(angles), *np.cos(angles)], abs=1e-6)
    assert Waves(0)(x) is x
    small_task(frequencies=3).predict(InMemory(torch.rand(2, 9, 3), 4))


WITH_SLOTS = [models.sse, models.umbc_set_transformer, models.umbc_fspool, models.umbc_diffem]
ACTIVATED = [functools.partial(maker, slots=4, activation=name) for maker in WITH_SLOTS for name in ACTIVATIONS]


@pytest.mark.parametrize("maker", ACTIVATED, ids=lambda maker: f"{maker.func.__name__}-{maker.keywords['activation']}")
def test_every_model_with_slots_takes_every_activation(maker, parts):
    task = small_task(maker)
    pools = [module for module in task.model.encoder.modules() if isinstance(module, UMBC)]
    assert [pool.activation for pool in pools] == [maker.keywords["activation"]]
    check_exact(task, parts)


@pytest.mark.parametrize("maker", CONSISTENT)
def test_exact_gradient_through_the_task_is_full_autograd(maker, parts):
    check_exact(small_task(maker), parts)


def check_exact(task, parts):
    task.model.double()
    examples = [parts.train[i] for i in range(3)]

    def gradient(grad, seed=5):
        task.model.grad = grad
        task.model.zero_grad()
        task.batch_loss(examples, seed=seed).backward()
        return torch.cat([p.grad.flatten() for p in task.model.parameters() if p.grad is not None])

    full = gradient(Full())
    torch.testing.assert_close(gradient(Exact()), full, rtol=1e-9, atol=1e-11)
    assert (gradient(Subset(1)) - full).norm() > 1e-3 * full.norm()


def test_values_do_not_depend_on_the_gradient_and_repeat(parts):
    task = small_task()
    examples = [parts.train[i] for i in range(3)]
    losses = []
    for grad in (Full(), Exact(), Sampled(1), Sampled(1)):
        task.model.grad = grad
        losses.append(float(task.batch_loss(examples, seed=5).detach()))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert float(task.batch_loss(examples, seed=6).detach()) != losses[0]  # another context


def test_saved_memory_is_flat_in_the_context_for_sampled_chunks(parts):
    saved = {}
    for size in (8, 56):
        for name, grad in {"sampled": Sampled(1), "full": Full()}.items():
            task = small_task(grad=grad, context=(size, size))
            saved[name, size] = _saved_bytes(lambda task=task: task.batch_loss([parts.train[0]], seed=0).backward())
    assert saved["sampled", 56] == saved["sampled", 8]
    assert saved["full", 56] > 1.5 * saved["full", 8]


def _saved_bytes(step):
    """Bytes that autograd keeps, forward and in replays."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return total


def test_metrics_are_means_by_context():
    task = small_task()
    values = torch.rand(2, 64, 1)
    output = torch.cat([values, torch.full_like(values, 0.2)], -1)
    shifted = output + torch.tensor([0.2, 0.0])
    figures = task.metrics([output, shifted], [Images(values, 10), Images(values, 30)])
    base = float(np.log(0.2) + 0.5 * np.log(2 * np.pi))
    assert figures["context/10"] == pytest.approx(base, abs=1e-5)
    assert figures["context/30"] == pytest.approx(base + 0.5, abs=1e-5)
    assert figures["loss"] == pytest.approx(base + 0.25, abs=1e-5)
    assert figures["rmse"] == pytest.approx(np.sqrt(0.02), abs=1e-5)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"context: got \[0, 5\], wanted from and to, of the 64 pixels"):
        small_task(context=[0, 5])
    with pytest.raises(ValueError, match="targets: got 65, wanted 1 to 64"):
        small_task(targets=65)
    write_idx(tmp_path)
    with pytest.raises(ValueError, match=r"images: got \[12, 1, 1\], wanted at most 12 to train"):
        grey_images(str(tmp_path), images=(12, 1, 1))
    with pytest.raises(ValueError, match="side: got 5, wanted at least the 6"):
        grey_images(str(tmp_path), images=(6, 1, 1), side=5)


def test_completed_images_are_drawn(parts, tmp_path):
    small_task().draw(tmp_path / "plots", parts)
    assert (tmp_path / "plots" / "completions.png").stat().st_size > 1000
    small_task().draw(tmp_path / "none", parts._replace(test=[]))
    assert not (tmp_path / "none").exists()
