"""Log-normaliser of k-subsets and its gradient: tilted quadrature, the published DFT formula, the recursion.

    python -m benchmarks.normalizer [--full]

Logits are standard normal, as in the published experiments, so that k is far from the untilted mean. Errors are against a
recursion in 80-bit extended precision: the value's relative, the gradient's the largest of all elements, beyond n = 10^4 of
201 from the highest logit to the lowest. Times are of value and gradient together, on one thread; memory is the most that
tensors take at one time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from benchmarks.memory import peak_bytes
from benchmarks.report import report, table
from distset.subsets import KSubset

SIZES = [(10, 5), (100, 10), (784, 50), (10_000, 100), (100_000, 1000), (1_000_000, 1000)]
ALL = 10_000  # elements up to which every one's gradient is compared
Result = tuple[Tensor, Tensor]


def ours(logits: Tensor, k: int) -> Result:
    leaf = logits.clone().requires_grad_()
    value = KSubset(leaf, k).log_normalizer()
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def published_dft(logits: Tensor, k: int) -> Result:
    """log P(K = k) of the untilted count by an (n + 1)-point DFT in complex64, as published; plus the sum of softplus."""
    leaf = logits.clone().requires_grad_()
    n = len(leaf)
    p = torch.sigmoid(leaf).unsqueeze(-1).to(torch.complex64)
    nodes = torch.exp(2j * math.pi * torch.arange(n + 1) / (n + 1)).to(torch.complex64)
    count_pmf = torch.fft.fft(torch.prod(p * nodes + (1 - p), 0), norm="forward").real
    value = count_pmf[k].clamp_min(torch.finfo(torch.float32).eps).log() + torch.nn.functional.softplus(leaf).sum()
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def recursion(logits: Tensor, k: int) -> Result:
    """log e_k by the recursion over elements in log space, by autograd: O(n k) in time and memory."""
    leaf = logits.clone().requires_grad_()
    row = torch.cat([torch.zeros(1), torch.full((k,), -1e30)])  # at -inf, logaddexp has no gradient
    for x in leaf:
        row = torch.cat([row[:1], torch.logaddexp(row[1:], row[:-1] + x)])
    (grad,) = torch.autograd.grad(row[k], leaf)
    return row[k].detach(), grad


class Truth(NamedTuple):
    """log e_k, and the inclusion probabilities of the elements ``some``."""

    value: float
    some: np.ndarray
    pi: np.ndarray


def extended(logits: Tensor, k: int) -> Truth:
    r"""By the recursion in 80-bit floating point, tilted so that k are expected, from both ends: O(n k) in time.

    .. math:: \pi_i = p_i \sum_j P(j \text{ of those before } i)\, P(k - 1 - j \text{ of those after}) / P(K = k)

    Any tilt is right, but far from this one P(K = k) is less than the least number of this precision.
    """
    theta = logits.double().numpy()
    tilt = np.longdouble(brentq(lambda t: expit(theta + t).sum() - k, -50, 50))
    order, theta = np.argsort(-theta), theta.astype(np.longdouble)
    p, q = 1 / (1 + np.exp(-theta - tilt)), 1 / (1 + np.exp(theta + tilt))
    n = len(theta)
    some = np.sort(order if n <= ALL else order[np.linspace(0, n - 1, 201).astype(int)])
    before, whole = counts_before(p, q, k, some)
    after, _ = counts_before(p[::-1], q[::-1], k, n - 1 - some[::-1])
    pi = p[some] * (before[:, :k] * after[::-1, k - 1 :: -1][:, :k]).sum(-1) / whole
    value = np.log1p(np.exp(theta + tilt)).sum() + np.log(whole) - k * tilt
    return Truth(float(value), some, pi.astype(np.float64))


def counts_before(p: np.ndarray, q: np.ndarray, k: int, places: np.ndarray) -> tuple[np.ndarray, Any]:
    """P(j chosen before an element) for j up to k, ``(places, k + 1)`` of ascending places; P(k chosen of all)."""
    pmf, kept = np.zeros(k + 1, np.longdouble), np.empty((len(places), k + 1), np.longdouble)
    pmf[0], row = 1, 0
    for i, (yes, no) in enumerate(zip(p, q)):
        if row < len(places) and places[row] == i:
            kept[row] = pmf
            row += 1
        pmf[1:] = pmf[1:] * no + pmf[:-1] * yes
        pmf[0] *= no
    return kept, pmf[k]


def timed(run: Callable[[], Result], rounds: int) -> tuple[Result, float]:
    best, found = math.inf, None
    for _ in range(rounds):
        begin = time.perf_counter()
        found = run()
        best = min(best, time.perf_counter() - begin)
    assert found is not None
    return found, best


def standard_normal(n: int) -> Tensor:
    """float32 logits: every method gets the same numbers."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def row_of(
    name: str, method: Callable[[Tensor, int], Result], dtype: torch.dtype, n: int, k: int, truth: Truth | None
) -> dict[str, Any]:
    logits = standard_normal(n).to(dtype)
    memory = peak_bytes(lambda: method(logits, k)) / 2**20
    (value, grad), seconds = timed(lambda: method(logits, k), rounds=3 if name == "ours" else 1)
    row: dict[str, Any] = {"method": name, "n": n, "k": k, "ms": seconds * 1e3, "MiB": memory}
    if truth is not None:
        row["value error"] = abs(float(value) - truth.value)
        row["relative"] = row["value error"] / abs(truth.value)
        row["gradient error"] = float(np.abs(grad.double().numpy()[truth.some] - truth.pi).max())
        row["sum of gradient / k"] = float(grad.double().sum() / k)
    return row


