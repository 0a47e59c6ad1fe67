"""The oracle as a task: every method trains, what is frozen stays frozen, offers in chunks train too."""

import math
import warnings

import pytest
import torch

from distset import InMemory
from distset.choose import by_greedy, by_size, by_threshold
from distset.data.synthetic_offers import gaussian_offers
from distset.fixed_point import Implicit, Stop
from distset.gains import Drawn, Enumerated, Smoothed
from distset.mean_field import Constant, Nuclear, oracle_loss
from distset.offers import Offers
from distset.optim import Optimisation
from distset.problems.offers import _classify, _jaccard, examples
from distset.set_functions import UserUtility, published_utility
from distset.tasks.oracle import OracleModel, OracleTask, Solve, diffmf_task, equivset_task, idiffmf_task
from distset.train import Example, Parts, Plan, fit, predict_all

METHODS = {
    "DiffMF": lambda: diffmf_task(2, steps=2),
    "EquiVSet_ind": lambda: equivset_task(2),
    "EquiVSet_copula": lambda: equivset_task(2, rank=2),
    "iDiffMF_2": lambda: idiffmf_task(2),
    "iDiffMF_*": lambda: idiffmf_task(2, scale=Nuclear(), context=True),
    "iDiffMF_c": lambda: idiffmf_task(2, scale=Constant(0.1), nonlinear=True),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_published_method_trains_and_measures(method):
    torch.manual_seed(0)
    task = METHODS[method]()
    train = examples(gaussian_offers(16, size=20, chosen=3), group=4)
    plan = Plan(epochs=2, batch=2, monitor="jaccard")
    fitted = fit(task, train, train[:1], plan=plan, optimisation=Optimisation(lr=1e-3, schedule="constant"))
    last = fitted.history[-1]
    for key in ("jaccard", "predicted_size/jaccard", "threshold/f1", "precision", "recall", "loss"):
        assert 0 <= last[f"val/{key}"] < 1000
    parameters = [p for name, p in task.model.named_parameters() if not name.endswith("head.4.bias")]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)  # a constant of F has no gradient


@pytest.mark.filterwarnings("ignore::distset.fixed_point.FixedPointWarning")  # gains of three digits settle no further
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_measures_in_bfloat16(method):
    torch.manual_seed(0)
    task, train = METHODS[method](), examples(gaussian_offers(4, size=12, chosen=3), group=4)
    plan = Plan(epochs=1, batch=1, precision="bfloat16")
    fitted = fit(task, train, train, plan=plan, optimisation=Optimisation(lr=1e-4, schedule="constant"))
    assert fitted.history[-1]["val/loss"] == pytest.approx(12 * math.log(2), rel=0.2)  # at first psi is 0.5
    assert all(output.dtype == torch.float32 for output in predict_all(task, train, precision="bfloat16")[0])


def test_the_bound_trains_the_guess_alone_and_the_loss_the_utility_alone():
    torch.manual_seed(0)
    task = equivset_task(2)
    (example,) = examples(gaussian_offers(4, size=12, chosen=2))
    elements = example.set.elements
    bound = task._bound(elements, None, 0).sum()
    grads = torch.autograd.grad(bound, list(task.model.utility.parameters()), allow_unused=True, retain_graph=True)
    assert all(g is None for g in grads)
    assert all(g is not None for g in torch.autograd.grad(bound, list(task.model.recognition.parameters())))
    loss = oracle_loss(task._logits(elements, None, 0), example.target)
    assert all(g is None for g in torch.autograd.grad(loss, list(task.model.recognition.parameters()), allow_unused=True))


def test_predictions_repeat_and_padding_is_never_predicted():
    offers = gaussian_offers(6, size=9, chosen=2)
    mask = torch.arange(9) < torch.tensor([9, 8, 7, 6, 5, 9]).unsqueeze(-1)
    offers = Offers(offers.elements, (torch.arange(9) < 2).expand(6, 9), mask)
    task = diffmf_task(2)
    outputs, targets = predict_all(task, examples(offers, group=3))
    again, _ = predict_all(task, examples(offers, group=3))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again))
    assert (torch.cat(outputs)[~mask] == -torch.inf).all()
    assert 0 <= task.metrics(outputs, targets)["jaccard"] <= 1


