"""One mean-field step, forward and training, by n: O(n d) from one sum against the published masks of m x n x n.

    python -m benchmarks.meanfield [--full]

Same network (2 -> 256, sum, 500-500-1), m = 5 draws, psi = 0.5, float32, one thread; a tenth of the elements are chosen. The
training step is the published one: the loss counts the chosen elements and as many others, so one sum takes the gains of
those alone (as `OracleTask` does; the masks find all of them, as published). "All" has a loss over every element, in chunks,
and goes to 10^6. Each cell runs in a process of its own; CPU time is that process's, memory the growth of its peak resident
set beyond imports and a first tiny step, in a step whose tensors are given back as soon as they are freed (else the peak has
what the allocator kept, by chance a half more). The short form stops at 10^5 (forward) and 10^4 (training); ``--full``
goes to 10^6, and the masks to 10^4, where they need 8 GB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

from benchmarks.memory import status_mib
from benchmarks.report import report, table
from distset import InMemory
from distset.gains import Drawn
from distset.large_offers import first_field, offer_logits, offer_loss
from distset.mean_field import field_step, oracle_loss
from distset.set_functions import published_utility

DRAWS, CHUNK = 5, 1024


class MasksFormulation(nn.Module):
    """The published step in its plain form: a Bernoulli matrix for each draw *and each element*, its row i with i put in
    and taken out, every one of the 2 m n subsets pooled by a matrix product and sent through the head."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Linear(2, 256)
        self.head = nn.Sequential(
            nn.Linear(256, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 1)
        )  # fmt: skip

    def psi(self, elements: Tensor) -> Tensor:
        n = len(elements)
        drawn = torch.bernoulli(torch.full((n,), 0.5).expand(DRAWS, n, n))
        own = torch.cat([torch.eye(n).unsqueeze(0) for _ in range(DRAWS)])
        without = drawn * (1 - own)
        with_i = without + own
        utilities = [self.head(subsets @ self.phi(elements)).squeeze(-1) for subsets in (with_i, without)]
        return torch.sigmoid((utilities[0] - utilities[1]).mean(0))

    def loss(self, elements: Tensor, chosen: Tensor, counted: Tensor) -> Tensor:
        psi = self.psi(elements)
        target = torch.zeros(len(elements)).index_fill(0, chosen, 1.0)
        each = -(target * torch.log(psi + 1e-12) + (1 - target) * torch.log(1 - psi + 1e-12))
        return each[counted].sum()


def masks(elements: Tensor, *, train: bool) -> None:
    model, tenth = MasksFormulation(), len(elements) // 10
    if train:
        model.loss(elements, torch.arange(tenth), torch.arange(2 * tenth)).backward()
    else:
        with torch.no_grad():
            model.psi(elements)


def one_sum(elements: Tensor, *, train: bool) -> None:
    if not train:
        return one_sum_all(elements, train=False)
    tenth = len(elements) // 10
    step = field_step(
        published_utility(2), elements, gains=Drawn(DRAWS, derivative=None), places=torch.arange(2 * tenth)
    )  # fmt: skip
    oracle_loss(step(torch.zeros(len(elements))), torch.arange(2 * tenth) < tenth).backward()


