"""Rank losses against scikit-learn and their formulas; and that they train with the norm projected out, not without."""

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import nn

from distset.losses import average_precision_loss, recall_at, recall_at_loss, recall_loss
from distset.solve import Blackbox, Identity


def batch(queries=30, n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, n, dtype=torch.float64, generator=generator)
    relevant = torch.rand(queries, n, generator=generator) < 0.3
    relevant[0] = queries == 1  # of many queries the first has nothing relevant
    return scores, relevant


def with_some(scores, relevant):
    some = relevant.any(-1)
    return scores[some].numpy(), relevant[some].numpy()


def test_average_precision_is_scikit_learns():
    scores, relevant = batch()
    assert not relevant.any(-1).all()  # queries without anything relevant are among them
    wanted = [sklearn.metrics.average_precision_score(r, s) for s, r in zip(*with_some(scores, relevant))]
    torch.testing.assert_close(1 - average_precision_loss(scores, relevant), torch.tensor(np.mean(wanted)))


def test_recall_loss_counts_who_is_ranked_above():
    scores, relevant = batch()
    wanted = []
    for s, r in zip(*with_some(scores, relevant)):
        ahead = [((s > s[i]) & ~r).sum() for i in np.flatnonzero(r)]
        wanted.append(np.mean(np.log1p(np.log1p(ahead))))
    torch.testing.assert_close(recall_loss(scores, relevant), torch.tensor(np.mean(wanted)))


@pytest.mark.parametrize("k", [1, 3, 12])
def test_recall_at(k):
    scores, relevant = batch()
    wanted = np.mean([r[np.argsort(-s)[:k]].any() for s, r in zip(scores.numpy(), relevant.numpy())])
    assert recall_at(scores, relevant, k) == pytest.approx(wanted)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_recall_at_loss_is_the_share_of_queries_that_miss(k):
    scores, relevant = batch(queries=300)
    missed = [not r[np.argsort(-s)[:k]].any() for s, r in zip(*with_some(scores, relevant))]
    assert recall_at_loss(scores, relevant, k).item() == pytest.approx(np.mean(missed))
    some = relevant.any(-1)
    assert recall_at_loss(scores, relevant, k).item() == pytest.approx(1 - recall_at(scores[some], relevant[some], k).item())


def test_recall_at_loss_lifts_the_best_of_the_relevant_where_a_query_misses():
    scores, relevant = batch()
    scores.requires_grad_()
    (got,) = torch.autograd.grad(recall_at_loss(scores, relevant, 2, grad=Identity("none")), scores)
    best = scores.masked_fill(~relevant, -torch.inf).argmax(-1)
    ahead = (scores > scores.gather(-1, best[:, None])).sum(-1)
    missed = relevant.any(-1) & (ahead >= 2)
    assert (ahead[missed] > 2).any()  # by more than one place, too
    wanted = torch.zeros_like(scores)
    wanted[missed, best[missed]] = -1 / relevant.any(-1).sum().double()
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("strategy", [Identity(), Blackbox(100.0)], ids=str)
def test_descent_on_recall_at_loss_leaves_no_query_without_a_hit(strategy):
    scores, relevant = batch()
    scores.requires_grad_()
    values = []
    for _ in range(200):
        loss = recall_at_loss(scores, relevant, 2, grad=strategy)
        values.append(loss.item())
        (grad,) = torch.autograd.grad(loss, scores)
        scores = (scores - 3 * grad).detach().requires_grad_()
    assert values[0] > 0.3
    assert values[-1] == 0


@pytest.mark.parametrize("loss", [recall_loss, average_precision_loss])
def test_gradient_by_hand(loss):
    scores, relevant = batch(queries=1)
    scores.requires_grad_()
    (got,) = torch.autograd.grad(loss(scores, relevant, grad=Identity("none")), scores)
    s, r = scores[0].detach(), relevant[0]
    ranks = (s > s[:, None]).sum(1) + 1.0
    above = ((s > s[:, None]) & r).sum(1) + 1.0
    ahead = ranks - above
    slope = 1 / (1 + torch.log1p(ahead)) / (1 + ahead) if loss is recall_loss else above / ranks**2
    torch.testing.assert_close(got[0], torch.where(r, -slope / r.sum(), 0.0).double())


def recall_at_2_loss(scores, relevant, *, grad=None, margin=0.0):
    return recall_at_loss(scores, relevant, 2, grad=grad, margin=margin)