def test_an_offer_in_chunks_trains_like_one_in_memory():
    """The same loss up to the draws, which follow the chunks: compared in the limit of many draws."""
    torch.manual_seed(0)
    solve = Solve(Smoothed(3000), Constant(0.2), Implicit(), None, Stop(200, 1e-6, 1e-6))
    task = OracleTask(OracleModel(published_utility(2, width=4, hidden=4)), solve)
    x, chosen = torch.randn(24, 2), torch.arange(24) < 5
    losses = [task.loss(Example(InMemory(x, chunk_size=c), chosen), seed=0) for c in (None, 7)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.01, atol=0)
    losses[1].backward()
    padded = task.predict(InMemory(x, chunk_size=7, mask=torch.arange(24) < 20))
    assert (padded == -torch.inf).tolist() == [False] * 20 + [True] * 4
    for size, loss in zip((None, 7), losses):
        torch.testing.assert_close(task.loss(Example(InMemory(x, chunk_size=size), torch.arange(5)), seed=0), loss)


def test_the_elements_that_count_are_the_same_in_chunks():
    torch.manual_seed(0)
    solve = Solve(Smoothed(3000), Constant(0.2), Implicit(), None, Stop(200, 1e-6, 1e-6))
    task = OracleTask(OracleModel(published_utility(2, width=4, hidden=4)), solve, negatives=1)
    x, mask, chosen = torch.randn(24, 2), torch.arange(24) < 20, torch.arange(24) < 5
    losses = [task.loss(Example(InMemory(x, chunk_size=c, mask=mask), chosen), seed=3) for c in (None, 7)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.01, atol=0)
    task.negatives = None
    everything = task.loss(Example(InMemory(x, mask=mask), chosen), seed=3)
    assert everything > 1.5 * losses[0]  # 20 elements count, not 10
    batch = Example(InMemory(x.expand(2, 24, 2), chunk_size=7), torch.arange(5))
    assert task.loss(batch, seed=0).isfinite()
    task.negatives = 1
    with pytest.raises(ValueError, match=r"negatives: .* is a batch of offers in chunks"):
        task.loss(batch, seed=0)


def test_what_rules_say_is_what_choices_are():
    task = diffmf_task(2)
    logits, chosen = torch.randn(4, 9), torch.arange(9).expand(4, 9) < 2
    assert task.rules["jaccard"] == by_size(logits, 2).rule
    assert task.rules["predicted_size/f1"] == by_size(logits).rule
    assert task.rules["threshold/recall"] == by_threshold(logits).rule
    greedy = by_greedy(task.model.utility, torch.randn(4, 9, 2), 2).rule
    assert task.rules["greedy/precision"].startswith(greedy)
    implicit = idiffmf_task(2, stop=Stop(10))
    offers = examples(gaussian_offers(2))
    assert set(task.metrics([logits], [chosen])) | set(implicit.measure(offers)) == {*task.rules, "loss"}
    assert set(task.measure(offers)) < set(task.rules), "no fixed point is looked for"


def test_whether_the_map_contracts_is_measured():
    """F counts pairs: the step is sigma(t sum of the others' psi), and its Jacobian t (1 - I) between slopes of sigma."""
    n, t = 6, 0.2
    pairs = UserUtility(lambda x, s: t * (s.sum(-1).square() - s.square().sum(-1)) / 2)
    task = OracleTask(OracleModel(pairs), Solve(Enumerated(), Constant(1.0), Implicit()))
    task.model.register_parameter("anywhere", torch.nn.Parameter(torch.zeros((), dtype=torch.float64)))
    offer = Example(InMemory(torch.zeros(n, 2)), torch.arange(n) < 2)
    found = task.measure([offer] * 3)
    at_half = torch.tensor(t * (n - 1) / 2).sigmoid()
    assert float(at_half * (1 - at_half)) * t * (n - 1) - 1e-6 < found["fixed_point/lipschitz"] < t * (n - 1) / 4
    assert found["fixed_point/converged"] == 1.0
    assert 1 < found["fixed_point/iterations"] < 50


