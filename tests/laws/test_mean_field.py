"""The mean field against enumeration: gains, their derivative, the implicit gradient under every scaling."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from distset.fixed_point import Damped, FixedPointWarning, Implicit, OneStep, Status, Stop, Unrolled
from distset.gains import Drawn, Enumerated, Smoothed, soft_subset
from distset.krylov import GMRES, Dense, Neumann
from distset.mean_field import (
    L2,
    Constant,
    Nuclear,
    check_contraction,
    diff_mf,
    equivset,
    field_step,
    idiff_mf,
    mean_field,
    oracle_loss,
)
from distset.offers import check_offer, membership
from distset.set_functions import Guess, SumUtility, UserUtility

TIGHT = Stop(max_steps=2000, atol=1e-13, rtol=1e-13)
SCALES = [Constant(1.0), L2(1.5), Nuclear(2.5)]


def small(seed=0, n=6, sets=2, context=False, strength=1.0):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(8 if context else 4, 6), nn.Tanh(), nn.Linear(6, 1))
    utility = SumUtility(nn.Linear(3, 4), head, context=context).double()
    with torch.no_grad():
        utility.head[2].weight.mul_(strength)
    return utility, torch.randn(sets, n, 3, dtype=torch.float64)


def multilinear(utility, elements, psi):
    """The multilinear extension written out as a sum over all subsets of one offer."""
    n = elements.shape[-2]
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)
    weight = torch.where(every == 1, psi, 1 - psi).prod(-1)
    return weight @ utility(elements, every)


def repeated(elements, times):
    """One offer, many times: a batch of independent draws."""
    return elements[0].expand(times, *elements.shape[1:])


def assert_mean(samples, truth, sigmas=5.0):
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - truth).abs() < sigmas * error + 1e-12).all()


@pytest.mark.parametrize("context", [False, True])
def test_enumerated_gains_are_the_gradient_of_the_multilinear_extension(context):
    utility, elements = small(context=context)
    psi = torch.rand(2, 6, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_()
    found = field_step(utility, elements, gains=Enumerated())(torch.logit(psi))
    for b in range(2):
        (wanted,) = torch.autograd.grad(multilinear(utility, elements[b], psi[b]), psi)
        torch.testing.assert_close(found[b], wanted[b])
    hessian = torch.autograd.functional.hessian(lambda p: multilinear(utility, elements[0], p), psi.detach()[0])
    jacobian = torch.autograd.functional.jacobian(
        lambda p: field_step(utility, elements, gains=Enumerated())(torch.logit(p))[0], psi.detach()
    )[:, 0]
    torch.testing.assert_close(jacobian, hessian, rtol=1e-8, atol=1e-10)
    assert hessian.abs().max() > 1e-3


@pytest.mark.parametrize("n", [2, 8, 12])
@pytest.mark.parametrize("scale", SCALES, ids=lambda s: type(s).__name__)
def test_implicit_gradient_of_the_loss_by_enumeration(scale, n):
    """Theorem 4.3: implicit with every solver = unrolled to convergence = finite differences, for each scaling."""
    utility, elements = small(n, n=n, strength=2.0)
    chosen = torch.rand(2, n) < 0.4
    parameters = list(utility.parameters())

    def loss(grad, **how):
        solution = mean_field(utility, elements, gains=Enumerated(), scale=scale, grad=grad, **how)
        return oracle_loss(solution.value, chosen)

    solved = {"stop": TIGHT, "iteration": Damped(0.7)}
    exact = torch.autograd.grad(loss(Implicit(Dense()), **solved), parameters)
    flat = torch.cat([g.flatten() for g in exact])
    for grad in (Implicit(GMRES(1e-12)), Implicit(Neumann(1e-12, 3000)), Unrolled(150)):
        other = torch.autograd.grad(loss(grad, iteration=Damped(0.7), stop=TIGHT), parameters)
        assert (torch.cat([g.flatten() for g in other]) - flat).norm() < 1e-6 * flat.norm()
    weight, step = utility.head[0].weight, 1e-5
    with torch.no_grad():
        for place in [(0, 0), (3, 2)]:
            values = []
            for sign in (1, -2, 1):
                weight[place] += sign * step
                values.append(loss(None, **solved))
            assert abs((values[0] - values[1]) / (2 * step) - exact[2][place]) < 1e-6


def test_one_step_and_a_few_unrolled_are_off_where_the_hessian_matters():
    """As fractions of the gradient: .21 for one step at the solution; .26 and .022 for two and five steps from 0.5."""
    utility, elements = small(3, n=8, strength=30.0)
    chosen = torch.rand(2, 8) < 0.4

    def gradient(grad):
        how = {"iteration": Damped(0.3), "stop": TIGHT} if not isinstance(grad, Unrolled) else {}
        value = mean_field(utility, elements, gains=Enumerated(), grad=grad, **how).value
        return torch.cat([g.flatten() for g in torch.autograd.grad(oracle_loss(value, chosen), list(utility.parameters()))])

    exact = gradient(Implicit(Dense()))
    errors = [float((gradient(g) - exact).norm() / exact.norm()) for g in (OneStep(), Unrolled(2), Unrolled(5))]
    print(errors)
    assert errors[0] > 0.1
    assert errors[1] > 0.1
    assert errors[2] > 0.01


@pytest.mark.parametrize("derivative", ["score", "differences"])
def test_drawn_gains_and_their_derivative_are_unbiased(derivative):
    utility, elements = small(4, n=5)
    psi = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
    direction = torch.randn(5, dtype=torch.float64)
    times = 20_000

    def gains_and_slope(x, estimator):
        logits = torch.logit(psi).expand(len(x), 5).clone().requires_grad_()
        value = field_step(utility, x, gains=estimator, generator=torch.Generator().manual_seed(5))(logits)
        (slope,) = torch.autograd.grad((value * direction).sum(), logits)
        return value.detach(), slope

    value, slope = gains_and_slope(elements[:1], Enumerated())
    samples, slopes = gains_and_slope(repeated(elements, times), Drawn(4, derivative))
    assert_mean(samples, value[0])
    assert_mean(slopes, slope[0])
    assert slope.abs().max() > 0.01


def test_second_differences_have_less_noise_than_the_score_function():
    utility, elements = small(4, n=5)
    logits = torch.zeros(2000, 5, dtype=torch.float64, requires_grad=True)
    spread = {}
    for derivative in ("score", "differences"):
        step = field_step(
            utility, repeated(elements, 2000), gains=Drawn(8, derivative), generator=torch.Generator().manual_seed(1)
        )
        spread[derivative] = torch.autograd.grad(step(logits).sum(), logits)[0].var(0).sum()
    assert spread["differences"] < 0.3 * spread["score"]


def test_without_a_derivative_the_implicit_gradient_is_the_one_step_gradient():
    """What the published codes do: hard draws pass zeros back, so theorem 4.3's Hessian term is never there."""
    utility, elements = small(5, n=6)
    chosen = torch.rand(2, 6) < 0.4

    def gradient(gains, grad):
        solution = mean_field(utility, elements, gains=gains, grad=grad, iteration=Damped(0.5), stop=Stop(200))
        return torch.autograd.grad(oracle_loss(solution.value, chosen), utility.encoder.weight)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hard = Drawn(20, derivative=None)
        torch.testing.assert_close(gradient(hard, Implicit()), gradient(hard, OneStep()))
        right = Drawn(20, "score")
        assert (gradient(right, Implicit()) - gradient(right, OneStep())).abs().max() > 1e-4


