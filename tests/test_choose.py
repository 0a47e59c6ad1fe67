"""Subsets from the mean field, by every rule, and their figures."""

import itertools

import pytest
import torch
from torch import nn

from distset.choose import by_greedy, by_size, by_threshold, overlap
from distset.set_functions import SumUtility, UserUtility

LOGITS = torch.tensor([[2.0, -1.0, 0.5, -3.0], [-2.0, -2.0, 4.0, 1.0]])
MASK = torch.tensor([[True] * 4, [True, True, False, True]])


def test_threshold_and_sizes():
    assert by_threshold(LOGITS).chosen.tolist() == [[True, False, True, False], [False, False, True, True]]
    assert by_threshold(LOGITS, 0.8, MASK).chosen.tolist() == [[True, False, False, False], [False] * 4]
    known = by_size(LOGITS, torch.tensor([3, 1]), MASK)
    assert known.chosen.tolist() == [[True, True, True, False], [False, False, False, True]]
    assert known.rule == "top psi, size known"
    assert by_size(LOGITS).chosen.sum(-1).tolist() == torch.sigmoid(LOGITS).sum(-1).round().long().tolist()
    assert by_size(torch.zeros(1, 3), 2).chosen.tolist() == [[True, True, False]]
    assert "predicted" in by_size(LOGITS).rule


def test_an_expected_size_beyond_half_precision():
    logits = torch.full((200_000,), 1.0, dtype=torch.float16)
    assert int(by_size(logits).chosen.sum()) == pytest.approx(200_000 * torch.sigmoid(torch.ones(())).item(), rel=1e-3)


def test_padding_stays_behind_what_is_as_unlikely_as_can_be():
    logits, mask = torch.tensor([9.0, -torch.inf, 1.0]), torch.tensor([False, True, True])
    assert by_size(logits, 2, mask).chosen.tolist() == [False, True, True]
    assert by_size(logits, 1, mask).chosen.tolist() == [False, False, True]


def test_greedy_ascends_and_finds_the_best_of_a_modular_utility():
    weights = torch.tensor([[1.0, -2.0, 3.0, 0.5], [-1.0, -1.0, -1.0, 2.0]])
    utility = UserUtility(lambda elements, subsets, mask=None: (subsets * elements[..., 0].unsqueeze(-2)).sum(-1))
    assert by_greedy(utility, weights.unsqueeze(-1)).chosen.tolist() == (weights > 0).tolist()
    two = by_greedy(utility, weights.unsqueeze(-1), 2)
    assert two.chosen.sum(-1).tolist() == [2, 2]
    assert two.chosen[1, 3]
    assert two.rule == "greedy ascent of F, size known"
    assert not by_greedy(utility, weights.unsqueeze(-1), mask=MASK.flip(0)).chosen[0, 2]


def test_greedy_never_lowers_the_utility():
    torch.manual_seed(0)
    utility = SumUtility(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))).double()
    elements = torch.randn(4, 6, 3, dtype=torch.float64)
    chosen = by_greedy(utility, elements).chosen
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64).expand(4, -1, -1)
    found = utility(elements, chosen.unsqueeze(-2).double()).squeeze(-1)
    assert (found >= utility(elements, torch.zeros(4, 1, 6).double()).squeeze(-1)).all()
    assert (found <= utility(elements, every).amax(-1) + 1e-12).all()


def test_overlap_figures():
    chosen = torch.tensor([[True, True, False, False], [False, False, False, False]])
    truth = torch.tensor([[True, False, True, True], [True, False, False, False]])
    found = overlap(chosen, truth)
    assert found["jaccard"].tolist() == [0.25, 0.0]
    assert found["precision"].tolist() == [0.5, 0.0]
    torch.testing.assert_close(found["recall"], torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(found["f1"], torch.tensor([0.4, 0.0]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"threshold: got 1\.5"):
        by_threshold(LOGITS, 1.5)
    with pytest.raises(ValueError, match="size: got 5 to 5"):
        by_size(LOGITS, 5)
    with pytest.raises(ValueError, match="size: got 4 to 4"):
        by_size(LOGITS, 4, MASK)
    missing = LOGITS.masked_fill(~MASK, torch.nan)
    assert by_size(missing, 2, MASK).chosen.tolist() == by_size(LOGITS, 2, MASK).chosen.tolist()
    for rule in (by_size, by_threshold):
        with pytest.raises(ValueError, match="logits: 1 of 8 are NaN"):
            rule(missing)


@pytest.mark.parametrize(("elements", "size", "message"), [
    (torch.full((3, 1), torch.nan), None, "elements: 3 of 3 have features that are NaN"),
    (torch.zeros(3, 1), None, "utility: UserUtility has gains that are NaN with 0 elements chosen"),
    (torch.ones(3, 1), -1, "size: got -1 to -1, wanted 0 to the elements"),
    (torch.ones(3, 1), 99, "size: got 99 to 99"),
])  # fmt: skip
def test_what_greedy_cannot_climb_is_named(elements, size, message):
    utility = UserUtility(lambda elements, subsets: (subsets / elements[..., 0] * elements[..., 0]).sum(-1))
    with pytest.raises(ValueError, match=message):
        by_greedy(utility, elements, size)