def measure(full: bool) -> list[dict[str, Any]]:
    rows = []
    for n, k in SIZES:
        truth = extended(standard_normal(n), k) if full or n <= 100_000 else None
        rows.append(row_of("ours", ours, torch.float64, n, k, truth))
        rows.append(row_of("ours, float32", ours, torch.float32, n, k, truth))
        if n <= 10_000:
            rows.append(row_of("published DFT", published_dft, torch.float32, n, k, truth))
        if n <= (10_000 if full else 784):
            rows.append(row_of("recursion", recursion, torch.float32, n, k, truth))
    return rows


def time_by_k(n: int) -> dict[int, float]:
    logits = standard_normal(n).double()
    return {k: timed(lambda k=k: ours(logits, k), rounds=5)[1] for k in (10, 100, 1000, n // 10, n // 2)}  # type: ignore[misc]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="truth up to 10^6 (a minute), the recursion up to 10^4")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    rows = measure(full)
    table(rows, title="value and gradient, logits from N(0, 1)")
    by_k = time_by_k(100_000)
    table([{"k": k, "ms": seconds * 1e3} for k, seconds in by_k.items()], title="n = 100,000: time whatever k")
    found = {(row["method"], row["n"]): row for row in rows}
    mine, dft = found["ours", 10_000], found["published DFT", 10_000]
    big, digits = found["ours", 100_000], found["published DFT", 784]
    exact = [row for row in rows if row["method"] == "ours" and "value error" in row]
    figures = {
        "largest relative error of the value": max(row["relative"] for row in exact),
        "largest gradient error": max(row["gradient error"] for row in exact),
        "DFT value error at (784, 50)": digits["value error"],
        "DFT sum of gradient / k at (784, 50)": digits["sum of gradient / k"],
        "times faster than DFT at 10^4": dft["ms"] / mine["ms"],
        "times less memory than DFT at 10^4": dft["MiB"] / mine["MiB"],
        "ms at (10^5, 10^3)": big["ms"],
        "MiB at (10^5, 10^3)": big["MiB"],
        "ms at (10^6, 10^3)": found["ours", 1_000_000]["ms"],
        "slowest over fastest k at 10^5": max(by_k.values()) / min(by_k.values()),
    }
    bars = {
        "relative error of the value": (figures["largest relative error of the value"], "<=", 1e-14),
        "gradient error": (figures["largest gradient error"], "<=", 1e-13),
        "faster than the DFT at 10^4": (figures["times faster than DFT at 10^4"], ">=", 300),
        "less memory than the DFT at 10^4": (figures["times less memory than DFT at 10^4"], ">=", 100),
        "(10^5, 10^3) ms": (figures["ms at (10^5, 10^3)"], "<=", 50),
        "(10^5, 10^3) MiB": (figures["MiB at (10^5, 10^3)"], "<=", 100),
        "10^6 ms": (figures["ms at (10^6, 10^3)"], "<=", 1000),
        "time whatever k": (figures["slowest over fastest k at 10^5"], "<=", 2),
    }
    return report("normalizer", figures, bars)


if __name__ == "__main__":
    raise SystemExit(main())