def test_the_norm_of_drawn_rows_has_an_unbiased_derivative():
    """The nuclear norm of M = 2 hard rows: its expectation over all pairs of subsets, differentiated by autograd."""
    utility, elements = small(6, n=3, sets=1)
    logits = torch.tensor([-0.5, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    every = torch.tensor(list(itertools.product([0, 1], repeat=3)), dtype=torch.bool)
    rows = utility.gains(elements[0], every).detach()
    psi = torch.sigmoid(logits)
    q = torch.where(every, psi, 1 - psi).prod(-1)
    pairs = torch.stack([rows.unsqueeze(1).expand(8, 8, 3), rows.unsqueeze(0).expand(8, 8, 3)], -2) / 2**0.5
    expected = (q.unsqueeze(1) * q * torch.linalg.matrix_norm(pairs, "nuc")).sum()
    (wanted,) = torch.autograd.grad(expected, logits)

    times = 40_000
    batch = logits.detach().expand(times, 3).clone().requires_grad_()
    gains = Drawn(2).start(utility, repeated(elements, times), None, torch.Generator().manual_seed(2))(batch)
    ratio = Nuclear(1.0)(gains._replace(mean=torch.ones_like(gains.mean)), torch.tensor(3.0))
    norms = 1 / ratio[:, 0]
    assert_mean(norms.detach(), expected.detach())
    (slopes,) = torch.autograd.grad(norms.sum(), batch)
    assert_mean(slopes, wanted)


class KnowsNoPlaces(Enumerated):
    """As an estimator of one's own may be."""

    def start(self, utility, elements, mask, generator=None):
        return super().start(utility, elements, mask, generator)

    def __repr__(self):
        return "KnowsNoPlaces()"


AT_PLACES = [
    Enumerated(), Drawn(3), Drawn(3, "differences"), Drawn(3, derivative=None), Smoothed(4), KnowsNoPlaces()
]  # fmt: skip


@pytest.mark.parametrize("estimator", AT_PLACES, ids=repr)
def test_gains_at_places_are_those_of_all_at_places(estimator):
    """With their derivatives in psi and in the parameters."""
    utility, elements = small(4, n=6, sets=3)
    logits = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    places = torch.tensor([[4, 1], [0, 5], [2, 3]])
    found = []
    for at in (None, places):
        gains = field_step(utility, elements, gains=estimator, scale=Constant(0.7), places=at)(logits)
        gains = gains.gather(-1, places) if at is None else gains
        slopes = torch.autograd.grad(gains.sin().sum(), [logits, *utility.parameters()], allow_unused=True)
        found.append([gains, *(slope for slope in slopes if slope is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="places: got a scale L2"):
        field_step(utility, elements, gains=estimator, scale=L2(), places=places)


def poisson_binomial(psi):
    pmf = torch.ones(1, dtype=torch.float64)
    for p in psi:
        pmf = torch.nn.functional.pad(pmf * (1 - p), (0, 1)) + torch.nn.functional.pad(pmf * p, (1, 0))
    return pmf


def normal_mean(function, mean, spread):
    """The expectation under a normal by the trapezoidal rule, exact to rounding for smooth functions."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    return (function(mean + spread * z) * torch.exp(-(z**2) / 2)).sum() * (z[1] - z[0]) / math.sqrt(2 * math.pi)


def smoothed_gain(psi, scale, centre):
    """The mean gain of the first element by the house's own smoothing, at draws that make its sum go through a grid."""
    utility = SumUtility(nn.Identity(), nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))).double()
    with torch.no_grad():
        for layer, weight, bias in ((utility.head[0], scale, -centre * scale), (utility.head[2], 1.0, 0.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    z = torch.linspace(-9, 9, 401, dtype=torch.float64)
    spread = (psi * (1 - psi)).sqrt()
    normal = z.unsqueeze(-1) * spread / spread[1:].norm()  # the others' sum is then its mean plus z of its deviations
    soft, ones = soft_subset(torch.logit(psi), normal), torch.ones(len(psi), 1, dtype=torch.float64)
    rows = utility.gains_of_sums(ones, soft @ ones, soft, None).detach()
    weight = torch.exp(-(z**2) / 2)
    return (rows[:, 0] @ weight) / weight.sum()


def test_bias_of_smoothing_is_within_lindebergs_bound_and_falls_with_n():
    """Elements alike but for psi, so that the sum is a count with a known law; the head sees it at a scale of sqrt(n)."""
    biases = []
    for n in (4, 16, 64, 256, 1024):
        psi = torch.linspace(0.1, 0.6, n, dtype=torch.float64)
        others, scale, centre = psi[1:], 1 / math.sqrt(n), psi.sum() - 0.7 * math.sqrt(n)

        def gain(u, scale=scale, centre=centre):
            return torch.tanh((u + 1 - centre) * scale) - torch.tanh((u - centre) * scale)

        pmf = poisson_binomial(others)
        exact = pmf @ gain(torch.arange(n, dtype=torch.float64))
        variance = (others * (1 - others)).sum()
        smooth = normal_mean(gain, others.sum(), variance.sqrt())
        # Lindeberg: each Bernoulli is exchanged for a normal of its moments; |tanh'''| <= 2, a gain is a difference
        third = (others * (1 - others) * (others**2 + (1 - others) ** 2)).sum()
        normal_third = 2 * math.sqrt(2 / math.pi) * (others * (1 - others)).pow(1.5).sum()
        bound = 2 * 2 * scale**3 / 6 * (third + normal_third)
        torch.testing.assert_close(smoothed_gain(psi, scale, centre), smooth, rtol=1e-9, atol=1e-13)
        biases.append(float((smooth - exact).abs()))
        assert biases[-1] <= bound
    print(dict(zip((4, 16, 64, 256, 1024), biases)))
    assert all(b < a / 2 for a, b in itertools.pairwise(biases))


def test_smoothed_gains_follow_their_normal_law_and_their_slope_is_that_of_the_map():
    """One scalar sum: the mean over draws is the normal expectation; its derivative agrees with finite differences."""
    torch.manual_seed(0)
    utility = SumUtility(nn.Linear(2, 1), nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))).double()
    elements = torch.randn(1, 7, 2, dtype=torch.float64)
    logits = torch.randn(1, 7, dtype=torch.float64)
    psi, h = torch.sigmoid(logits)[0], utility.embed(elements)[0, :, 0].detach()
    draws = torch.randn(40_000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    soft = psi + (psi * (1 - psi)).sqrt() * draws
    sums = (soft @ h).unsqueeze(-1)
    rows = utility.gains_of_sums(h.unsqueeze(-1), sums, soft, None).detach()
    for i in range(7):
        rest = [j for j in range(7) if j != i]
        mean, spread = (psi * h)[rest].sum(), (psi * (1 - psi) * h**2)[rest].sum().sqrt()

        def gain(u, i=i):
            return utility.of_sums((u + h[i]).unsqueeze(-1), None) - utility.of_sums(u.unsqueeze(-1), None)

        wanted = normal_mean(lambda u, g=gain: g(u).detach(), mean, spread)
        assert abs(rows[:, i].mean() - wanted) < 5 * rows[:, i].std() / 200
    step = field_step(utility, elements, gains=Smoothed(6))
    assert torch.autograd.gradcheck(step, logits.requires_grad_())


def test_smoothed_implicit_gradient_is_right_for_every_scale():
    utility, elements = small(8, n=10, strength=3.0)
    chosen = torch.rand(2, 10) < 0.4
    for scale in SCALES:
        losses = [
            oracle_loss(mean_field(utility, elements, gains=Smoothed(5), scale=scale, grad=g, **how).value, chosen)
            for g, how in [(Implicit(GMRES(1e-12)), {"iteration": Damped(0.5), "stop": TIGHT}), (Unrolled(300), {})]
        ]
        a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(x, list(utility.parameters()))]) for x in losses)
        assert (a - b).norm() < 1e-6 * b.norm()


