"""Learning which k of n features matter where n fits no rival: features on Ray actors, one logit each, black-box losses.

    python -m benchmarks.large_choice [--full]

A made regression: k of n features hold a noisy copy of the response each, and the loss of a subset is that of answering with
its mean. Every step draws exact k-subsets, evaluates them where the features are, and takes a step along the leave-one-out
score function (`expect_chunked`), scaled to a mean length. 300 of 100,000 in one process (a minute); ``--full``: 1,000 of
1,000,000 on two actors (a quarter of an hour on two cores). Figures: the share of the support among the k largest logits,
what a step sends, and what the samples would take as relaxed masks, of which rivals keep several.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import report, table
from distset import InMemory
from distset.expect import expect_chunked
from distset.sets import Chunk, ChunkedSet
from distset.states import Sum
from distset.subsets import ChunkedKSubset, LogitTable

RATE = 0.1


class Regression:
    """``k`` of ``n`` features hold a noisy copy of the response each; the loss of answering by the mean of the chosen."""

    def __init__(self, n: int, k: int, examples: int = 64, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.support = torch.randperm(n, generator=generator)[:k]
        response = torch.randn(examples, generator=generator)
        self.response = response / response.square().mean().sqrt()
        self.features = noise * torch.randn(n, examples, generator=generator)
        self.features[self.support] += self.response

    def loss(self, features: ChunkedSet, chosen: Tensor) -> Tensor:
        answer = features.merge(chosen_sum, chosen).total / chosen.shape[-1]
        return (answer - self.response).square().mean(-1)

    def found(self, positions: Tensor) -> float:
        """The share of the positions that are in the support."""
        return float(torch.isin(positions, self.support).float().mean())


def chosen_sum(chunk: Chunk, chosen: Tensor) -> Sum:
    """The sum of the chosen features, ``(S, m)``, of those of the chunk; runs where the features are."""
    total = chunk.elements.new_zeros(len(chosen), chunk.elements.shape[-1])
    sample, place = ((chosen >= chunk.start) & (chosen < chunk.start + chunk.size)).nonzero().unbind(-1)
    total.index_add_(0, sample, chunk.elements[chosen[sample, place] - chunk.start])
    return Sum(total, torch.tensor(float(chunk.size)))


def learn(
    features: ChunkedSet, made: Regression, *, samples: int, steps: int, rate: float = RATE, bar: bool = False
) -> list[dict[str, float]]:
    """What is known after each step: the mean loss of the samples, and the support's share in the k largest logits."""
    k = len(made.support)
    logits, records = torch.zeros(len(features)), []
    for step in tqdm(range(steps), disable=None if bar else True, unit="step"):
        subset = ChunkedKSubset(features, k, logits=LogitTable(logits))
        estimate = expect_chunked(lambda chosen: made.loss(features, chosen), subset, samples, seed=step)
        scale = estimate.gradient.abs().mean().clamp_min(1e-12)
        logits.index_add_(0, estimate.positions, (-rate * estimate.gradient / scale).float())
        records.append({"step": step, "loss": float(estimate.value), "found": made.found(logits.topk(k).indices)})
    return records


def on_actors(stack: ExitStack, features: InMemory) -> tuple[ChunkedSet, Any]:
    """The same set on two actors, and its crew."""
    import ray

    from distset.cluster.ray_set import RaySet
    from distset.cluster.set_actors import SetActors

    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    stack.callback(ray.shutdown)
    crew = stack.enter_context(SetActors(2, num_cpus=0.5))
    return RaySet(features, crew), crew


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="1,000 of 1,000,000 features on two actors")
    parser.add_argument("--steps", type=int, help="280 unless told, --full: 500")
    args = parser.parse_args()
    n, k, samples, steps = (1_000_000, 1000, 128, 500) if args.full else (100_000, 300, 64, 280)
    torch.set_num_threads(1)
    made = Regression(n, k)
    memory = InMemory(made.features, 50_000)
    with ExitStack() as stack:
        features, crew = on_actors(stack, memory) if args.full else (memory, None)
        start = time.perf_counter()
        records = learn(features, made, samples=samples, steps=args.steps or steps, bar=True)
        seconds = time.perf_counter() - start
        sent = (crew.traffic.up + crew.traffic.down) / len(records) if crew else 0.0
    marks = sorted({0, len(records) - 1, *range(0, len(records), max(1, len(records) // 8))})
    table([records[mark] for mark in marks], title=f"{k:,} of {n:,} features, {samples} samples a step")
    figures = {
        "seconds a step": seconds / len(records),
        "MB sent a step": sent / 1e6,
        "loss at the end": records[-1]["loss"],
        "GB of float32 for the samples as relaxed masks": 4e-9 * samples * n,
    }
    return report("large_choice", figures, {"share of the support found": (records[-1]["found"], ">=", 0.8)})


if __name__ == "__main__":
    raise SystemExit(main())
