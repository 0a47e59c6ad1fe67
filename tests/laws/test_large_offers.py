"""Offers in chunks: equal to the mean field in memory, forward and implicit backward, at a constant message size."""

import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from distset import InMemory
from distset.data import Bag, write_store
from distset.fixed_point import Anderson, Implicit, OneStep, Stop, fixed_point
from distset.gains import Smoothed, soft_subset
from distset.krylov import GMRES
from distset.large_offers import first_field, offer_logits, offer_loss, solve_offer
from distset.mean_field import oracle_loss
from distset.seeds import generator_for
from distset.set_functions import SumUtility, UserUtility
from distset.tasks.oracle import OracleModel, OracleTask, Solve
from distset.train import Example

TIGHT = Stop(max_steps=500, atol=1e-12, rtol=1e-12)


def make(context=False, n=40, dim=3, batch=()):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8 if context else 4, 6), nn.Tanh(), nn.Linear(6, 1))
    utility = SumUtility(nn.Sequential(nn.Linear(dim, 4), nn.Tanh()), head, context=context).double()
    with torch.no_grad():
        utility.head[0].weight.mul_(0.5)
        utility.head[2].weight.mul_(5.0)
    return utility, torch.randn(*batch, n, dim, dtype=torch.float64)


def draws(offer, samples, draw):
    parts = [
        draw(*offer.batch_shape, samples, size, generator=generator_for(0, "draws", i), dtype=torch.float64)
        for i, size in enumerate(offer.sizes)
    ]
    return torch.cat(parts, -1)


def in_memory(utility, offer, *, smooth, samples=5, grad=None):
    """The same mean field in the logits of all elements at once."""
    h = utility.embed(offer.elements, offer.mask)
    total = utility.total(h)
    zeros = torch.zeros(h.shape[:-1], dtype=h.dtype)
    if not smooth:
        inside = draws(offer, samples, torch.rand) < 0.5
        if offer.mask is not None:
            inside &= offer.mask.unsqueeze(-2)
        return utility.gains_of_sums(h, inside.double() @ h, inside, total).mean(-2)
    normal = draws(offer, samples, torch.randn)

    def step(logits):
        soft = soft_subset(logits, normal, offer.mask)
        return utility.gains_of_sums(h, soft @ h, soft, total).mean(-2)

    return fixed_point(step, zeros, grad=grad or Implicit(GMRES(1e-13)), iteration=Anderson(), stop=TIGHT).value


@pytest.mark.parametrize("smooth", [True, False], ids=["solved", "first step"])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_chunks_give_the_mean_field_in_memory_and_its_gradient(smooth, context, batched):
    utility, elements = make(context, batch=(2,) if batched else ())
    mask = torch.arange(40) < torch.tensor([[40], [31]]) if batched else None
    offer = InMemory(elements, chunk_size=9, mask=mask)
    chosen = torch.tensor([1, 8, 30])
    if smooth:
        field = solve_offer(utility, offer, grad=Implicit(GMRES(1e-13)), iteration=Anderson(), stop=TIGHT)
        assert field.solution.converged.all()
    else:
        field = first_field(utility, offer)
    logits = in_memory(utility, offer, smooth=smooth)
    target = torch.zeros(40, dtype=torch.bool).index_fill(0, chosen, True).expand_as(logits)
    valid = torch.ones_like(target) if mask is None else mask
    found = offer_logits(utility, offer, field)
    torch.testing.assert_close(found[valid], logits[valid], rtol=1e-8, atol=1e-9)
    assert (found[~valid] == -torch.inf).all()
    some = torch.tensor([1, 8, 30, 5, 22])
    part = offer_loss(utility, offer, field, chosen, some)
    within = torch.zeros(40, dtype=torch.bool).index_fill(0, some, True)
    torch.testing.assert_close(part, oracle_loss(logits, target, valid & within), rtol=1e-9, atol=1e-10)
    loss, wanted = offer_loss(utility, offer, field, chosen), oracle_loss(logits, target, mask)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-10)
    parameters = list(utility.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_one_chunk_in_memory_needs_no_replay_and_has_the_same_gradient():
    utility, elements = make()
    found = []
    for kind in (InMemory, Travelling):  # only the first one keeps the chunk's graph
        offer = kind(elements)
        loss = offer_loss(utility, offer, solve_offer(utility, offer), torch.tensor([3]))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(utility.parameters()))]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_the_implicit_gradient_in_chunks_is_the_derivative():
    utility, elements = make()
    offer, chosen = InMemory(elements, chunk_size=11), torch.tensor([0, 5])
    parameter = utility.head[0].weight

    def loss(grad=None):
        field = solve_offer(utility, offer, iteration=Anderson(), stop=TIGHT, grad=grad)
        return offer_loss(utility, offer, field, chosen)

    (exact,) = torch.autograd.grad(loss(Implicit(GMRES(1e-13))), parameter)
    (one_step,) = torch.autograd.grad(loss(OneStep()), parameter)
    values, step = [], 1e-5
    with torch.no_grad():
        for sign in (1, -2, 1):
            parameter[2, 1] += sign * step
            values.append(float(loss()))
    assert abs((values[0] - values[1]) / (2 * step) - exact[2, 1]) < 1e-6
    assert (one_step - exact).norm() > 1e-3 * exact.norm()


