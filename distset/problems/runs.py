"""Any `Task` trained from plain configuration: what the experiments that are not bags of a store run on.

``data.examples`` builds the `Parts` (examples and what the task must know of them), ``task`` builds the task from these
facts. A task that can show what it learned has ``draw(folder, parts)``; one whose figures need the model beside its outputs
has ``measure(examples)``, asked once for the test part; ``rules`` says in words what its figures mean.

Example:
    >>> from distset.problems.runs import build_problem
    >>> config = {
    ...     "data": {"examples": {"_target_": "distset.problems.offers.gaussian", "sets": 4}},
    ...     "task": {"_target_": "distset.tasks.oracle.diffmf_task"},
    ...     "seed": 0,
    ... }
    >>> task, parts = build_problem(config)
    >>> len(parts.train), parts.facts
    (4, {'dim': 2})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from distset.build import build
from distset.checkpoints import Checkpoints, check_weights, read_state
from distset.report import plot_curves, write_json
from distset.runs import RunFolder
from distset.seeds import seeded
from distset.train import Parts, Plan, Task, Watch, fit, predict_all

__all__ = [
    "Outcome",
    "Parts",
    "build_problem",
    "check_problem",
    "describe",
    "load_problem",
    "train_problem",
    "write_results",
]


class Outcome(NamedTuple):
    """What a finished training says.

    Attributes:
        step, best_step: steps done; the step of the best weights.
        stopped: whether patience ended it.
        history: every record.
        scores: the task's metrics with the best weights, by part: ``{"val": {...}, "test": {...}}``.
    """

    step: int
    best_step: int
    stopped: bool
    history: list[dict[str, float]]
    scores: dict[str, dict[str, float]]


def build_problem(config: Mapping[str, Any]) -> tuple[Task, Parts]:
    """The task with its initial weights, and its examples."""
    parts: Parts = build(config["data"]["examples"], "data.examples")
    return _task(config, parts.facts), parts


def check_problem(config: Mapping[str, Any]) -> None:
    """Raise for everything that can be known to fail before training starts."""
    _, parts = build_problem(config)
    plan: Plan = build(config["plan"], "plan", seed=config["seed"])
    plan.check(len(parts.train), len(parts.val))
    build(config["optim"], "optim")


def train_problem(
    config: Mapping[str, Any], checkpoints: Checkpoints, *, watch: Watch | None = None, device: torch.device | None = None
) -> Outcome:
    """One process of a training run: train (or go on), then measure the best weights. All get the same outcome."""
    task, parts = build_problem(config)
    task.model.to(device or torch.device("cpu"))
    plan: Plan = build(config["plan"], "plan", seed=config["seed"])
    meta = {"config": {"task": config["task"], "seed": config["seed"]}, "facts": parts.facts}
    optimisation = build(config["optim"], "optim")
    fitted = fit(
        task, parts.train, parts.val, plan=plan, optimisation=optimisation, checkpoints=checkpoints, watch=watch, meta=meta
    )
    task.model.load_state_dict(fitted.best["model"])
    named = {"val": parts.val, "test": parts.test}
    scores = {
        part: task.metrics(*predict_all(task, examples, precision=plan.precision))
        for part, examples in named.items()
        if len(examples)
    }
    return Outcome(fitted.step, fitted.best["step"], fitted.stopped, fitted.history, scores)


def load_problem(run: RunFolder, which: str = "best") -> Task:
    """The trained task of a run folder, on the CPU, in eval mode.

    Raises:
        ValueError: where there is no such checkpoint, or it is of another model.
    """
    state = read_state(run.checkpoints / which / "state.pt")
    task = _task(state["meta"]["config"], state["meta"]["facts"])
    check_weights(task.model, state["model"])
    task.model.load_state_dict(state["model"])
    task.model.eval()
    return task


def write_results(run: RunFolder, outcome: Outcome, *, plots: bool = True) -> None:
    """Curves, the task's own pictures and, as the last thing, ``metrics.json``: where that is, a run is finished."""
    parts: Parts = build(run.config["data"]["examples"], "data.examples")
    task, scores = load_problem(run), outcome.scores
    if "test" in scores and hasattr(task, "measure"):
        scores = {**scores, "test": {**scores["test"], **task.measure(parts.test)}}
    if plots:
        folder = run.path / "plots"
        plot_curves(outcome.history, folder / "loss.png", metrics=["loss"])
        others = [name for name in outcome.scores.get("val", {}) if name != "loss" and "/" not in name]
        if others:
            plot_curves(outcome.history, folder / "metrics.png", metrics=others[:4])
        if hasattr(task, "draw"):
            task.draw(folder, parts)
    figures = {
        "steps": outcome.step,
        "best_step": outcome.best_step,
        "stopped_early": outcome.stopped,
        "examples": {part: len(getattr(parts, part)) for part in ("train", "val", "test")},
        "baselines": parts.baselines,
        "rules": {**parts.rules, **getattr(task, "rules", {})},
    }
    write_json(run.path / "metrics.json", {**figures, **scores})


def describe(metrics: Mapping[str, Any]) -> str:
    """The figures of ``metrics.json`` as lines to read: of the test part, or of validation where there is none."""
    part = next((part for part in ("test", "val") if part in metrics), None)
    if part is None:
        return f"trained for {metrics['steps']} steps; no validation or test examples to measure on"
    lines = [f"{part} ({metrics['examples'][part]} examples), best weights of step {metrics['best_step']}:"]
    rows = {**metrics[part], **{f"baseline/{name}": value for name, value in metrics["baselines"].items()}}
    rules = metrics.get("rules", {})
    lines += [
        f"  {name:28} {value:.4f}  {rules.get(name, '')}".rstrip() for name, value in rows.items() if value is not None
    ]
    return "\n".join([*lines, *(f"  {name}: {rule}" for name, rule in rules.items() if name not in rows)])


def _task(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Task:
    with seeded(config["seed"], torch.device("cpu")):
        return build(config["task"], "task", **facts)