@pytest.mark.parametrize("gains", [Enumerated(), Drawn(4), Drawn(4, "differences"), Smoothed(4)], ids=repr)
def test_padding_is_not_seen(gains):
    utility, elements = small(9, n=8, context=True)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    chosen = (torch.arange(8) < 2).expand(2, 8)

    def losses(x, m, generator_seed=0):
        numbers = torch.Generator().manual_seed(generator_seed)
        logits = mean_field(utility, x, gains=gains, grad=Unrolled(2), scale=L2(), mask=m, generator=numbers).value
        loss = oracle_loss(logits, chosen, m)
        return logits.detach(), torch.autograd.grad(loss, utility.encoder.weight)[0]

    logits, grad = losses(elements, mask)
    other, other_grad = losses(torch.where(mask.unsqueeze(-1), elements, 7.0), mask)
    assert (logits[1, 5:] == 0).all()
    torch.testing.assert_close(logits, other)
    torch.testing.assert_close(grad, other_grad)


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: type(s).__name__)
def test_enumerated_gains_with_padding_are_those_of_the_offer_without_it(scale):
    utility, elements = small(9, n=7, sets=1, context=True)
    by_any = UserUtility(lambda x, s, mask=None: utility(x, s, mask).exp())
    logits = torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7).unsqueeze(0) < 4
    for own in (utility, by_any):
        found, alone = logits.clone().requires_grad_(), logits[:, :4].clone().requires_grad_()
        padded = field_step(own, elements, gains=Enumerated(), scale=scale, mask=mask)(found)
        wanted = field_step(own, elements[:, :4], gains=Enumerated(), scale=scale)(alone)
        torch.testing.assert_close(padded[:, :4], wanted)
        assert (padded[:, 4:] == 0).all()
        slope, wanted_slope = (torch.autograd.grad(x.sin().sum(), y)[0] for x, y in ((padded, found), (wanted, alone)))
        torch.testing.assert_close(slope[:, :4], wanted_slope)
        assert (slope[:, 4:] == 0).all()