@pytest.mark.parametrize("loss", [recall_loss, average_precision_loss])
def test_a_perfect_ranking_costs_nothing_and_a_margin_asks_for_more(loss):
    relevant = torch.tensor([[True, True, False, False]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1]])
    assert loss(scores, relevant) == 0
    assert loss(scores, relevant, margin=0.05) == 0
    assert loss(scores, relevant, margin=0.15) > 0


@pytest.mark.parametrize("loss", [recall_loss, average_precision_loss, recall_at_2_loss])
def test_near_ties_that_rounding_breaks(loss):
    generator = torch.Generator().manual_seed(0)
    scores = 0.9 + 2e-7 * torch.randint(0, 4, (500, 20), generator=generator)
    relevant = torch.rand(500, 20, generator=generator) < 0.3
    scores.requires_grad_()
    value = loss(scores, relevant)
    value.backward()
    assert 0 < value < 2
    assert scores.grad.isfinite().all()


def train(strategy, steps, lr, unit):
    """Recall@1, every 200 steps, of a linear embedding of classes under strong nuisance, trained on the recall loss."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(8)
    centres = torch.randn(8, 20, generator=generator)[labels]
    embed = nn.Linear(40, 8, bias=False)
    nn.init.normal_(embed.weight, std=0.1, generator=generator)
    optimizer = torch.optim.Adam(embed.parameters(), lr=lr)
    others = ~torch.eye(48, dtype=torch.bool)
    relevant = (labels[:, None] == labels)[others].reshape(48, 47)

    def draw():
        noise = torch.randn(48, 40, generator=generator) * torch.tensor([0.3, 6.0]).repeat_interleave(20)
        return noise + nn.functional.pad(centres, (0, 20))

    def scores(inputs):
        z = embed(inputs)
        z = nn.functional.normalize(z, dim=-1) if unit else z
        return (z @ z.T)[others].reshape(48, 47)

    test, found = draw(), []
    for step in range(steps + 1):
        if step % 200 == 0:
            found.append(recall_at(scores(test), relevant, 1).item())
        optimizer.zero_grad()
        recall_loss(scores(draw()), relevant, grad=strategy).backward()
        optimizer.step()
    return found


def test_ranking_trains_behind_the_projection_and_not_without():
    assert train(Identity(), 200, lr=0.02, unit=False)[-1] > 0.9
    assert train(Identity("none"), 200, lr=0.02, unit=False)[-1] < 0.4


@pytest.mark.slow
def test_ranking_degrades_without_a_projection_even_where_embeddings_are_unit_vectors():
    assert min(train(Identity(), 1000, lr=0.1, unit=True)[1:]) > 0.97
    assert min(train(Identity("norm"), 1000, lr=0.1, unit=True)[1:]) > 0.97
    bare = train(Identity("none"), 1000, lr=0.1, unit=True)
    assert bare[1] > 0.9  # it learns at first,
    assert bare[-1] < 0.7  # and then unlearns


def test_recall_of_elements_that_are_never_to_be_found():
    relevant = torch.tensor([[False, True, False]])
    assert recall_at(torch.tensor([[0.0, -torch.inf, 1.0]]), relevant, 2) == 0
    assert recall_at(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), relevant, 1) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, r: recall_loss(s, r.float()), "relevant: got torch.float32, wanted torch.bool"),
        (lambda s, r: average_precision_loss(s, r[:, :2]), r"relevant: got shape \(30, 2\), wanted \(30, 12\)"),
        (lambda s, r: recall_loss(s, r & False), "relevant: got not one relevant element"),
        (lambda s, r: recall_at(s, r, 13), "k: got 13, wanted a whole number from 1 to 12"),
        (lambda s, r: recall_at_loss(s, r, 0), "k: got 0, wanted a whole number from 1 to 12"),
        (lambda s, r: recall_at_loss(s, r & False, 1), "relevant: got not one relevant element"),
        (lambda s, r: recall_at(s, r, 2.5), "k: got 2.5, wanted a whole number from 1 to 12"),
        (lambda s, r: recall_at(s * torch.nan, r, 1), "scores: got NaN entries"),
        (lambda s, r: recall_at(s[:0], r[:0], 1), r"scores: got shape \(0, 12\), wanted at least one query"),
        (lambda s, r: recall_at(s[0, 0], r[0, 0], 1), r"scores: got a single number, wanted \(\*, N\)"),
        *[
            (lambda s, r, loss=loss, bad=bad: loss(s.where(s > -2, bad), r), "scores: got NaN or infinite entries")
            for loss in (recall_loss, average_precision_loss, recall_at_2_loss)
            for bad in (torch.nan, torch.inf)
        ],
        (lambda s, r: recall_loss(s, r, margin=torch.nan), "margin: got nan, wanted a finite number"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*batch())
