"""Each noise has the distribution that it names."""

import pickle

import numpy as np
import pytest
import scipy.stats
import torch

from distset.noise import Fading, Gumbel, Normal, SumOfGamma, TwoPoint, Uniform
from distset.perturb_and_map import PerturbAndMap
from distset.solve import Identity
from distset.task import PacedTask
from distset.tasks.globe_tsp import globe_task
from distset.tasks.keypoints import matching_task
from distset.tasks.retrieval import retrieval_task
from distset.tasks.subset_vae import subset_vae_task
from distset.tasks.terrain import terrain_task

ALL = [Gumbel(0.7), SumOfGamma(5), TwoPoint(0.4), Uniform(0.4), Normal(0.3)]


def draw(noise, shape, seed=0, dtype=torch.float64):
    return noise.sample(shape, torch.Generator().manual_seed(seed), dtype)


@pytest.mark.parametrize("noise", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_seed_names_the_draw(noise, dtype):
    first, again, other = (draw(noise, (50, 4), seed, dtype) for seed in (1, 1, 2))
    assert first.dtype == dtype
    assert first.shape == (50, 4)
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("noise", ALL, ids=repr)
def test_global_randomness_is_left_alone(noise):
    before = torch.get_rng_state()
    draw(noise, (10,))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(draw(pickle.loads(pickle.dumps(noise)), (10,)), draw(noise, (10,)))


@pytest.mark.parametrize(
    ("noise", "law"),
    [
        (Gumbel(0.7), scipy.stats.gumbel_r(scale=0.7)),
        (Uniform(0.4), scipy.stats.uniform(-0.2, 0.4)),
        (Normal(0.3), scipy.stats.norm(scale=0.3)),
    ],
    ids=["Gumbel", "Uniform", "Normal"],
)
def test_kolmogorov_smirnov(noise, law):
    assert scipy.stats.kstest(draw(noise, (50_000,)).numpy(), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("k", [1, 3, 10])
def test_k_sums_of_gamma_add_up_to_a_gumbel(k):
    # With s terms the sum lacks the tail of the series: about 1 / (2 s) in mean and 1 / s in variance.
    total = draw(SumOfGamma(k, scale=0.7, terms=400), (10_000, k)).sum(-1).numpy()
    assert scipy.stats.kstest(total, scipy.stats.gumbel_r(scale=0.7).cdf).pvalue > 1e-3


def test_argmax_of_gumbel_perturbed_logits_is_a_categorical_draw():
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0], dtype=torch.float64)
    picked = (logits + draw(Gumbel(), (40_000, 4))).argmax(-1)
    counts = np.bincount(picked.numpy(), minlength=4)
    assert scipy.stats.chisquare(counts, 40_000 * logits.softmax(-1).numpy()).pvalue > 1e-3


def test_two_points_are_half_the_width_away():
    values = draw(TwoPoint(0.4), (10_000,))
    assert set(values.tolist()) == {-0.2, 0.2}
    assert abs(values.mean()) < 4 * 0.2 / 100


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Gumbel(0.0), "scale"),
        (lambda: Gumbel(float("inf")), "scale"),
        (lambda: SumOfGamma(0), "k"),
        (lambda: SumOfGamma(2.5), "k"),
        (lambda: SumOfGamma(True), "k"),
        (lambda: SumOfGamma(torch.tensor([2, 0])), "k"),
        (lambda: SumOfGamma(torch.tensor([2.0, 1.5])), "k"),
        (lambda: SumOfGamma(torch.tensor([2.0, torch.nan])), "k"),
        (lambda: SumOfGamma(3, terms=0), "terms"),
        (lambda: SumOfGamma(3, terms=2.5), "terms"),
        (lambda: Fading(0.2), "noise"),
        (lambda: Fading(TwoPoint), "noise"),
        (lambda: SumOfGamma(3, scale=-1.0), "scale"),
        (lambda: TwoPoint(-0.1), "width"),
        (lambda: Uniform(float("nan")), "width"),
        (lambda: Normal(-1.0), "scale"),
    ],
)
def test_wrong_parameters_are_named(make, name):
    with pytest.raises(ValueError, match=rf"^{name}: got .* wanted"):
        make()


@pytest.mark.parametrize(
    ("noise", "law"),
    [(Gumbel(0.7), scipy.stats.gumbel_r(scale=0.7)), (Normal(0.3), scipy.stats.norm(scale=0.3))],
    ids=["Gumbel", "Normal"],
)
def test_score_is_the_slope_of_the_log_density(noise, law):
    at, step = np.linspace(-1, 2, 31), 1e-5
    slope = (law.logpdf(at + step) - law.logpdf(at - step)) / (2 * step)
    np.testing.assert_allclose(noise.score(torch.tensor(at)).numpy(), -slope, atol=1e-7)


def test_noise_without_a_density_has_no_score():
    with pytest.raises(ValueError, match="no smooth density, wanted Normal or Gumbel"):
        TwoPoint(0.2).score(torch.zeros(3))


def test_fading_noise_is_the_noise_times_what_is_left():
    margin = Fading(TwoPoint(0.4), over=0.8)
    for share, left in ((0.0, 1.0), (0.2, 0.75), (0.6, 0.25), (0.8, 0.0), (0.99, 0.0)):
        margin.progress(share)
        torch.testing.assert_close(draw(margin, (5, 3)), left * draw(TwoPoint(0.4), (5, 3)))
    for over in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"over: got .*, wanted a share"):
            Fading(TwoPoint(0.4), over)


@pytest.mark.parametrize(
    "make",
    [
        lambda grad: globe_task(size=(20, 40), grad=grad),
        lambda grad: terrain_task(grad=grad),
        lambda grad: matching_task(n=3, grad=grad),
        lambda grad: retrieval_task(shape=(1, 28, 28), grad=grad),
        lambda grad: subset_vae_task(16, 4, subsets=2, size=4, k=2, grad=PerturbAndMap(grad)),
    ],
    ids=["globe", "terrain", "keypoints", "retrieval", "subset VAE"],
)
def test_a_margin_fades_in_every_task(make):
    margin = Fading(TwoPoint(0.2), over=0.5)
    task = make(Identity(margin=margin))
    assert isinstance(task, PacedTask)
    task.progress(0.25)
    assert margin.strength == 0.5
