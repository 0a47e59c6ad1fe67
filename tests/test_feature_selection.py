"""Feature selection learns which pixels to keep, by the true gradient."""

import pytest
import torch
from small_subsets import subsets
from torch import Tensor

from distset.expect import LeaveOneOut, ScoreFunction, Simple
from distset.optim import Optimisation
from distset.problems.pixels import ImageExamples
from distset.sets import InMemory
from distset.tasks.feature_selection import FeatureSelection, FeatureSelectionTask
from distset.train import BatchTask, Example, Plan, fit


def images() -> Tensor:
    """Eight pixels: four of them independent, and a copy of each at lower contrast; bytes ``(400, 2, 4)``."""
    bits = torch.randint(0, 2, (400, 4), generator=torch.Generator().manual_seed(0))
    return torch.stack([255 * bits, 125 + 5 * bits], 1).to(torch.uint8)


@pytest.mark.parametrize("grad", [None, ScoreFunction(LeaveOneOut()), Simple()], ids=repr)
def test_the_informative_pixels_are_found(grad) -> None:
    torch.manual_seed(0)
    task = FeatureSelectionTask(FeatureSelection(8, 4, hidden=32), grad, num_samples=16, width=4)
    assert isinstance(task, BatchTask)
    examples = ImageExamples(images(), torch.zeros(400))
    optimisation = Optimisation(torch.optim.Adam, lr=4e-2, weight_decay=0.0, warmup=0.0, schedule="constant", clip=None)
    fitted = fit(task, examples, plan=Plan(epochs=None, max_steps=160, batch=64, log_every=10), optimisation=optimisation)
    losses = [record["train/loss"] for record in fitted.history]
    assert losses[-1] < 0.65 * losses[0]
    assert task.model.subset.mode[:4].sum() == 4
    with torch.no_grad():
        outputs = [task.predict(example.set) for example in examples]
        assert task.metrics(outputs, [0] * 400)["loss"] < losses[-1] + 0.05


@pytest.mark.parametrize("grad", [None, ScoreFunction(LeaveOneOut())], ids=repr)
def test_the_gradient_is_that_of_the_enumerated_loss(grad) -> None:
    torch.manual_seed(0)
    model = FeatureSelection(6, 3, hidden=5).double()
    task = FeatureSelectionTask(model, grad, num_samples=6)
    batch = [Example(InMemory(torch.rand(6, 1), name=str(i)), 0) for i in range(4)]
    pixels = torch.stack([example.set.elements.squeeze(-1) for example in batch]).double()
    masks = subsets(6, 3)
    weights = (masks @ model.logits).softmax(0)
    truth = (weights * task.cross_entropy(pixels, masks).mean(-1)).sum()
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(truth, parameters)
    runs = 120
    found = [torch.autograd.grad(task.batch_loss(batch, seed=seed), parameters) for seed in range(runs)]
    for name, want, got in zip(dict(model.named_parameters()), wanted, zip(*found)):
        draws = torch.stack(got)
        error = (draws.mean(0) - want).abs() / (draws.std(0) / runs**0.5 + 1e-12)
        assert error.max() < 5, name


def test_groups_and_single_images_measure_the_same() -> None:
    torch.manual_seed(0)
    task = FeatureSelectionTask(FeatureSelection(8, 2, hidden=8), width=4)
    examples = ImageExamples(images(), torch.zeros(400))
    group = InMemory(torch.stack([example.set.elements for example in examples[:7]]))
    single = torch.stack([task.predict(example.set) for example in examples[:7]])
    torch.testing.assert_close(task.predict(group), single)


@pytest.mark.parametrize("k", [-1, 9])
def test_more_pixels_than_there_are(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: got {k}, wanted 0 <= k <= n = 8"):
        FeatureSelection(8, k)
