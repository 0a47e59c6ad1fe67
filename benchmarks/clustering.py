"""A training step of amortized clustering: modes against full autograd, and against a straightforward implementation.

    python -m benchmarks.clustering [--full]

10 sets of 1,024 points, gradient on 8 of them; whole steps: sets drawn, loss, gradient, Adam. One thread. As in training,
each model has a process of its own, and five of its steps follow one another. The saved bytes are what autograd keeps in
forward and replays.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.report import report, table
from benchmarks.timing import apart, best_times
from distset import Exact, Full, InMemory, Sampled, Subset
from distset.encode import Gradient
from distset.problems.mixtures import mixtures
from distset.tasks import clustering_models as models
from distset.tasks.clustering import clustering_task
from distset.tasks.completion import completion_task
from distset.tasks.completion_models import umbc_set_transformer as completion_model
from distset.tasks.document_models import umbc_set_transformer as document_model
from distset.tasks.documents import document_task
from distset.train import Example

WIDTH, HEADS, COMPONENTS = 128, 4, 4
STEPS = 5


class Plain(nn.Module):
    """UMBC and self-attention between the slots as one writes it down: K and V of every element, one pass over the drawn
    points with a graph and one over the others without, sums added up; published widths and depths."""

    def __init__(self) -> None:
        super().__init__()
        self.extract = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.slots = nn.Parameter(torch.rand(COMPONENTS, WIDTH) * 0.4 - 0.2)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(3))
        self.out = nn.Linear(WIDTH, 5)

    def sums(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        h = self.extract(x)
        logits = _split(query) @ _split(self.k(h)).transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        weights = logits.clamp(max=10).exp()
        return weights @ _split(self.v(h)), weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        query = self.q(self.slots).expand(len(x), -1, -1)
        if drawn is None:
            total, mass = self.sums(x, query)
        else:
            rest = torch.ones(x.shape[1], dtype=torch.bool)
            rest[drawn] = False
            total, mass = self.sums(x[:, drawn], query)
            with torch.no_grad():
                others = self.sums(x[:, rest], query)
            total, mass = total + others[0], mass + others[1]
        z = self.norm((total / mass).transpose(1, 2).flatten(2) + query)
        for block in self.blocks:
            z = block(z)
        return self.out(z)

    def step(self, x: Tensor, points: int | None) -> None:
        drawn = None if points is None else torch.randperm(x.shape[1])[:points]
        raw = self(x, drawn)
        weight, mean, variance = raw[..., 0].softmax(-1), raw[..., 1:3], F.softplus(raw[..., 3:]).clamp(min=1e-2)
        z = (x.unsqueeze(2) - mean.unsqueeze(1)).square() / variance.unsqueeze(1)
        log_joint = -0.5 * (z + variance.unsqueeze(1).log() + math.log(2 * math.pi)).sum(-1) + weight.unsqueeze(1).log()
        (-log_joint.logsumexp(-1).mean()).backward()
        if points is not None:
            for part in (self.extract, self.k, self.v, self.q):
                for parameter in part.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(x.shape[1] / points)


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _split(self.q(x)), _split(self.k(x)), _split(self.v(x))
        attended = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        h = (q + attended).transpose(1, 2).flatten(2)
        return h + F.relu(self.o(h))


def _split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def stepping(model: nn.Module, step: Callable[[int], object]) -> Callable[[], None]:
    """Whole steps on ever new sets."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    count = 0

    def run() -> None:
        nonlocal count
        for _ in range(STEPS):
            adam.zero_grad()
            step(count)
            adam.step()
            count += 1

    return run


RIVALS: dict[str, tuple[Callable[..., models.Parts], Full | Gradient, int | None]] = {
    "umbc, sampled": (models.umbc_set_transformer, Sampled(1), 8),
    "umbc, full": (models.umbc_set_transformer, Full(), None),
    "umbc, exact in 4 chunks": (models.umbc_set_transformer, Exact(), 256),
    "umbc, subset": (models.umbc_set_transformer, Subset(1), 8),
    "sse, sampled": (models.sse, Sampled(1), 8),
    "sse, full": (models.sse, Full(), None),
    "deepsets, sampled": (models.deepsets, Sampled(1), 8),
    "deepsets, full": (models.deepsets, Full(), None),
}
"""Model, gradient, points a chunk."""
PLAIN = {"plain umbc, sampled": 8, "plain umbc, full": None}
"""Points with gradient."""


