"""Bias, variance and direction of every gradient through a k-subset, on toys whose truth is enumerated.

    python -m benchmarks.estimators [--full]

n = 10, k = 5, logits from N(0, 1); the cost is the paper's ||z - b||^2 (linear on zeros and ones), a pairwise quadratic
z'Az, a tanh network, or noise: a random number for each subset, for which surrogates are useless. Figures are means over
instances; the error is the mean of 1 - cos with the true gradient at 32 evaluations of f. What a useless surrogate costs is
measured at 16 evaluations, too, and in the worst instance.

Reference: Wijk, Vinuesa, Azizpour 2025, "SFESS", section 4.1.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import report, table
from distset.expect import (
    IMLE,
    NCPSS,
    AdaptiveTarget,
    Estimator,
    FixedTarget,
    GumbelSoftmax,
    LeaveOneOut,
    NoBaseline,
    Past,
    Ridge,
    ScoreFunction,
    Simple,
    StraightThrough,
    Tangent,
    expect,
)
from distset.metrics import estimator_error
from distset.subsets import KSubset, gumbel_top_k

N, K, S, WARM_UP = 10, 5, 32, 50
Cost = Callable[[Tensor], Tensor]
SUBSETS = torch.tensor([[float(i in chosen) for i in range(N)] for chosen in itertools.combinations(range(N), K)]).double()
CODES = 2 ** torch.arange(N, dtype=torch.float64)


def costs(instance: int) -> tuple[Tensor, dict[str, Cost]]:
    """Logits and the four costs of an instance."""
    generator = torch.Generator().manual_seed(instance)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, b, A = randn(N), randn(N), randn(N, N)
    W, c, v = 3 * randn(N, 16) / N**0.5, randn(16), randn(16)
    noise = randn(len(SUBSETS))
    place = torch.zeros(2**N, dtype=torch.int64)
    place[(SUBSETS @ CODES).long()] = torch.arange(len(SUBSETS))
    return logits, {
        "linear": lambda z: (z - b).square().sum(-1),
        "quadratic": lambda z: ((z @ A) * z).sum(-1),
        "tanh network": lambda z: torch.tanh(z @ W + c) @ v,
        "noise": lambda z: noise[place[(z @ CODES).long()]],
    }


def truth(logits: Tensor, f: Cost) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(((SUBSETS @ leaf).softmax(0) * f(SUBSETS)).sum(), leaf)[0]


def gradients(estimator: Estimator | None, logits: Tensor, f: Cost, rows: int, samples: int, seed: int) -> Tensor:
    """Independent gradients, ``(rows, N)``; None is the published estimator."""
    if estimator is None:
        return published_sfess(logits, f, rows, samples, seed)
    leaf = logits.expand(rows, N).clone().requires_grad_()
    if len(estimator.learned()):  # a strength or a slope is found in some steps
        for step in range(WARM_UP):
            few = leaf.detach()[:4].clone().requires_grad_()
            expect(f, KSubset(few, K), samples, grad=estimator, seed=step).sum().backward()
    expect(f, KSubset(leaf, K), samples, grad=estimator, seed=seed).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def published_sfess(logits: Tensor, f: Cost, rows: int, samples: int, seed: int) -> Tensor:
    """As released: Gumbel top-k samples, the mean of *all* samples as baseline, the right log-probability."""
    z = gumbel_top_k(logits.expand(rows, N), K, (samples,), generator=torch.Generator().manual_seed(seed))
    values = f(z)
    score = z - KSubset(logits, K).inclusion_probabilities()
    return ((values - values.mean(0)).unsqueeze(-1) * score).mean(0)


def estimators() -> dict[str, Estimator | None]:
    return {
        "published SFESS + VR": None,
        "score function": ScoreFunction(NoBaseline()),
        "  leave-one-out": ScoreFunction(LeaveOneOut()),
        "  cross-fitted ridge": ScoreFunction(Ridge()),
        "  cross-fitted slope + ridge": ScoreFunction(Tangent()),
        "  slope of past steps": ScoreFunction(Past(N)),
        "SIMPLE": Simple(),
        "straight-through": StraightThrough(),
        "GS, tau 0.5": GumbelSoftmax(0.5),
        "STGS, tau 0.5": GumbelSoftmax(0.5, hard=True),
        "I-MLE": IMLE(FixedTarget(1.0)),
        "I-MLE, adaptive": IMLE(AdaptiveTarget(step=0.05)),
        "NCPSS, tau 0.5": NCPSS(0.5),
    }


def measure(instances: int, rows: int) -> dict[tuple[str, str], Tensor]:
    """1 - cos, squared bias and variance (over the squared gradient), of each instance: ``(instances, 3)``."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for instance in range(instances):
        logits, functions = costs(instance)
        for cost, f in functions.items():
            right = truth(logits, f)
            for name, estimator in estimators().items():
                if cost == "noise" and (estimator is not None and estimator.needs_differentiable_f):
                    continue
                grads = gradients(estimator, logits, f, rows, S, instance)
                error = estimator_error(grads, right)
                scale = right.square().sum()
                figures = torch.tensor([error.cosine.value, error.bias_squared.value / scale, error.variance.value / scale])
                found.setdefault((cost, name), []).append(figures)
    return {key: torch.stack(values) for key, values in found.items()}


