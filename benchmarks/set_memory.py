"""Memory of a training step of the set encoders: models of a table, sizes of a context, a long document by gradient.

    python -m benchmarks.set_memory [--full]

Models are those of `jobs.train`, built from its configuration. *Peak* is the most that a step's tensors take at one time
beside what was there before it (parameters, their gradients, elements), by the allocations that torch's profiler sees;
*kept* adds up the tensors that autograd is handed to keep, forward and in replays. Both are the same in every run.

* Clustering: 10 sets of 1,024 points, gradient from 8 of them where sampled, with the time of a step; what each model
  reaches stands in docs/results.md.
* Completion: 4 images, gradient from 100 pixels of a context of 100 to 500 pixels, as published, and of far more.
* Documents: UMBC + BERT, gradient from 100 words of a document against full. Where the vectors of words are learnt, 2.4 MiB
  of the peak are the dense gradient of the table of 10,000 words, in either; where they are held there is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn

from benchmarks.clustering import saved_bytes
from benchmarks.memory import peak_bytes
from benchmarks.report import report, table
from benchmarks.timing import best_times
from distset import InMemory
from distset.build import build
from distset.problems.mixtures import mixtures
from distset.tasks.completion import gaussian_nll
from distset.train import Example

MIB = 2**20
MERGEABLE = ("umbc_set_transformer", "umbc_fspool", "umbc_diffem", "sse", "hierarchical_sse", "deepsets")
WHOLE = ("set_transformer", "fspool", "diffem")
CONTEXTS = (100, 300, 500, 4_000, 16_000)
WORDS, VOCABULARY = (2_000, 20_000, 100_000), 10_000
PUBLISHED = ("model.width=768", "model.slots=256", "model.bert_layers=12", "model.bert_heads=12")
Row = dict[str, Any]


def built(facts: Mapping[str, Any], *overrides: str) -> Any:
    """The task that `jobs.train` trains, in training mode."""
    with initialize_config_module("conf", version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)
    task = build(config["task"], "task", **facts)
    task.model.train()
    return task


def measured(model: nn.Module, step: Callable[[], object]) -> Row:
    step()  # gradients are there afterwards, and whatever else is set up but once
    return {"peak MiB": peak_bytes(step) / MIB, "kept MiB": saved_bytes(model, step) / MIB}


def clustering(rounds: int) -> list[Row]:
    """A row a model and gradient, as in table 2 of the paper."""
    parts = {"sampled": mixtures((10, 1, 1), chunk_size=8), "full": mixtures((10, 1, 1), chunk_size=None)}
    rows, steps = [], {}
    for model in (*MERGEABLE, *WHOLE):
        for grad in ("full",) if model in WHOLE else ("sampled", "full"):
            task = built(parts[grad].facts, "task=clustering", f"model=clustering/{model}", f"grad={grad}")
            step = steps[model, grad] = lambda t=task, e=parts[grad].train[:]: t.batch_loss(e, seed=0).backward()
            rows.append({"model": model, "gradient": grad, **measured(task.model, step)})
    times = best_times(steps, rounds=rounds, seconds=12)
    return [row | {"ms": 1e3 * times[row["model"], row["gradient"]]} for row in rows]


def completion(models: Sequence[str]) -> list[Row]:
    """A row a model, gradient and size of the context."""
    rows = []
    for model in models:
        for grad in ("sampled", "full"):
            given = ("task=completion", "data.examples.path=.", f"model=completion/{model}", f"grad={grad}")
            task = built({"shape": [32, 32, 1]}, *given)
            for size in CONTEXTS:
                row = measured(task.model, completing(task.model, size, 100 if grad == "sampled" else None))
                rows.append({"model": model, "gradient": grad, "context": size, **row})
    return rows


def completing(model: nn.Module, context: int, chunk: int | None) -> Callable[[], None]:
    """A step on 4 images, 256 targets each, given so many pixels."""
    random = torch.Generator().manual_seed(0)
    pixels = InMemory(torch.rand(4, context, 3, generator=random), chunk)
    places, values = torch.rand(4, 256, 3, generator=random).split([2, 1], -1)

    def step() -> None:
        gaussian_nll(model(pixels, places, seed=0), values).mean().backward()

    return step


def documents(sizes: Sequence[int], *overrides: str, held: bool = False) -> list[Row]:
    """A row a gradient and number of words."""
    facts: dict[str, Any] = {"words": VOCABULARY, "classes": ["no", "yes"], "multi_label": False}
    if held:
        facts["vectors"] = torch.randn(VOCABULARY, 64, generator=torch.Generator().manual_seed(0))
    rows = []
    for grad in ("sampled", "full"):
        task = built(facts, "task=documents", "data.examples.path=.", f"grad={grad}", *overrides)
        for size in sizes:
            words = torch.randint(VOCABULARY, (size, 1), generator=torch.Generator().manual_seed(0))
            example = Example(InMemory(words, 100 if grad == "sampled" else None), torch.tensor([1.0, 0.0]))
            row = measured(task.model, lambda t=task, e=example: t.loss(e, seed=0).backward())
            rows.append({"vectors": "held" if held else "learnt", "gradient": grad, "words": size, **row})
    return rows


def bars_of(points: Sequence[Row], pixels: Sequence[Row], words: Sequence[Row]) -> dict[str, tuple[float, str, float]]:
    """What must hold of the three tables."""
    peak = {(row["model"], row["gradient"]): row["peak MiB"] for row in points}
    shares = {model: peak[model, "sampled"] / peak[model, "full"] for model in MERGEABLE}
    most = max(peak[model, "sampled"] for model in MERGEABLE)
    least = min(peak[model, "full"] for model in WHOLE)
    completed = {(row["model"], row["gradient"], row["context"]): row["peak MiB"] for row in pixels}
    models = {row["model"] for row in pixels}
    ends = CONTEXTS[0], CONTEXTS[-1]
    flat = max(completed[model, "sampled", ends[1]] / completed[model, "sampled", ends[0]] for model in models)
    part = max(completed[model, "sampled", 500] / completed[model, "full", 500] for model in models)
    read = {(row["vectors"], row["gradient"], row["words"]): row for row in words}

    def over(key: str, size: int, vectors: str = "learnt") -> float:
        return read[vectors, "sampled", size][key] / read[vectors, "full", size][key]

    return {
        "clustering: peak, sampled over full (UMBC + Set Transformer)": (shares["umbc_set_transformer"], "<=", 0.35),
        "clustering: peak, sampled over full, the worst mergeable model": (max(shares.values()), "<=", 0.6),
        "clustering: peak, worst mergeable sampled over best on whole sets": (most / least, "<=", 0.5),
        f"completion: peak, context of {ends[1]:,} over {ends[0]}, sampled": (flat, "<=", 1.01),
        "completion: peak, sampled over full, context of 500": (part, "<=", 0.6),
        "documents: kept, sampled 100 over full, 2,000 words": (over("kept MiB", 2_000), "<=", 0.1),
        "documents: peak, sampled 100 over full, 2,000 words": (over("peak MiB", 2_000), "<=", 0.8),
        "documents: peak, sampled 100 over full, 2,000 words, vectors held": (over("peak MiB", 2_000, "held"), "<=", 0.5),
        "documents: peak, sampled 100 over full, 20,000 words": (over("peak MiB", 20_000), "<=", 0.2),
        "documents: peak, 100,000 words over 20,000, sampled": (
            read["learnt", "sampled", 100_000]["peak MiB"] / read["learnt", "sampled", 20_000]["peak MiB"],
            "<=",
            1.01,
        ),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more rounds, more models of completion, the published BERT")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    points = clustering(100 if args.full else 20)
    table(points, title="clustering: 10 sets of 1,024 points, gradient from 8 where sampled; one thread")
    names = ["umbc_set_transformer", "sse", "deepsets", *(["umbc_fspool", "umbc_diffem"] if args.full else [])]
    pixels = completion(names)
    table(pixels, title="completion: 4 images, gradient from 100 pixels where sampled")
    words = documents(WORDS) + documents(WORDS[:2], held=True)
    table(words, title="documents: UMBC + BERT, gradient from 100 words where sampled")
    figures = {f"{row['model']}, {row['gradient']}: peak MiB": row["peak MiB"] for row in points}
    figures |= {
        f"{row['model']}, {row['gradient']}, context of {row['context']:,}: peak MiB": row["peak MiB"] for row in pixels
    }
    figures |= {
        f"UMBC + BERT, vectors {row['vectors']}, {row['gradient']}, {row['words']:,} words: peak MiB": row["peak MiB"]
        for row in words
    }
    if args.full:
        large = documents(WORDS[:2], *PUBLISHED)
        table(large, title="documents: the same 768 wide, 256 slots, BERT of 12 layers")
        figures |= {f"published BERT, {row['gradient']}, {row['words']:,} words: peak MiB": row["peak MiB"] for row in large}
    return report("set_memory", {name: round(value, 2) for name, value in figures.items()}, bars_of(points, pixels, words))


if __name__ == "__main__":
    raise SystemExit(main())
