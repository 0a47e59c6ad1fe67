"""One set on two workers against one, from disk: processes of a gloo group (GroupSet) and Ray actors (RaySet).

    python -m benchmarks.scale [--full] [--folder PATH]

A step is the sweep of all chunks, the loss at the merged state, and the replay of all chunks (`Exact`), of a small network
inside UMBC on 128-wide float32 elements; one thread a worker. Time is the best of rounds in which one and two workers take
turns; where other work shares the machine, the CPU seconds of the busiest worker say how the work was divided. Memory is the
peak of the caller's anonymous memory during a step above what it held before (pages of a mapped file and Ray's shared memory
are not anonymous); in a group the caller is a rank, which holds a chunk at a time. Linux only: it reads /proc/self. A second
table each checks the cost model of docs/scale.md.

Bytes and memory are compared between the smallest and the largest set. In a group bytes are the same for all; on actors they
grow with the logarithm of the number of chunks, up to a bound that has no such number in it:
``P + 2 Q + 2 S + slices (12 S + G)``, the names as in docs/scale.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.memory import peak_of_anonymous_memory, write_sets
from benchmarks.report import report, table
from benchmarks.timing import best_times
from distset import UMBC, ChunkedSet, Exact, Features, InMemory, encode_set
from distset.cluster.group_set import GroupSet, SetGroup
from distset.cluster.wire import Traffic
from distset.data import Store
from distset.encode import Sweep

WIDTH, CHUNK, SLOTS, SLICES = 128, 8192, 32, 8
CALLER_MIB = {"GroupSet": 64.0, "RaySet": 16.0}  # a rank works on chunks itself (some 25 MiB each), a driver on none
Row = dict[str, Any]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Features(nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU()), UMBC(64, SLOTS))


def step(encoder: nn.Module, chunks: ChunkedSet) -> None:
    encoder.zero_grad()
    encode_set(encoder, chunks, grad=Exact(), seed=0).square().sum().backward()


class Meter(NamedTuple):
    """What is read before and after a step on so many workers: bytes, and the CPU seconds of each worker."""

    traffic: Callable[[int], Traffic]
    cpu: Callable[[int], list[float]]


def measure(steps: Callable[[int], dict[int, Callable[[], None]]], sizes: list[int], rounds: int, meter: Meter) -> list[Row]:
    """A row for each size and number of workers; ``steps(size)[workers]()`` is a step on so many workers."""
    rows: list[Row] = []
    for size in sizes:
        by_workers = steps(size)
        seconds = best_times({str(workers): run for workers, run in by_workers.items()}, rounds=rounds)
        for workers, run in by_workers.items():
            before, cpu = meter.traffic(workers), meter.cpu(workers)
            with peak_of_anonymous_memory() as peak:
                run()
                mib = peak()
            used = meter.traffic(workers) - before
            busiest = max(after - start for after, start in zip(meter.cpu(workers), cpu))
            rows.append(
                {"elements": size, "workers": workers, "seconds": seconds[str(workers)]}
                | {"busiest CPU s": busiest, "peak MiB": mib}
                | {"bytes down": used.down, "bytes up": used.up}
            )
    return rows


def on_actors(path: str, sizes: list[int], rounds: int) -> list[Row]:
    import ray

    from distset.cluster.ray_set import RaySet
    from distset.cluster.set_actors import SetActors

    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    store, encoder = Store(path), model()
    crews = {workers: SetActors(workers, num_cpus=0.5) for workers in (1, 2)}

    def steps(size: int) -> dict[int, Callable[[], None]]:
        sets = {workers: RaySet(store.open(f"n{size}", CHUNK), crew, slices=SLICES) for workers, crew in crews.items()}
        return {workers: functools.partial(step, encoder, chunks) for workers, chunks in sets.items()}

    def cpu(workers: int) -> list[float]:
        actors = [member.actor for member in crews[workers].members]
        return ray.get([actor.__ray_call__.remote(lambda self: time.process_time()) for actor in actors])

    try:
        return measure(steps, sizes, rounds, Meter(lambda workers: crews[workers].traffic, cpu))
    finally:
        for crew in crews.values():
            crew.close()
        ray.shutdown()


def in_a_group(path: str, sizes: list[int], rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(path, sizes, rounds, folder), nprocs=2)
        return json.loads((Path(folder) / "rows.json").read_text())


def _rank(rank: int, path: str, sizes: list[int], rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    made = {workers: dist.new_group(list(range(workers))) for workers in (1, 2)}  # by all, members or not
    groups = {workers: SetGroup(group) for workers, group in made.items() if rank < workers}
    store, encoder = Store(path), model()

    def steps(size: int) -> dict[int, Callable[[], None]]:
        chunks = store.open(f"n{size}", CHUNK)

        def run(workers: int) -> None:
            dist.barrier()
            if rank < workers:
                step(encoder, GroupSet(chunks, groups[workers]))
            dist.barrier()

        return {workers: functools.partial(run, workers) for workers in (1, 2)}

    meter = Meter(lambda n: groups[n].traffic if rank < n else Traffic(), lambda n: [time.process_time()])
    rows = measure(steps, sizes, rounds, meter)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def model_error(rows: list[Row]) -> list[Row]:
    """Seconds by ``fixed + elements / workers * each``, the two constants from one worker, against those measured on two."""
    at = {(row["elements"], row["workers"]): row["seconds"] for row in rows}
    sizes = sorted({size for size, _ in at})
    each = (at[sizes[-1], 1] - at[sizes[0], 1]) / (sizes[-1] - sizes[0])
    fixed = max(at[sizes[0], 1] - each * sizes[0], 0.0)
    return [
        {"elements": size, "us an element": 1e6 * each, "fixed ms": 1e3 * fixed}
        | {"predicted": fixed + each * size / 2, "measured": at[size, 2]}
        for size in sizes
    ]


class Weighed(InMemory):
    """Weighs what a step makes of a set: bytes of its query, its state and its gradients."""

    query = state = gradients = 0

    def merge(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> Any:
        merged = super().merge(fn, *args, ids=ids)
        self.query = sum(nbytes(arg.query) for arg in args if isinstance(arg, Sweep))
        self.state = nbytes(merged)
        return merged

    def sum(self, fn: Callable[..., Any], *args: Any, ids: Sequence[int] | None = None) -> list[Tensor | None]:
        parts = super().sum(fn, *args, ids=ids)
        self.gradients = nbytes(parts)
        return parts


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def bound_on_actors() -> int:
    """Bytes that a step on actors may send, however large the set."""
    encoder, weighed = model(), Weighed(torch.zeros(4, WIDTH), 2)
    step(encoder, weighed)
    parameters = nbytes([*encoder.parameters(), *encoder.buffers()])
    down = parameters + 2 * weighed.query + 2 * weighed.state
    return down + SLICES * (12 * weighed.state + weighed.gradients)


def bytes_bars(name: str, wire: dict[int, int]) -> dict[str, tuple[float, str, float]]:
    """Of bytes a step by size: constant in a group, below their bound on actors."""
    small, large = min(wire), max(wire)
    if name == "GroupSet":
        return {f"{name}: bytes a step, {large:,} / {small:,}": (wire[large] / wire[small], "<=", 1.0)}
    return {f"{name}: bytes a step at {large:,}, of their bound for any size": (wire[large] / bound_on_actors(), "<=", 1.0)}


def figures_of(name: str, rows: list[Row]) -> tuple[Row, dict[str, tuple[float, str, float]]]:
    at = {(row["elements"], row["workers"]): row for row in rows}
    sizes = sorted({size for size, _ in at})
    small, large = sizes[0], sizes[-1]
    speedup = at[large, 1]["seconds"] / at[large, 2]["seconds"]
    shared = at[large, 1]["busiest CPU s"] / at[large, 2]["busiest CPU s"]
    wire = {size: at[size, 2]["bytes down"] + at[size, 2]["bytes up"] for size in sizes}
    figures = {
        f"{name}: elements a second, two workers": round(large / at[large, 2]["seconds"]),
        **{f"{name}: bytes a step at {size:,}": wire[size] for size in sizes},
        **({f"{name}: bytes a step, bound for any size": bound_on_actors()} if name == "RaySet" else {}),
        f"{name}: bytes a step, {large:,} / {small:,}": round(wire[large] / wire[small], 3),
        f"{name}: peak MiB of the caller at {small:,}": at[small, 2]["peak MiB"],
        f"{name}: CPU seconds of one worker over those of the busier of two": round(shared, 2),
    }
    bars = {
        f"{name}: two workers against one, times faster": (speedup, ">=", 1.7),
        **bytes_bars(name, wire),
        f"{name}: peak MiB of the caller at {large:,}": (at[large, 2]["peak MiB"], "<=", CALLER_MIB[name]),
    }
    return figures, bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="up to 10^7 elements (5 GB on disk)")
    parser.add_argument("--folder", help="where to put the store; a temporary folder if left out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [100_000, 1_000_000] + ([10_000_000] if args.full else [])
    figures: Row = {}
    bars: dict[str, tuple[float, str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = str(Path(folder) / "store")
        write_sets(Path(path), sizes)
        for name, rows in (("GroupSet", in_a_group(path, sizes, 2)), ("RaySet", on_actors(path, sizes, 2))):
            table(rows, title=f"{name}: a step of {WIDTH}-64 network and {SLOTS} slots, chunks of {CHUNK:,}")
            table(model_error(rows), title=f"{name}: seconds on two workers, predicted from one")
            found, held = figures_of(name, rows)
            figures |= found
            bars |= held
    return report("scale", figures, bars)


if __name__ == "__main__":
    raise SystemExit(main())