class Travelling(InMemory):
    """A set whose function, arguments and results are pickled, as to actors; it weighs the messages."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.sent = []

    def map(self, fn, *args, ids=None):
        down = self._parcel((fn, args))
        fn, args = pickle.loads(down)
        for index in range(self.num_chunks) if ids is None else ids:
            up = self._parcel(fn(self.chunk(index), *args))
            self.sent.append((len(down), len(up)))
            yield pickle.loads(up)

    @staticmethod
    def _parcel(what):
        out = io.BytesIO()
        pickle.dump(what, out)
        return out.getvalue()


def test_messages_do_not_grow_with_the_offer():
    utility, _ = make()
    sizes = {}
    for n in (200, 5000):
        offer = Travelling(torch.randn(n, 3, dtype=torch.float64), chunk_size=n // 2)
        scaled = SumUtility(nn.Sequential(utility.encoder, Scale(1 / n)), utility.head)
        field = solve_offer(scaled, offer, stop=Stop(max_steps=4))
        offer_loss(scaled, offer, field, torch.tensor([0, 7])).backward()
        sizes[n] = [max(column) for column in zip(*offer.sent)]
    print(sizes)
    assert all(abs(a - b) < 0.02 * b for a, b in zip(sizes[5000], sizes[200]))


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_a_set_that_lies_elsewhere_gives_the_same_bits():
    utility, elements = make()
    results = []
    for kind in (InMemory, Travelling):
        offer = kind(elements, chunk_size=9)
        field = solve_offer(utility, offer)
        loss = offer_loss(utility, offer, field, torch.tensor([3]))
        results.append([field.sums.detach(), loss.detach(), *torch.autograd.grad(loss, list(utility.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("first", [False, True], ids=["solved", "first step"])
def test_an_offer_on_disk_is_the_offer_in_memory(first, tmp_path):
    """Forward and implicit backward have its bits; so has a training step of the task."""
    utility, elements = make(context=True, n=200)
    stored = write_store(tmp_path / "store", [Bag("offer", elements.numpy())]).open("offer", 32)
    own_order = torch.cat(list(stored.map(lambda chunk: chunk.elements.clone())))  # a store has its own
    chosen, found = torch.tensor([3, 64, 199]), []
    for offer in (InMemory(own_order, 32), stored):
        field = (
            first_field(utility, offer) if first else solve_offer(utility, offer, grad=Implicit(GMRES(1e-13)), stop=TIGHT)
        )
        assert first or bool(field.solution.converged)
        loss = offer_loss(utility, offer, field, chosen)
        gradient = torch.autograd.grad(loss, list(utility.parameters()))
        found.append([field.sums.detach(), loss.detach(), offer_logits(utility, offer, field), *gradient])
    assert stored.num_chunks == 7
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    task = OracleTask(OracleModel(utility), Solve(gains=Smoothed(5)), negatives=1)
    losses = [task.loss(Example(offer, chosen), seed=2) for offer in (InMemory(own_order, 32), stored)]
    gradients = [torch.autograd.grad(loss, list(utility.parameters())) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_elements_whose_own_equation_has_no_solution_are_said_once(monkeypatch):
    utility, elements = make()
    monkeypatch.setattr("distset.large_offers.Stop", lambda *_, **__: Stop(max_steps=1, atol=0.0, rtol=0.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        field = solve_offer(utility, InMemory(elements, chunk_size=3), stop=Stop(max_steps=3))
    assert sum("own equation of some elements" in str(w.message) for w in said) == 1
    assert field.sums.isfinite().all()


OFFER = InMemory(torch.randn(20, 3), chunk_size=8)


@pytest.mark.parametrize(("chosen", "message"), [
    (torch.tensor([20]), "chosen: got positions 20 to 20, wanted 0 to 19"),
    (torch.tensor([-1]), "chosen: got positions -1"),
    (torch.tensor([1, 1]), "chosen: names an element twice"),
    (torch.tensor([], dtype=torch.int64), "chosen: got 0 of 20 elements"),
    (torch.arange(20), "chosen: got 20 of 20 elements"),
    (torch.tensor([True]), "chosen: got torch.bool"),
])  # fmt: skip
def test_bad_choices_are_named(chosen, message):
    utility = make()[0].float()
    with pytest.raises(ValueError, match=message):
        offer_loss(utility, OFFER, first_field(utility, OFFER), chosen)


@pytest.mark.parametrize(("counted", "message"), [
    (torch.tensor([999]), "counted: got positions 999 to 999, wanted 0 to 19"),
    (torch.tensor([-1]), "counted: got positions -1"),
    (torch.tensor([3, 3]), "counted: names an element twice"),
    (torch.tensor([], dtype=torch.int64), "counted: got no positions, wanted at least 1 of the 20"),
    (torch.ones(20, dtype=torch.bool), r"counted: got torch.bool .20,., wanted positions .* mask.nonzero"),
    (torch.tensor([3, 19]), "counted: has elements of chunk 2 that are not offered"),
])  # fmt: skip
def test_bad_counted_elements_are_named(counted, message):
    utility = make()[0].float()
    offer = InMemory(OFFER.elements, chunk_size=8, mask=torch.arange(20) < 19)
    with pytest.raises(ValueError, match=message):
        offer_loss(utility, offer, first_field(utility, offer), torch.tensor([3]), counted)


def test_all_that_is_offered_is_no_choice_also_beside_padding():
    utility, elements = make(batch=(2,))
    mask = torch.arange(40) < torch.tensor([[40], [12]])
    offer = InMemory(elements, chunk_size=9, mask=mask)
    field = first_field(utility, offer)
    assert offer_loss(utility, offer, field, torch.arange(11)).isfinite()
    with pytest.raises(ValueError, match="chosen: got 12 positions, all that is offered beside the padding"):
        offer_loss(utility, offer, field, torch.arange(12))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_above_0(temperature):
    utility = make()[0].float()
    for solve in (first_field, solve_offer):
        with pytest.raises(ValueError, match=f"temperature: got {temperature}, wanted a number above 0"):
            solve(utility, OFFER, temperature=temperature)


def test_padding_is_never_chosen_and_bad_features_are_named():
    utility, elements = make(batch=(2,))
    mask = torch.arange(40) < torch.tensor([[40], [31]])
    offer = InMemory(elements, chunk_size=9, mask=mask)
    with pytest.raises(ValueError, match=r"chosen: has elements of chunk 3 that are not offered \(padding\)"):
        offer_loss(utility, offer, first_field(utility, offer), torch.tensor([3, 31]))
    elements[1, 20] = torch.nan
    for solve in (first_field, solve_offer):
        with pytest.raises(ValueError, match=r"elements: 1 of 18 have features that are NaN.*in chunk 2.*element 18"):
            solve(utility, InMemory(elements, chunk_size=9))


def test_only_sums_scale():
    with pytest.raises(ValueError, match="utility: got UserUtility, wanted a SumUtility"):
        solve_offer(UserUtility(lambda elements, subsets: subsets.sum(-1)), OFFER)
    with pytest.raises(ValueError, match="samples: got 0"):
        solve_offer(make()[0].float(), OFFER, samples=0)
    with pytest.raises(ValueError, match="set: got Tensor, wanted a ChunkedSet"):
        solve_offer(make()[0].float(), torch.randn(5, 3))