def test_diff_mf_is_the_published_step_on_the_same_subsets():
    """sigma(mean over m of F(S_m + i) - F(S_m - i)) with every subset evaluated anew."""
    utility, elements = small(10, n=6)
    found = diff_mf(utility, elements, steps=1, samples=5, generator=torch.Generator().manual_seed(3)).value
    subsets = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) < 0.5
    eye = torch.eye(6, dtype=torch.bool)
    with_i, without_i = (subsets.unsqueeze(-2) | eye).double(), (subsets.unsqueeze(-2) & ~eye).double()
    f1, f0 = (utility(elements, s.flatten(1, 2)).unflatten(-1, (5, 6)) for s in (with_i, without_i))
    torch.testing.assert_close(torch.sigmoid(found), torch.sigmoid((f1 - f0).mean(1)))
    start = torch.randn(2, 6, dtype=torch.float64)
    guessed = equivset(
        utility, Guess(start, torch.ones_like(start), None), elements, generator=torch.Generator().manual_seed(3)
    )
    direct = diff_mf(utility, elements, start=start, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(guessed.value, direct.value)


def test_any_utility_takes_the_general_path():
    def determinant(elements, subsets):
        kernel = elements @ elements.mT
        picked = subsets.unsqueeze(-1) * subsets.unsqueeze(-2) * kernel.unsqueeze(-3)
        return torch.logdet(picked + torch.eye(elements.shape[-2], dtype=elements.dtype))

    elements = torch.randn(2, 5, 3, dtype=torch.float64)
    enumerated = mean_field(UserUtility(determinant), elements, gains=Enumerated(), iteration=Damped(0.5), stop=Stop(300))
    drawn = mean_field(UserUtility(determinant), elements, gains=Drawn(3000), iteration=Damped(0.5), stop=Stop(300))
    assert enumerated.converged.all()
    assert (torch.sigmoid(enumerated.value) - torch.sigmoid(drawn.value)).abs().max() < 0.05
    with pytest.raises(ValueError, match="utility: got UserUtility, wanted a SumUtility"):
        mean_field(UserUtility(determinant), elements, gains=Smoothed(5))


def test_scales_are_per_set_and_hold_psi_where_assumption_4_1_wants_it():
    utility, elements = small(11, n=10, sets=3, strength=50.0)
    for scale in (L2(), Nuclear()):
        together = idiff_mf(utility, elements, scale=scale, gains=Enumerated()).value
        alone = torch.cat([idiff_mf(utility, elements[b : b + 1], scale=scale, gains=Enumerated()).value for b in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-10)
        assert (together.norm(dim=-1) <= 2 / 10 + 1e-9).all()
    torch.testing.assert_close(
        idiff_mf(utility, elements, gains=Enumerated()).value.norm(dim=-1), torch.full((3,), 0.2, dtype=torch.float64)
    )


def test_the_contraction_check_measures_the_jacobian_and_warns():
    utility = UserUtility(lambda elements, subsets: -2 * (subsets.sum(-1) - 3) ** 2)
    elements = torch.zeros(2, 6, 1, dtype=torch.float64)
    with pytest.warns(FixedPointWarning, match="stretches by .* in 2 of 2 offers.*Constant"):
        constant = check_contraction(utility, elements, gains=Enumerated(), points=1)
    half = torch.full((2, 6), 0.5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda p: torch.sigmoid(field_step(utility, elements, gains=Enumerated())(torch.logit(p))), half
    )
    wanted = [torch.linalg.matrix_norm(jacobian[b, :, b], 2) for b in range(2)]
    torch.testing.assert_close(constant, torch.stack(wanted), rtol=1e-6, atol=0)
    torch.testing.assert_close(constant, torch.full((2,), 5.0, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (check_contraction(utility, elements, gains=Enumerated(), scale=L2()) < 1).all()


def test_what_draws_without_a_second_derivative_allow_to_measure():
    utility, elements = small()
    assert (check_contraction(utility, elements, gains=Drawn(3, derivative=None)) == 0).all()
    assert (check_contraction(utility, elements, gains=Drawn(3, "score")) > 0).all()
    with pytest.raises(ValueError, match=r"gains: got Drawn\(3, derivative='differences'\), .* wanted Enumerated"):
        check_contraction(utility, elements, gains=Drawn(3, "differences"))


def test_a_cycle_is_named_and_the_loss_stays_finite():
    """A utility that dislikes company strongly: everybody in, everybody out, a cycle of period 2."""
    utility = UserUtility(lambda elements, subsets: 10 * subsets.sum(-1) - 4 * subsets.sum(-1) ** 2)
    elements = torch.randn(2, 6, 1)
    with pytest.warns(FixedPointWarning, match="cycle .period 2.*Damped"):
        solution = mean_field(utility, elements, gains=Enumerated())
    assert solution.status.tolist() == [Status.CYCLE] * 2
    assert oracle_loss(solution.value, torch.arange(6).expand(2, 6) < 3).isfinite()
    assert mean_field(utility, elements, gains=Enumerated(), iteration=Damped(0.05), stop=Stop(1000)).converged.all()


def test_the_loss_is_the_cross_entropy_of_the_choice():
    logits, chosen = torch.randn(3, 5), torch.rand(3, 5) < 0.5
    psi = torch.sigmoid(logits)
    wanted = -(torch.where(chosen, psi, 1 - psi).log().sum(-1)).mean()
    torch.testing.assert_close(oracle_loss(logits, chosen), wanted)
    some = torch.rand(3, 5) < 0.5
    wanted = -(torch.where(chosen, psi, 1 - psi).log() * some).sum(-1).mean()
    torch.testing.assert_close(oracle_loss(logits, chosen, some), wanted)
    assert oracle_loss(torch.full((1, 2), 1e4), torch.tensor([[True, False]])).isfinite()


X = torch.randn(2, 4, 3)
SOME = torch.tensor([[True, False, False, False]] * 2)
PAIR = torch.tensor([[True, True, False, False]] * 2)
PADDED = torch.tensor([[True] * 4, [True, False, False, False]])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: membership([[0, 4]], 4), "ids: set 0 has chosen 4, wanted positions 0 to 3"),
    (lambda: membership([[1], [-1]], 4), "ids: set 1 has chosen -1"),
    (lambda: membership([[1, 1]], 4), "ids: set 0 names an element twice"),
    (lambda: check_offer(X, SOME.float()), "chosen: got torch.float32"),
    (lambda: check_offer(X, PAIR, PAIR), "chosen: set 0 has chosen all that is offered"),
    (lambda: check_offer(X, ~SOME, PADDED), "chosen: set 1 has chosen elements that are not offered"),
    (lambda: check_offer(X, torch.zeros_like(SOME)), "chosen: set 0 has chosen nothing"),
    (lambda: check_offer(X, torch.ones_like(SOME)), "chosen: set 0 has chosen all that is offered"),
    (lambda: check_offer(X, SOME, PADDED), "elements: offer 1 has one element"),
    (lambda: check_offer(X[:, :1], SOME[:, :1]), "elements: offer 0 has one element"),
    (lambda: check_offer(X / 0 * 0, SOME), "elements: 8 of 8 have features that are NaN"),
    (lambda: mean_field(small()[0], torch.full((1, 3, 3), torch.nan)), "elements: 3 of 3 have features that are NaN"),
    (lambda: mean_field(small()[0], X, mask=SOME[0]), "mask: got torch.bool .4,., wanted torch.bool .2, 4."),
    (lambda: mean_field(small()[0], torch.randn(17, 3), gains=Enumerated()), "elements: got an offer of 17"),
    (lambda: mean_field(small()[0], X, scale=L2(-1.0)), r"scale: got L2\(norm=-1.0\), wanted a positive finite number"),
    (lambda: mean_field(small()[0], X, scale=Constant(float("nan"))), "scale: got Constant"),
    (lambda: Drawn(1), "samples: got 1, wanted at least 2 for 'score'"),
    (lambda: Drawn(5, "exact"), "derivative: got 'exact'"),
    (lambda: Smoothed(0), "samples: got 0"),
    (lambda: mean_field(small()[0], X.double(), gains=Drawn(1, "differences"), scale=Nuclear()), "samples: got 1 draw with"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
