"""Peak memory and time of a training step as the set grows, from tensors and from disk.

    python -m benchmarks.memory [--full]

Each row runs in a process of its own. Memory is the peak of the process's anonymous memory during steps, above what it
held before the first one (pages of a memory-mapped file belong to the page cache); the elements of an in-memory set are
there before. Linux only: it reads /proc/self.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import report, table
from distset import UMBC, ChunkedSet, Exact, Features, Full, InMemory, Sampled, encode_set

WIDTH, CHUNK = 128, 8192
GRADS = {"exact": Exact(), "sampled": Sampled(1), "full": Full()}
FULL_LIMIT_MIB = 6000  # full autograd is not tried where it would need more


def status_mib(key: str) -> float:
    """What this process holds: ``"RssAnon"`` is anonymous memory, ``"VmRSS"`` all, ``"VmHWM"`` the most of all so far.

    Not ``ru_maxrss``, which a child begins with the peak of its parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this kernel does not report {key} in /proc/self/status")


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes of tensors on the CPU that a step has at one time beside what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    found: Any = watched.profiler
    changes = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def peak_of_anonymous_memory() -> Iterator[Callable[[], float]]:
    """Watch the process from a thread, about every millisecond; the peak above the start, in MiB."""
    start, peak, stop = status_mib("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], status_mib("RssAnon") - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(peak[0], status_mib("RssAnon") - start)
    finally:
        stop.set()
        thread.join()


def model() -> nn.Module:
    mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 128))
    return Features(mlp, UMBC(128, 64, residual=True))


def make_set(source: str, elements: int, store: str) -> ChunkedSet:
    if source == "tensor":
        return InMemory(torch.randn(elements, WIDTH), CHUNK)
    from distset.data import Store

    return Store(store).open(f"n{elements}", CHUNK)


def write_sets(path: Path, sizes: list[int]) -> None:
    from distset.data import Bag, write_store

    def bags() -> Iterator[Any]:
        for label, n in enumerate(sizes):
            generator = np.random.default_rng(n)
            yield Bag(
                f"n{n}", torch.from_numpy(generator.standard_normal((n, WIDTH), dtype=np.float32)), label=str(label % 2)
            )

    write_store(path, bags())


def measure(source: str, grad: str, elements: int, store: str, steps: int) -> dict[str, float]:
    """In the child: watch steps on the set, the first one with all that torch sets up for it."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    encoder, set_ = model(), make_set(source, elements, store)

    def step(on: ChunkedSet) -> None:
        encoder.zero_grad()
        encode_set(encoder, on, grad=GRADS[grad], seed=0).square().sum().backward()

    seconds = []
    with peak_of_anonymous_memory() as peak:
        for _ in range(steps):
            begin = time.perf_counter()
            step(set_)
            seconds.append(time.perf_counter() - begin)
        mib = peak()
    return {"mib": mib, "seconds": min(seconds)}


def run_child(source: str, grad: str, elements: int, store: str, steps: int) -> dict[str, float]:
    order = [sys.executable, "-m", "benchmarks.memory", "--child", source, grad, str(elements), store, str(steps)]
    # What glibc keeps for later would count as memory in use: tensors get pages of their own, given back when freed.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(order, capture_output=True, text=True, check=False, env=settings)
    if done.returncode:
        raise RuntimeError(f"{source}/{grad}/{elements} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sweep(sizes: list[int], store: str, steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for grad in GRADS:
        for source in ("tensor",) if grad == "full" else ("tensor", "disk"):
            for elements in sizes:
                last = rows[-1]["peak MiB"] * elements / rows[-1]["elements"] if rows else 0.0
                if grad == "full" and rows[-1]["gradient"] == "full" and last > FULL_LIMIT_MIB:
                    rows.append(
                        {"gradient": grad, "from": source, "elements": elements, "peak MiB": f"> {last:,.0f} (not run)"}
                    )
                    continue
                got = run_child(source, grad, elements, store, steps)
                rows.append(
                    {"gradient": grad, "from": source, "elements": elements, "peak MiB": got["mib"]}
                    | {"seconds": got["seconds"], "us an element": 1e6 * got["seconds"] / elements}
                )
    return rows


def figures_of(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, tuple[float, str, float]]]:
    figures: dict[str, Any] = {}
    bars: dict[str, tuple[float, str, float]] = {}
    for grad, source in (("exact", "tensor"), ("exact", "disk"), ("sampled", "tensor"), ("sampled", "disk")):
        mine = [row for row in rows if row["gradient"] == grad and row["from"] == source]
        small = next(row for row in mine if row["elements"] == 10_000)
        large = mine[-1]
        name = f"{grad} from {source}"
        figures[f"{name}: MiB at {large['elements']:,}"] = round(large["peak MiB"], 1)
        bars[f"{name}: memory at {large['elements']:,} / 10,000"] = (large["peak MiB"] / small["peak MiB"], "<=", 1.2)
        # A straight line: the time an element costs does not grow with the set (the smallest set carries fixed costs).
        slope = large["us an element"] / mine[-2]["us an element"]
        bars[f"{name}: time an element, largest / next"] = (slope, "<=", 1.25)
    return figures, bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="up to 4 x 10^6 elements, best of three steps")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        source, grad, elements, store, steps = args.child
        print(json.dumps(measure(source, grad, int(elements), store, int(steps))))
        return 0
    sizes = [10_000, 100_000, 1_000_000] + ([4_000_000] if args.full else [])
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder) / "store", sizes)
        rows = sweep(sizes, str(Path(folder) / "store"), 3 if args.full else 1)
    table(
        rows, title=f"training step, width {WIDTH}, chunks of {CHUNK:,}, MLP {WIDTH}-128-128 and 64 slots inside the encoder"
    )
    figures, bars = figures_of(rows)
    return report("memory", figures, bars)


if __name__ == "__main__":
    raise SystemExit(main())
