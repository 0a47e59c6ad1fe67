"""What Ray Train and `fit` add to a training step.

    python -m benchmarks.overhead [--full]

The main job's model (UMBC, `Exact`) on sets of 10^5 elements: steps of `distset.train.fit` in one worker of Ray Train, steps
of `fit` in this process, and the same steps as a plain torch loop with nothing around it. The three take turns, so that a
busy machine is busy for all; medians of the steps after the first.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.report import report, table
from distset import Exact, InMemory, encode_set
from distset.cluster.config import Cluster
from distset.cluster.train import train_on_ray
from distset.optim import Optimisation
from distset.seeds import seed_for
from distset.tasks.bag_models import umbc
from distset.tasks.bags import BagTask
from distset.train import Example, Plan, Watch, Watches, fit

ELEMENTS, WIDTH, CHUNK = 100_000, 64, 4096


def bags(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    sets = [
        InMemory(torch.randn(ELEMENTS, WIDTH, generator=generator) + i % 2, CHUNK, name=f"bag-{i}") for i in range(count)
    ]
    return [Example(bag, i % 2) for i, bag in enumerate(sets)]


def task() -> BagTask:
    torch.manual_seed(0)
    return BagTask.of(*umbc(WIDTH, 1, slots=16, width=64, heads=4), classes=["no", "yes"], grad=Exact())


class Clock(Watch):
    """Seconds of every step, by the wall clock, as its process sees them."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: list[float] = []

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def fitted(steps: int, watch: Watch | None = None) -> list[float]:
    """Seconds of each step of `fit`; ``watch`` is told as well."""
    clock = Clock()
    plan = Plan(epochs=None, max_steps=steps, batch=1, log_every=10)
    fit(task(), bags(4), plan=plan, optimisation=Optimisation(), watch=Watches(clock, watch or Watch()))
    return clock.seconds[1:]


def on_ray(*, watch: Watch, device: torch.device, steps: int) -> list[float]:
    torch.set_num_threads(1)
    return fitted(steps, watch)


def plain(steps: int) -> list[float]:
    """The same steps, with nothing around them."""
    own, examples = task(), bags(4)
    optimiser = torch.optim.AdamW(own.model.parameters(), lr=1e-3)
    order = [index for epoch in range(steps) for index in Plan(batch=1).indices(epoch, 4)]
    seconds = []
    for step in range(steps):
        begin = time.perf_counter()
        example = examples[order[step]]
        z = encode_set(own.model.encoder, example.set, grad=Exact(), seed=seed_for(0, step))
        loss = F.binary_cross_entropy_with_logits(own.model.head(z), torch.tensor([float(example.target)]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def remote(steps: int) -> list[float]:
    process: Any = functools.partial(on_ray, steps=steps)
    return train_on_ray(process, Cluster(workers=1, cpus=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more steps and rounds")
    full = parser.parse_args().full
    steps, rounds = (40, 5) if full else (12, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"plain torch": [], "fit": [], "fit on Ray Train": []}
    for _ in range(rounds):
        found["plain torch"] += plain(steps)
        found["fit"] += fitted(steps)
        found["fit on Ray Train"] += remote(steps)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    base = medians["plain torch"]
    table(
        [{"loop": name, "ms a step": 1000 * value, "ratio": value / base} for name, value in medians.items()],
        title=f"{ELEMENTS:,} elements x {WIDTH}, chunks of {CHUNK:,}, one thread, median of {len(found['fit'])} steps",
    )
    ratios = {f"{name} / plain torch": value / base for name, value in medians.items() if name != "plain torch"}
    bars = {"fit on Ray Train / plain torch": (ratios["fit on Ray Train / plain torch"], "<=", 1.1)}
    raise SystemExit(report("overhead", ratios, bars))


if __name__ == "__main__":
    main()
