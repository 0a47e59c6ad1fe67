"""Exact samples of k-subsets a second, against Gumbel top-k, which is not exact.

    python -m benchmarks.sampling [--full]

On one thread; set-up (tilt, tree or table) is timed apart, as a distribution is made once and sampled often.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.report import report, table
from benchmarks.timing import best_times
from distset.subsets import KSubset, gumbel_top_k

# batch, n, k, samples
CASES = [
    (128, 784, 50, 32),
    (1, 784, 50, 32),
    (256, 10, 5, 32),
    (2560, 20, 10, 1),
    (1, 100_000, 1000, 32),
    (1, 1_000_000, 1000, 1),
]
LONG = [(1, 1_000_000, 500_000, 1), (1, 10_000_000, 1000, 1)]


def measure(batch: int, n: int, k: int, samples: int) -> dict[str, Any]:
    logits = torch.randn(batch, n, generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    subset = KSubset(logits, k)
    subset.sample((1,), seed=0)
    setup = time.perf_counter() - begin
    seconds = best_times(
        {
            "exact": lambda: subset.sample((samples,), seed=1),
            "gumbel": lambda: gumbel_top_k(logits, k, (samples,)),
        },
        rounds=7,
        seconds=20,
    )
    return {
        "batch": batch, "n": n, "k": k, "samples": samples, "set-up ms": setup * 1e3, "exact ms": seconds["exact"] * 1e3,
        "Gumbel ms": seconds["gumbel"] * 1e3, "ratio": seconds["exact"] / seconds["gumbel"],
        "exact samples/s": batch * samples / seconds["exact"],
    }  # fmt: skip


def bars(rows: list[dict[str, Any]]) -> dict[str, tuple[float, str, float]]:
    ratio = {(row["batch"], row["n"], row["k"], row["samples"]): row["ratio"] for row in rows}
    return {
        "(784, 50) x 32 x batch 128": (ratio[128, 784, 50, 32], "<=", 5),
        "(10^6, 10^3) x 1": (ratio[1, 1_000_000, 1000, 1], "<=", 5),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="also half of 10^6, and 10^7 elements")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    rows = [measure(*case) for case in CASES + (LONG if full else [])]
    table(rows, title="exact sampling against Gumbel top-k")
    figures = {f"ratio at batch {row['batch']}, ({row['n']}, {row['k']}) x {row['samples']}": row["ratio"] for row in rows}
    return report("sampling", figures, bars(rows))


if __name__ == "__main__":
    raise SystemExit(main())