def one_sum_all(elements: Tensor, *, train: bool) -> None:
    utility, offer = published_utility(2), InMemory(elements, chunk_size=CHUNK)
    if train:
        field = first_field(utility, offer, samples=DRAWS)
        offer_loss(utility, offer, field, torch.arange(len(elements) // 10)).backward()
    else:
        with torch.no_grad():
            torch.sigmoid(offer_logits(utility, offer, first_field(utility, offer, samples=DRAWS)))


METHODS = {"masks": masks, "one sum": one_sum, "one sum, all": one_sum_all}


def keep_freed(threshold: int) -> None:
    """Freed tensors below ``threshold`` bytes stay with the process for the next ones; glibc itself moves it to 32 MiB."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, threshold)  # M_MMAP_THRESHOLD
    mallopt(-1, 2 * threshold)  # M_TRIM_THRESHOLD


def measure(method: str, n: int, train: bool) -> None:
    """What a child process does: the peak of one step, then repeats for at least a second and the least CPU time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed(2**16)
    METHODS[method](torch.randn(20, 2), train=train)
    elements = torch.randn(n, 2)
    before, start = status_mib("VmHWM"), time.process_time()
    METHODS[method](elements, train=train)
    peak, seconds = status_mib("VmHWM"), [time.process_time() - start]
    keep_freed(2**25)
    long_masks = method == "masks" and seconds[0] > 10.0  # all tensors are above 32 MiB: the same step either way
    while sum(seconds[1:]) < 1.0 and not long_masks:
        start = time.process_time()
        METHODS[method](elements, train=train)
        seconds.append(time.process_time() - start)
    print(json.dumps({"seconds": min(seconds), "MB": peak - before}))


def cell(method: str, n: int, train: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.meanfield", "--child", method, str(n), "train" if train else "forward"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{method} at n = {n} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def grid(full: bool) -> list[tuple[str, int, bool]]:
    ours = {False: [100, 300, 1000, 3000, 10_000, 100_000], True: [100, 300, 1000, 3000, 10_000]}
    theirs = {False: [100, 300, 1000, 3000], True: [100, 300, 1000]}
    every = ours[True]
    if full:
        ours[False] = [*ours[False], 1_000_000]
        every = [*every, 100_000, 1_000_000]
        theirs = {train: [100, 300, 1000, 3000, 10_000] for train in (False, True)}
    cells = [("one sum", n, train) for train in (False, True) for n in ours[train]]
    cells += [("one sum, all", n, True) for n in every]
    return cells + [("masks", n, train) for train in (False, True) for n in theirs[train]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="masks to 10^4, one sum to 10^6")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child[0], int(arguments.child[1]), arguments.child[2] == "train")
        return 0
    found = {key: cell(*key) for key in grid(arguments.full)}
    rows, figures = [], {}
    for step, ours, what in (
        ("forward", "one sum", False),
        ("training", "one sum", True),
        ("training, all", "one sum, all", True),
    ):
        for n in sorted(n for method, n, train in found if (method, train) == (ours, what)):
            mine, their = found[ours, n, what], found.get(("masks", n, what))
            row = {"step": step, "n": n, "one sum s": mine["seconds"], "MB": mine["MB"]}
            row |= {"masks s": their["seconds"], "masks MB": their["MB"]} if their else {"masks s": "-", "masks MB": "-"}
            row |= {"times less CPU": their["seconds"] / mine["seconds"] if their else "-"}
            rows.append(row)
            figures |= {f"{row['step']} {n}: {key}": row[key] for key in list(row)[2:] if row[key] != "-"}
    table(rows, title="one mean-field step, m = 5")
    return report("meanfield", figures, bars(found, arguments.full))


def bars(found: dict[tuple[str, int, bool], dict[str, float]], full: bool) -> dict[str, tuple[float, str, float]]:
    def ratio(n: int, train: bool, key: str = "seconds") -> float:
        return found["masks", n, train][key] / max(found["one sum", n, train][key], 1.0 if key == "MB" else 1e-9)

    largest = 1_000_000 if full else 100_000
    per_element = [found["one sum", n, False]["seconds"] / n for n in (10_000, largest)]
    wanted = {
        "CPU ratio at 1,000 (forward)": (ratio(1000, False), ">=", 6.0),
        "CPU ratio at 1,000 (training)": (ratio(1000, True), ">=", 6.0),
        f"CPU per element, {largest:,} against 10,000": (per_element[1] / per_element[0], "<=", 1.3),
    }
    if full:
        wanted |= {
            "CPU ratio at 10,000 (forward)": (ratio(10_000, False), ">=", 35.0),
            "CPU ratio at 10,000 (training)": (ratio(10_000, True), ">=", 35.0),
            "memory ratio at 10,000 (forward)": (ratio(10_000, False, "MB"), ">=", 50.0),
            "memory ratio at 10,000 (training)": (ratio(10_000, True, "MB"), ">=", 50.0),
            "MB forward at 1,000,000": (found["one sum", 1_000_000, False]["MB"], "<", 300.0),
            "MB training at 1,000,000": (found["one sum, all", 1_000_000, True]["MB"], "<", 450.0),
        }
    return wanted


if __name__ == "__main__":
    raise SystemExit(main())
