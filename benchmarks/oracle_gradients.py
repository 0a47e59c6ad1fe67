"""What the gradient of an optimal-subset oracle is, and what the published forms of it are: errors against enumeration.

    python -m benchmarks.oracle_gradients [--full]

Random utilities on offers of 8, all 256 subsets enumerated in float64; the exact gradient of the oracle's loss at the
fixed point is the implicit one with a dense solve (equal to finite differences in the tests).
"""

from __future__ import annotations

import argparse
import math
import warnings

import torch
from torch import Tensor, nn

from benchmarks.report import report, table
from distset.fixed_point import Damped, Implicit, OneStep, Plain, Status, Stop, Unrolled
from distset.gains import Drawn, Enumerated, Smoothed
from distset.krylov import Dense
from distset.mean_field import Constant, field_step, mean_field, oracle_loss
from distset.set_functions import SumUtility, UserUtility

SIZE = 8
TIGHT = Stop(3000, 1e-10, 1e-10)


def problem(seed: int, strength: float) -> tuple[SumUtility, Tensor, Tensor]:
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    utility = SumUtility(nn.Linear(3, 4), head).double()
    with torch.no_grad():
        head[2].weight.mul_(strength)
    return utility, torch.randn(1, SIZE, 3, dtype=torch.float64), torch.arange(SIZE).unsqueeze(0) < 3


def gradient(case: tuple[SumUtility, Tensor, Tensor], gains, grad, **how) -> Tensor:
    utility, elements, chosen = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = mean_field(utility, elements, gains=gains, grad=grad, **how).value
        parts = torch.autograd.grad(oracle_loss(value, chosen), list(utility.parameters()))
    return torch.cat([part.flatten() for part in parts])


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def strategies(cases: int) -> list[dict[str, float | str]]:
    """The error of each strategy with exact gains, as the coupling grows; at the fixed point, or after K steps."""
    rows = []
    for strength in (0.5, 2.0, 8.0):
        errors: dict[str, list[float]] = {}
        for seed in range(cases):
            case = problem(seed, strength)
            solved = {"iteration": Damped(0.3), "stop": TIGHT}
            exact = gradient(case, Enumerated(), Implicit(Dense()), **solved)
            tries = {
                "Implicit()": gradient(case, Enumerated(), Implicit(), **solved),
                "OneStep()": gradient(case, Enumerated(), OneStep(), **solved),
                "Unrolled(5)": gradient(case, Enumerated(), Unrolled(5)),
                "published": gradient(case, HardEnumerated(), Implicit(Dense()), **solved),
            }
            for name, found in tries.items():
                errors.setdefault(name, []).append(relative(found, exact))
        rows.append({"strength of F": strength} | {name: sum(e) / len(e) for name, e in errors.items()})
    return rows


class HardEnumerated(Enumerated):
    """Exact values with the published derivative: hard draws pass no gradient to psi, however many there are."""

    def start(self, utility, elements, mask, generator=None):
        exact = super().start(utility, elements, mask, generator)
        return lambda logits: exact(logits.detach())


def estimators(cases: int) -> list[dict[str, float | str]]:
    """The error of the implicit gradient where only its derivative in psi is estimated: at the exact fixed point."""
    rows = []
    for name, make in {
        "Drawn(m, 'score')": lambda m: Drawn(m, "score"),
        "Drawn(m, 'differences')": lambda m: Drawn(m, "differences"),
        "Smoothed(m)": Smoothed,
    }.items():
        row: dict[str, float | str] = {"estimator": name}
        for m in (5, 20, 100):
            errors = []
            for seed in range(cases):
                case = problem(seed, 4.0)
                solved = {"iteration": Damped(0.3), "stop": TIGHT}
                exact = gradient(case, Enumerated(), Implicit(Dense()), **solved)
                mixed = gradient(case, SlopeOf(make(m), seed), Implicit(Dense()), **solved)
                errors.append(relative(mixed, exact))
            row[f"m = {m}"] = sum(errors) / cases
        rows.append(row)
    return rows


class SlopeOf(Enumerated):
    """Exact gains in value and in the parameters, an estimator's derivative in psi."""

    def __init__(self, estimator, seed: int) -> None:
        self.estimator, self.seed = estimator, seed

    def start(self, utility, elements, mask, generator=None):
        exact = super().start(utility, elements, mask)
        other = self.estimator.start(utility, elements, mask, torch.Generator().manual_seed(self.seed))

        def gains(logits: Tensor):
            found, noisy = exact(logits.detach()), other(logits).mean
            if not logits.requires_grad:
                return found
            # Only the slope in psi is taken: the parameters' own gradient of the estimator is subtracted again.
            slope = noisy - other(logits.detach()).mean
            return found._replace(mean=found.mean + slope - slope.detach())

        return gains


