"""A bag classifier trained on a store: its examples, what is checked before anything starts, what each process does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distset.build import build
from distset.checkpoints import Checkpoints
from distset.data import Split, Store, check_split
from distset.encode import Sampled, Subset
from distset.runs import make_task
from distset.task import LazyExamples
from distset.tasks.backbones import Standardise
from distset.tasks.bags import BagTask
from distset.train import Example, Plan, Watch, World, fit, predict_all

__all__ = ["Outcome", "StoreBags", "balance", "check_run", "train_bags"]


class StoreBags(LazyExamples):
    """Sets of a store with their class numbers, opened when asked for."""

    def __init__(self, store: Store, ids: Sequence[str], chunk_size: int | None) -> None:
        self.store, self.ids, self.chunk_size = store, list(ids), chunk_size
        self.targets = store.labels(ids).tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def example(self, index: int) -> Example:
        return Example(self.store.open(self.ids[index], self.chunk_size), self.targets[index])


class Outcome(NamedTuple):
    """What a finished training says.

    Attributes:
        step, best_step: steps done; the step of the best weights.
        stopped: whether patience ended it.
        history: every record.
        probabilities: of the best weights, by part of the split: ``{"val": [[p_0, p_1], ...], "test": ...}``.
    """

    step: int
    best_step: int
    stopped: bool
    history: list[dict[str, float]]
    probabilities: dict[str, list[list[float]]]


def check_run(config: Mapping[str, Any]) -> Split:
    """Everything that can be known to fail before training starts; returns the split.

    Raises:
        ValueError: for a store or split that is not there or leaks, sets without labels, a class without training sets, a
            validation part of one class, more sampled chunks than the smallest training set has, wrong arguments anywhere.
    """
    store, data = Store(config["data"]["path"]), config["data"]
    split = store.split(data["split"], data["fold"])
    check_split(split, store.cases)
    store.open(split.train[0], data["chunk_size"])  # says what is wrong with a chunk size
    targets = {part: store.labels(ids).tolist() for part, ids in zip(Split._fields, split)}
    for part in ("train", "val"):
        counts = Counter(store.classes[target] for target in targets[part])
        if targets[part] and len(counts) < (len(store.classes) if part == "train" else 2):
            raise ValueError(
                f"labels: the {part} sets are {dict(counts)} of the classes {', '.join(store.classes)}; wanted "
                f"{'sets of every class' if part == 'train' else 'at least two classes'}: check labels and split"
            )
    plan: Plan = build(config["plan"], "plan", seed=config["seed"])
    plan.check(len(split.train), len(split.val))
    build(config["optim"], "optim")
    task = make_task(config, store.element_shape, store.classes)
    _check_chunks(task, store, split.train, data["chunk_size"])
    return split


def balance(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with ``class_weights: balanced`` made numbers: the rarer a class in training, the more it weighs."""
    task = config["task"]
    if task.get("class_weights") != "balanced":
        return dict(config)
    store, data = Store(config["data"]["path"]), config["data"]
    targets = store.labels(store.split(data["split"], data["fold"]).train)
    counts = torch.bincount(targets, minlength=len(store.classes)).clamp_min(1)
    weights = (len(targets) / (len(store.classes) * counts)).tolist()
    return {**config, "task": {**task, "class_weights": weights}}


def train_bags(
    config: Mapping[str, Any], checkpoints: Checkpoints, *, watch: Watch | None = None, device: torch.device | None = None
) -> Outcome:
    """One process of a training run: train (or go on), then predict with the best weights. All get the same outcome."""
    store, data = Store(config["data"]["path"]), config["data"]
    split = store.split(data["split"], data["fold"])
    train, val, test = (StoreBags(store, ids, data["chunk_size"]) for ids in split)
    plan: Plan = build(config["plan"], "plan", seed=config["seed"])
    task = make_task(config, store.element_shape, store.classes)
    if not checkpoints.exists():
        _standardise(task, train)
    task.model.to(device or torch.device("cpu"))
    rebuilt_by = _without_files({key: config[key] for key in ("task", "model", "backbone", "grad", "seed")})
    fitted = fit(
        task,
        train,
        val,
        plan=plan,
        optimisation=build(config["optim"], "optim"),
        checkpoints=checkpoints,
        watch=watch,
        meta={"config": rebuilt_by, "element_shape": list(store.element_shape), "classes": store.classes},
    )
    task.model.load_state_dict(fitted.best["model"])
    probabilities = {}
    for part, bags in (("val", val), ("test", test)):
        outputs, _ = predict_all(task, bags, precision=plan.precision)
        probabilities[part] = [output.tolist() for output in outputs]
    return Outcome(fitted.step, fitted.best["step"], fitted.stopped, fitted.history, probabilities)


def _without_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint holds the weights that training began with: who uses it need not have their files."""
    files = {"task": "start", "backbone": "weights"}
    return {
        name: {**part, files[name]: None} if name in files and part and files[name] in part else part
        for name, part in config.items()
    }


def _standardise(task: BagTask, train: Sequence[Example]) -> None:
    """Measure what the model standardises by; on the training sets alone."""
    for module in task.model.modules():
        if isinstance(module, Standardise):
            module.fit(example.set for example in World().share(train))


def _check_chunks(task: BagTask, store: Store, ids: Sequence[str], chunk_size: int | None) -> None:
    grad = task.model.grad
    if not isinstance(grad, Sampled | Subset):
        return
    smallest = min(ids, key=lambda set_id: store.record(set_id).n)
    chunks = store.open(smallest, chunk_size).num_chunks
    if grad.m > chunks:
        raise ValueError(
            f"grad.m: got {grad.m} sampled chunks, but the training set {smallest!r} of {store.record(smallest).n:,} "
            f"elements has {chunks} of up to {chunk_size or 'all'} elements; lower grad.m or data.chunk_size"
        )
