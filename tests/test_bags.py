"""The bag classifier: losses against torch's own, metrics against scikit-learn's, backbones, configuration to objects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distset import InMemory, encode_set
from distset.build import build
from distset.tasks import backbones, bag_models
from distset.tasks.bags import BagTask, bag_task
from distset.train import Example, Plan, fit

sklearn = pytest.importorskip("sklearn.metrics")
BAG = InMemory(torch.arange(24.0).view(6, 4).sin(), 4)


def test_one_logit_for_two_classes_is_the_sigmoid():
    encoder, head = bag_models.deepsets(4, 1)
    task = BagTask.of(encoder, head, classes=["no", "yes"])
    logit = head(encode_set(encoder, BAG))
    for target in (0, 1):
        want = F.binary_cross_entropy_with_logits(logit, torch.tensor([float(target)]))
        torch.testing.assert_close(task.loss(Example(BAG, target), seed=0), want)
    torch.testing.assert_close(task.predict(BAG)[1], torch.sigmoid(logit)[0])


def test_many_classes_and_their_weights():
    encoder, head = bag_models.umbc(4, 3, slots=2, width=8, heads=2)
    task = BagTask.of(encoder, head, classes=["a", "b", "c"])
    logits = head(encode_set(encoder, BAG))
    want = F.cross_entropy(logits.unsqueeze(0), torch.tensor([2]))
    torch.testing.assert_close(task.loss(Example(BAG, 2), seed=0), want)
    weighted = BagTask(task.model, task.classes, [1.0, 1.0, 2.5])
    torch.testing.assert_close(weighted.loss(Example(BAG, 2), seed=0), 2.5 * want)
    assert task.predict(BAG).sum().item() == pytest.approx(1.0)


def test_two_streams_are_trained_and_the_first_predicts():
    encoder, head = bag_models.dsmil(4, 1)
    task = BagTask.of(encoder, head, classes=["no", "yes"])
    bag, instance = head(encode_set(encoder, BAG))
    one = torch.ones(1)
    want = (F.binary_cross_entropy_with_logits(bag, one) + F.binary_cross_entropy_with_logits(instance, one)) / 2
    torch.testing.assert_close(task.loss(Example(BAG, 1), seed=0), want)
    torch.testing.assert_close(task.predict(BAG)[1], torch.sigmoid(bag)[0])


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_are_those_of_scikit_learn(classes):
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(2 * torch.randn(40, classes, generator=generator), -1)
    y = torch.randint(classes, (40,), generator=generator).tolist()
    names = [f"class {i}" for i in range(classes)]
    task = BagTask.of(*bag_models.deepsets(4, 1 if classes == 2 else classes), classes=names)
    got = task.metrics(list(p), y)
    predicted = p.argmax(1).numpy()
    scores = p[:, 1].numpy() if classes == 2 else p.double().numpy() / p.double().sum(1, keepdim=True).numpy()
    average = "binary" if classes == 2 else "macro"
    want = {
        "loss": sklearn.log_loss(y, p.double().numpy() / p.double().sum(1, keepdim=True).numpy()),
        "auroc": sklearn.roc_auc_score(y, scores, multi_class="ovr"),
        "balanced_accuracy": sklearn.balanced_accuracy_score(y, predicted),
        "f1": sklearn.f1_score(y, predicted, average=average),
        "accuracy": sklearn.accuracy_score(y, predicted),
    }
    assert got == pytest.approx(want, abs=1e-6)


def test_a_class_that_is_absent_leaves_auroc_open_and_a_monitor_of_it_is_refused():
    task = BagTask.of(*bag_models.deepsets(4, 1), classes=["no", "yes"])
    assert math.isnan(task.metrics([torch.tensor([0.3, 0.7])] * 3, [1, 1, 1])["auroc"])
    train = [Example(BAG, i % 2) for i in range(4)]
    with pytest.raises(ValueError, match=r"auroc of the validation sets is nan; do they hold every class\?"):
        fit(task, train, train[:1], plan=Plan(epochs=1, monitor="auroc"))


@pytest.mark.parametrize(("classes", "weights"), [(["one"], None), (["a", "b"], [1.0]), (["a", "b"], [1.0, 0.0])])
def test_bad_classes_and_weights(classes, weights):
    with pytest.raises(ValueError, match=r"classes|class_weights"):
        BagTask(BagTask.of(*bag_models.deepsets(4, 1), classes=["a", "b"]).model, classes, weights)


def test_standardise_measures_mean_and_deviation_chunk_by_chunk():
    x = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.0]) + torch.tensor([0.0, -1e3, 7.0])
    module = backbones.Standardise(3)
    module.fit([InMemory(x[:20], 7), InMemory(x[20:], 4)])
    np.testing.assert_allclose(module.mean, x.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        module.std, [*x.std(0, correction=0)[:2], 1.0], rtol=1e-5
    )  # one that does not vary is centred


def test_images_go_through_a_cnn_inside_the_encoder():
    task = bag_task(
        model={"_target_": "distset.tasks.bag_models.dsmil", "width": 8},
        backbone={"_target_": "distset.tasks.backbones.cnn", "widths": [4, 4], "dim": 8},
        grad={"_target_": "distset.encode.Exact"},
        element_shape=(3, 9, 9),
        classes=["no", "yes"],
    )
    images = torch.randint(256, (7, 3, 9, 9), dtype=torch.uint8)
    whole, parts = (task.predict(InMemory(images, size, element_ndim=3)) for size in (None, 2))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)
    task.loss(Example(InMemory(images, 2, element_ndim=3), 1), seed=0).backward()
    first = next(module for module in task.model.modules() if isinstance(module, nn.Conv2d))
    assert first.weight.grad.abs().max() > 0


def test_dihedral_shows_each_image_one_of_its_eight_views():
    square = torch.arange(9.0).view(1, 1, 3, 3).expand(400, 1, 3, 3)
    turn = backbones.Dihedral()
    views = {tuple(view.flatten().tolist()) for view in turn(square)}
    want = {
        tuple(torch.rot90(flip, k, (0, 1)).flatten().tolist()) for flip in (square[0, 0], square[0, 0].T) for k in range(4)
    }
    assert views == want
    assert torch.equal(turn.eval()(square), square)


def test_initial_weights_follow_the_seed_and_leave_the_default_generator_alone():
    def make(seed: int) -> torch.Tensor:
        spec = {"_target_": "distset.tasks.bag_models.umbc", "slots": 2, "width": 8, "heads": 2}
        task = bag_task(model=spec, backbone=None, grad=None, element_shape=(4,), classes=["a", "b"], seed=seed)
        return task.model.encoder.mu.detach()

    state = torch.get_rng_state()
    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))
    assert torch.equal(state, torch.get_rng_state())


def test_a_frozen_network_stays_in_eval_mode_and_is_not_trained():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    spec = {"_target_": "distset.tasks.backbones.external", "module": network, "frozen": True}
    model = {"_target_": "distset.tasks.bag_models.abmil"}
    task = bag_task(model=model, backbone=spec, grad=None, element_shape=(3, 6, 6), classes=["a", "b"])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = InMemory(torch.randint(256, (5, 3, 6, 6), dtype=torch.uint8), 2, element_ndim=3, name="x")
    fit(task, [Example(images, 1)], plan=Plan(epochs=2))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"_target_": "distset.nothing.here"}, "x._target_: found nothing at 'distset.nothing.here'"),
        ({"_target_": "distset.__version__"}, "x._target_: distset.__version__ is not callable"),
        ({"_target_": "distset.encoders.UMBC", "dim": 3}, r"x: distset.encoders.UMBC lacks slots; add x.slots=..."),
        ({"_target_": "distset.encoders.UMBC", "dim": 3, "slot": 3}, "x.slot: .* did you mean 'slots'"),
        ({"a": [{"_target_": "distset.encode.Sampled", "k": 1}]}, r"x.a\[0\].k: .* it takes m, choice"),
    ],
)
def test_configuration_that_cannot_be_built(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec, "x")


def test_what_follows_from_the_data_is_not_configured():
    spec = {"_target_": "distset.tasks.bag_models.umbc", "dim": 4}
    with pytest.raises(ValueError, match=r"model\.dim: is not for the configuration, it follows from the data"):
        build(spec, "model", dim=4, outputs=1)


def test_partial_builds_a_factory():
    made = build({"_target_": "torch.optim.SGD", "_partial_": True, "momentum": 0.5})([torch.zeros(1)], lr=0.1)
    assert made.defaults["momentum"] == 0.5