def rows_of(found: dict[tuple[str, str], Tensor]) -> list[dict[str, Any]]:
    rows = []
    for (cost, name), values in found.items():
        error, bias, variance = values.mean(0).tolist()
        estimator = estimators()[name]
        row: dict[str, Any] = {"cost": cost, "estimator": name, "1 - cos": error}
        row |= {"bias^2 / |g|^2": bias, "variance / |g|^2": variance}
        row["exact samples"] = "yes" if estimator is not None and estimator.exact_samples else "no"
        row["unbiased"] = "yes" if estimator is not None and estimator.unbiased else "no"
        row["needs df/dz"] = "yes" if estimator is not None and estimator.needs_differentiable_f else "no"
        rows.append(row)
    return rows


def bias_scores(draws: int) -> dict[int, float]:
    """How many standard errors the worst coordinate of the default estimator's mean is off, by N samples a gradient."""
    logits, functions = costs(0)
    f = functions["tanh network"]
    scores = {}
    for samples in (1, 2, 4, 8, 16, 32):
        grads = gradients(ScoreFunction(), logits, f, draws // samples, samples, 1)
        scores[samples] = float(((grads.mean(0) - truth(logits, f)) / (grads.std(0) / len(grads) ** 0.5)).abs().max())
    return scores


def useless(rows: int, instances: int = 20) -> list[dict[str, Any]]:
    """Variance of the default over leave-one-out's where a surrogate explains nothing, on the same samples.

    The worst instance is found by ``rows`` gradients and measured again by ten times as many others.
    """
    noises = [(logits, functions["noise"]) for logits, functions in map(costs, range(instances))]
    table = []
    for samples in (16, S):
        ratios, errors = torch.tensor([variance_ratio(*noise, rows, samples, i) for i, noise in enumerate(noises)]).T
        worst, error = variance_ratio(*noises[int(ratios.argmax())], 10 * rows, samples, instances)
        mean = {"mean": float(ratios.mean()), "error of the mean": float(errors.norm() / instances)}
        table.append({"N": samples, **mean, "worst instance": worst, "error of the worst": error})
    return table


def variance_ratio(logits: Tensor, f: Cost, rows: int, samples: int, seed: int) -> tuple[float, float]:
    """And its standard error, by the delta method over paired gradients."""
    ours, theirs = (
        (grads - grads.mean(0)).square().sum(-1)
        for baseline in (Ridge(), LeaveOneOut())
        for grads in [gradients(ScoreFunction(baseline), logits, f, rows, samples, seed)]
    )
    ratio = ours.mean() / theirs.mean()
    return float(ratio), float((ours - ratio * theirs).std() / rows**0.5 / theirs.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--full", action="store_true", help="100 instances of 400 gradients instead of 20 of 100, four times the noise"
    )
    full = parser.parse_args().full
    torch.set_num_threads(1)
    found = measure(*((100, 400) if full else (20, 100)))
    table(rows_of(found), title=f"gradients at {S} evaluations, n = {N}, k = {K}")
    scores = bias_scores(100_000)
    table(
        [{"N": n, "worst coordinate, standard errors": score} for n, score in scores.items()],
        title="bias of ScoreFunction()",
    )
    ratios = useless(1600 if full else 400)
    table(ratios, title="variance over leave-one-out's, noise; errors are standard errors")
    error = {(cost, name.strip()): float(values[:, 0].mean()) for (cost, name), values in found.items()}
    figures = {f"{cost}: {name}": value for (cost, name), value in error.items()}
    bars = {
        "error of the default, quadratic": (error["quadratic", "cross-fitted ridge"], "<=", 0.075),
        "error of the default, tanh network": (error["tanh network", "cross-fitted ridge"], "<=", 0.055),
        "bias in standard errors, N = 1 to 32": (max(scores.values()), "<=", 4),
    }
    for row in ratios:
        bars[f"variance over leave-one-out, useless surrogate, N = {row['N']}"] = (row["mean"], "<=", 1.05)
        bars[f"the same, worst of 20 instances, N = {row['N']}"] = (row["worst instance"], "<=", 1.05)
    return report("estimators", figures, bars)


if __name__ == "__main__":
    raise SystemExit(main())