@pytest.mark.parametrize("derivative", [None, "score", "differences"])
def test_a_trained_model_is_measured_whatever_the_gains(derivative):
    task = idiffmf_task(2, gains=Drawn(4, derivative), scale=Constant(0.1), stop=Stop(3), width=4, hidden=4)
    offers = examples(gaussian_offers(4, size=8, chosen=2), group=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = task.measure(offers)
    left_out = {"differences": {"fixed_point/lipschitz"}}.get(derivative, set())
    assert {name for name in task.rules if name.startswith("fixed_point/")} - set(found) == left_out
    assert any("lipschitz is left out: gains: got Drawn" in str(w.message) for w in said) == bool(left_out)


def test_an_ascent_that_meets_infinite_values_is_left_out():
    pairs_or_more = UserUtility(lambda x, s: torch.where(s.sum(-1) >= 2, s.sum(-1), -torch.inf))
    task = OracleTask(OracleModel(pairs_or_more), Solve())
    task.model.register_parameter("anywhere", torch.nn.Parameter(torch.zeros(())))
    with pytest.warns(UserWarning, match="measure: greedy is left out: utility: UserUtility has gains that are NaN"):
        assert task.measure(examples(gaussian_offers(2, size=8, chosen=2))) == {}


def test_targets_may_be_positions_where_offers_are_joined():
    task = diffmf_task(2)
    x = torch.randn(3, 2, 9, 2, generator=torch.Generator().manual_seed(0))
    places = [torch.tensor([0, 1]), torch.tensor([4]), torch.tensor([3, 7, 8])]
    rows = [(torch.arange(9).unsqueeze(-1) == own).any(-1).expand(2, 9) for own in places]
    losses = [
        task.batch_loss([Example(InMemory(own), target) for own, target in zip(x, targets)], seed=3)
        for targets in (places, rows, [places[0], *rows[1:]])
    ]
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(ValueError, match="chosen: got positions 9 to 9, wanted 0 to 8"):
        task.batch_loss([Example(InMemory(x[0]), torch.tensor([9])), Example(InMemory(x[1]), places[1])], seed=3)


def test_greedy_ascent_is_measured_over_the_first_hundred_offers():
    """A utility that likes the elements farther out: the first hundred offers have chosen those, the others not."""
    x = torch.randn(120, 8, 2, generator=torch.Generator().manual_seed(0))
    farthest = by_size(x.norm(dim=-1), 3).chosen
    chosen = torch.where(torch.arange(120).unsqueeze(-1) < 100, farthest, by_size(-x.norm(dim=-1), 3).chosen)
    far = UserUtility(lambda x, s: (s * x.norm(dim=-1).unsqueeze(-2)).sum(-1))
    task = OracleTask(OracleModel(far), Solve())
    task.model.register_parameter("anywhere", torch.nn.Parameter(torch.zeros(())))
    assert task.measure(examples(Offers(x, chosen), 20)) == dict.fromkeys(
        ["greedy/jaccard", "greedy/precision", "greedy/recall", "greedy/f1"], 1.0
    )
    assert task.measure([Example(InMemory(x[0], chunk_size=4), chosen[0])]) == {}


def test_the_classifier_is_fitted_on_elements_alone():
    """Where S* is the elements above a threshold it knows all there is; where chance decides, of other offers nothing."""
    x = torch.randn(60, 12, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12).expand(60, 12) < 11
    above = (x.sum(-1) > 1) & mask
    kept = above.any(-1)
    offers = Offers(x[kept], above[kept], mask[kept])
    assert _jaccard(_classify(offers, offers), offers) > 0.97
    chance = Offers(x, by_size(torch.rand(60, 12, generator=torch.Generator().manual_seed(2)), 2).chosen)
    train, test = (Offers(chance.elements[own], chance.chosen[own]) for own in (slice(0, 30), slice(30, 60)))
    assert _jaccard(_classify(train, test), test) < 0.25


def test_drawing_needs_no_batch_and_no_test_offers(tmp_path):
    task, x, chosen = idiffmf_task(2, width=4, hidden=4), torch.randn(9, 2), torch.arange(9) < 3
    whole, chunked = (Example(InMemory(x, chunk_size=size), chosen) for size in (None, 4))
    for name, test in {"none": [], "chunked": [chunked]}.items():
        task.draw(tmp_path / name, Parts([], [], test, {}))
        assert not (tmp_path / name).exists()
    task.draw(tmp_path / "one", Parts([], [], [chunked, whole], {}))
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"residual.png", "chosen.png"}
    padded = Example(InMemory(x, mask=torch.arange(9) < 8), torch.arange(3))
    task.draw(tmp_path / "padded", Parts([], [], [padded], {}))
    assert {path.name for path in (tmp_path / "padded").iterdir()} == {"residual.png"}