def published_scaling() -> dict[str, float]:
    """2 / (n |g|) with the norm over the batch: how far psi gets from 0.5, and what the loss then is."""
    torch.manual_seed(0)
    utility = SumUtility(nn.Linear(2, 16), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)))
    elements, chosen = torch.randn(128, 100, 2), torch.arange(100).expand(128, 100) < 10
    with torch.no_grad():
        gains = field_step(utility, elements, gains=Drawn(5), scale=Constant())(torch.zeros(128, 100))
        psi = torch.sigmoid(2 / (100 * torch.linalg.norm(gains, ord=2)) * gains)
    counted = torch.arange(100).expand(128, 100) < 20  # |S*| negatives, as published
    loss = oracle_loss(torch.logit(psi), chosen, counted)
    return {"published psi, largest distance to 0.5": float((psi - 0.5).abs().max()),
            "published loss / (2 |S*| ln 2)": float(loss) / (20 * math.log(2))}  # fmt: skip


def cycles(cases: int) -> dict[str, float]:
    """A utility with a preferred size: how often the plain map runs in a cycle of 2, and the damped one converges."""
    counts = {"plain": 0, "damped": 0}
    for seed in range(cases):
        torch.manual_seed(seed)
        wish, elements = 2 + 4 * torch.rand(()), torch.zeros(1, SIZE, 1)
        utility = UserUtility(lambda x, s, wish=wish: -1.5 * (s.sum(-1) - wish) ** 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = mean_field(utility, elements, gains=Enumerated(), iteration=Plain())
            damped = mean_field(utility, elements, gains=Enumerated(), iteration=Damped(0.1), stop=Stop(1000))
        counts["plain"] += int(plain.status.item() == Status.CYCLE and plain.period.item() == 2)
        counts["damped"] += int(damped.converged.item())
    return {f"{key}: share": count / cases for key, count in counts.items()}


def copula_marginal(draws: int = 200_000) -> dict[str, float]:
    """A marginal of 0.1 under the published copula, whose normal keeps its own variance d^2 + |u|^2."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(draws, generator=generator, dtype=torch.float64)
    found = {}
    for spread in (0.7, 1.0, 1.6):
        score = math.log(0.1 / 0.9) + torch.special.log_ndtr(spread * z) - torch.special.log_ndtr(-spread * z)
        found[f"a marginal of 0.1 drawn with a normal of spread {spread}"] = float((score > 0).double().mean())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="10 times as many utilities")
    cases = 100 if parser.parse_args().full else 10
    by_strategy, by_estimator = strategies(cases), estimators(cases)
    table(by_strategy, title="relative error of the gradient, exact gains")
    table(by_estimator, title="relative error of the implicit gradient, derivative in psi estimated from m draws")
    figures: dict[str, float] = {}
    for row in by_strategy:
        figures |= {f"strength {row['strength of F']}: {key}": value for key, value in list(row.items())[1:]}
    for row in by_estimator:
        figures |= {f"{row['estimator']}, {key}": value for key, value in list(row.items())[1:]}
    found = cycles(cases)
    figures |= {f"cycle of period 2, {key}" if "plain" in key else f"converged, {key}": v for key, v in found.items()}
    figures |= published_scaling() | copula_marginal()
    strongest = by_strategy[-1]
    return report(
        "oracle_gradients",
        figures,
        {
            "Implicit, largest relative error": (max(row["Implicit()"] for row in by_strategy), "<=", 1e-4),
            "published against OneStep (the same gradient)": (
                abs(strongest["published"] - strongest["OneStep()"]),
                "<=",
                1e-9,
            ),
            "published, relative error where F is strong": (strongest["published"], ">=", 0.04),
            "second differences at m = 100": (by_estimator[1]["m = 100"], "<=", 0.1),
            "published psi, largest distance to 0.5": (figures["published psi, largest distance to 0.5"], "<=", 0.01),
            "damped iteration converges": (found["damped: share"], ">=", 1.0),
        },
    )


if __name__ == "__main__":
    raise SystemExit(main())