def batch(train: Sequence[Example], count: int) -> list[Example]:
    return [train[10 * count + i] for i in range(10)]


def rival(name: str) -> Callable[[], None]:
    """Whole steps of one model, on one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if name in PLAIN:
        plain, train = Plain(), mixtures((100_000, 1, 1), chunk_size=None).train
        return stepping(plain, lambda n: plain.step(torch.stack([e.set.elements for e in batch(train, n)]), PLAIN[name]))
    maker, grad, chunk_size = RIVALS[name]
    train = mixtures((100_000, 1, 1), chunk_size=chunk_size).train
    task = clustering_task(2, COMPONENTS, model=maker, grad=grad)
    task.model.train()
    return stepping(task.model, lambda n: task.batch_loss(batch(train, n), seed=n).backward())


def saved_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """What autograd keeps beside the parameters, forward and in replays."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += 0 if tensor.untyped_storage().data_ptr() in own else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return total


def memory() -> dict[str, float]:
    """MiB that autograd keeps in a step: clustering by mode, completion by size of the context, a long document by mode."""
    figures = {}
    for name, grad, size in (("sampled", Sampled(1), 8), ("subset", Subset(1), 8), ("full", Full(), None)):
        task = clustering_task(2, COMPONENTS, model=models.umbc_set_transformer, grad=grad)
        parts = mixtures((10, 1, 1), chunk_size=size)
        kept = saved_bytes(task.model, lambda t=task, p=parts: t.batch_loss(p.train[:], seed=0).backward())
        figures[f"saved MiB, clustering, {name}"] = round(kept / 2**20, 2)
    images = torch.rand(4, 1024, 3)
    for context in (100, 300, 500):
        for name, grad in (("sampled", Sampled(1)), ("full", Full())):
            completion = completion_task(
                [32, 32, 1], model=completion_model, grad=grad, context=(context, context), chunk_size=100
            )
            examples = [Example(InMemory(image), None) for image in images]
            kept = saved_bytes(completion.model, lambda t=completion, e=examples: t.batch_loss(e, seed=0).backward())
            figures[f"saved MiB, completion from {context}, {name}"] = round(kept / 2**20, 2)
    words = Example(InMemory(torch.randint(10_000, (2000, 1)), 100), torch.tensor([1.0, 0.0]))
    for name, grad in (("sampled", Sampled(1)), ("full", Full())):
        document = document_task(10_000, ["no", "yes"], False, model=document_model, grad=grad)
        kept = saved_bytes(document.model, lambda t=document: t.loss(words, seed=0).backward())
        figures[f"saved MiB, document of 2,000 words, {name}"] = round(kept / 2**20, 2)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more rounds")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with apart(rival, [*RIVALS, *PLAIN]) as rivals:
        times = best_times(rivals, rounds=200 if args.full else 40, seconds=300 if args.full else 25)
    table([{"step": name, "ms": 1e3 * seconds / STEPS} for name, seconds in times.items()], title="whole steps, one thread")
    ratio = {
        "sampled / full, umbc": times["umbc, sampled"] / times["umbc, full"],
        "sampled / full, sse": times["sse, sampled"] / times["sse, full"],
        "sampled / full, deepsets": times["deepsets, sampled"] / times["deepsets, full"],
        "sampled / full, plain": times["plain umbc, sampled"] / times["plain umbc, full"],
        "exact / full, umbc": times["umbc, exact in 4 chunks"] / times["umbc, full"],
        "sampled / plain sampled": times["umbc, sampled"] / times["plain umbc, sampled"],
        "full / plain full": times["umbc, full"] / times["plain umbc, full"],
    }
    kept = memory()
    flat = kept["saved MiB, completion from 500, sampled"] / kept["saved MiB, completion from 100, sampled"]
    document = "saved MiB, document of 2,000 words"
    short = kept[f"{document}, sampled"] / kept[f"{document}, full"]
    bars = {
        "step, sampled over full (UMBC + Set Transformer)": (ratio["sampled / full, umbc"], "<=", 0.42),
        "step, sampled over a plain one": (ratio["sampled / plain sampled"], "<=", 1.0),
        "saved memory, context of 500 over 100": (flat, "<=", 1.01),
        "saved memory of a document, sampled over full": (short, "<=", 0.2),
    }
    return report("clustering", {name: round(value, 3) for name, value in (ratio | kept).items()}, bars)


if __name__ == "__main__":
    raise SystemExit(main())