def test_a_prediction_that_is_no_number_is_not_taken_for_padding():
    logits, chosen = torch.randn(2, 9), torch.arange(9).expand(2, 9) < 2
    logits[1, 4] = torch.nan
    with pytest.raises(ValueError, match="logits: 1 of 18 are NaN"):
        diffmf_task(2).metrics([logits], [chosen])


def test_negatives_beside_the_chosen_count_as_often_as_asked():
    task = diffmf_task(2)
    chosen = torch.arange(30).expand(4, 30) < 7
    counted = task._counted(chosen, None, seed=1)
    assert (counted.sum(-1) == 14).all()
    assert counted[chosen].all()
    assert not torch.equal(counted, task._counted(chosen, None, seed=2))
    mask = (torch.arange(30) < 10).expand(4, 30)
    assert (task._counted(chosen, mask, seed=1).sum(-1) == 10).all()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make", [diffmf_task, equivset_task])
def test_the_last_step_at_counted_elements_is_the_whole_step_there(make, steps):
    """Values and gradients, also with padding."""
    x = torch.randn(4, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([[9], [9], [7], [6]])
    chosen = torch.zeros(4, 9, dtype=torch.bool)
    chosen[:, :2] = chosen[1, 3] = True
    torch.manual_seed(2)
    task = make(2, steps=steps, samples=3)
    task.model.double()
    example = Example(InMemory(x, mask=mask), chosen)
    loss = task.loss(example, seed=5)
    gradient = torch.autograd.grad(loss, list(task.model.utility.parameters()))
    whole = oracle_loss(task._logits(x, mask, 5), chosen, task._counted(chosen, mask, 5))
    if task.model.recognition is not None:
        whole = whole - task._bound(x, mask, 5).mean()
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(whole, list(task.model.utility.parameters()))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize(("target", "message"), [
    (torch.tensor([-1, 3]), "chosen: got positions -1 to 3, wanted 0 to 29"),
    (torch.tensor([31]), "chosen: got positions 31 to 31, wanted 0 to 29"),
    (torch.tensor([3, 3]), "chosen: names an element twice"),
    (torch.zeros(30), "chosen: got torch.float32"),
    (torch.zeros(29, dtype=torch.bool), "chosen: got torch.bool .29,., wanted .30,."),
    (torch.arange(30) >= 25, "chosen: .* not offered"),
])  # fmt: skip
def test_bad_targets_are_named_in_one_chunk_and_in_many(target, message, chunk_size):
    task = OracleTask(OracleModel(published_utility(2, width=4, hidden=4)), Solve(Smoothed(3)))
    x, mask = torch.randn(30, 2), torch.arange(30) < 27
    with pytest.raises(ValueError, match=message):
        task.loss(Example(InMemory(x, chunk_size=chunk_size, mask=mask), target), seed=0)
    x[8] = torch.inf
    with pytest.raises(ValueError, match=r"elements: 1 of .* NaN or infinite"):
        task.loss(Example(InMemory(x, chunk_size=chunk_size), torch.arange(3)), seed=0)


def test_what_cannot_be_is_said():
    offer = Example(InMemory(torch.randn(9, 2), chunk_size=4), torch.arange(3))
    with pytest.raises(ValueError, match=r"set: .* has several chunks, which are solved with Smoothed"):
        diffmf_task(2).loss(offer, seed=0)
    with pytest.raises(ValueError, match=r"scale: got Constant\(c=0\), wanted a constant above 0 for offers in chunks"):
        OracleTask(OracleModel(published_utility(2)), Solve(scale=Constant(0))).loss(offer, seed=0)
    with pytest.raises(ValueError, match="utility: got UserUtility, wanted a SumUtility for offers in chunks"):
        OracleTask(OracleModel(UserUtility(lambda x, s: s.sum(-1))), Solve()).loss(offer, seed=0)
    with pytest.raises(ValueError, match="chosen: set 0 has chosen nothing"):
        diffmf_task(2).loss(Example(InMemory(torch.randn(2, 9, 2)), torch.zeros(2, 9, dtype=torch.bool)), seed=0)
    with pytest.raises(ValueError, match="negatives: got 0"):
        OracleTask(OracleModel(published_utility(2)), Solve(), negatives=0)
    with pytest.raises(ValueError, match="group: got 0"):
        examples(gaussian_offers(2), 0)
