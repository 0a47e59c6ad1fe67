"""Feature selection learns which pixels to keep."""

import pytest
import torch
from torch import Tensor

from distset.expect import LeaveOneOut, NoBaseline, ScoreFunction, Simple
from distset.subsets import KSubset
from distset.tasks.feature_selection import FeatureSelection, select_features


def images() -> Tensor:
    """Eight pixels: four of them independent, and a copy of each at lower contrast."""
    bits = torch.randint(0, 2, (400, 4), generator=torch.Generator().manual_seed(0)).float()
    return torch.cat([bits, 0.5 + 0.02 * (bits - 0.5)], -1)


@pytest.mark.parametrize("grad", [None, ScoreFunction(LeaveOneOut()), Simple()], ids=repr)
def test_the_informative_pixels_are_found(grad) -> None:
    torch.manual_seed(0)
    model = FeatureSelection(8, 4, hidden=32, num_samples=16, grad=grad)
    losses = [step.loss for step in select_features(model, images(), steps=250, batch=64, rate=2e-2)]
    assert sum(losses[-20:]) / 20 < 0.6 * losses[0]
    assert model.subset.mode[:4].sum() == 4
    assert model.evaluate(images()) < losses[-1] + 0.05


def test_steps_repeat() -> None:
    def run() -> list[float]:
        torch.manual_seed(0)
        model = FeatureSelection(8, 2, hidden=8, num_samples=4, grad=ScoreFunction(NoBaseline()), seed=3)
        return [step.loss for step in select_features(model, images(), steps=5)]

    assert run() == run()


def test_bad_images() -> None:
    model = FeatureSelection(8, 2, hidden=8)
    assert isinstance(model.subset, KSubset)
    for bad in (torch.zeros(3, 7), torch.full((3, 8), 2.0)):
        with pytest.raises(ValueError, match="images: got shape"):
            next(select_features(model, bad, steps=1))
