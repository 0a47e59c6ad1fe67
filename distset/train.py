r"""`fit`: train on sets of any size, step by step, so that a run killed at any moment goes on as if it had not been.

What a step reads and draws is a pure function of (seed, step): the order of an epoch comes from (seed, epoch), everything
random inside a set's loss from (seed, step, set id). So the step is the position in the data, and a checkpoint holds no
stream of random numbers. The loss of a step is the mean over its *global* batch,

.. math:: L_t = \frac{1}{|B_t|} \sum_{b \in B_t} \ell(b),

whatever the number of workers: each takes its share of the sets, one after the other, so that memory does not grow with
the batch, and one all-reduce adds the gradients up. What a model learns without gradients is a mean over the workers. On a
CPU a resumed run ends with the same bits.

Example:
    >>> import torch
    >>> from distset import InMemory
    >>> from distset.tasks.bag_models import deepsets
    >>> from distset.tasks.bags import BagTask
    >>> from distset.train import Example, Plan, fit
    >>> bags = [Example(InMemory(torch.randn(20, 4) + i % 2, name=str(i)), i % 2) for i in range(16)]
    >>> encoder, head = deepsets(dim=4, outputs=1)
    >>> task = BagTask.of(encoder, head, classes=["no", "yes"])
    >>> fitted = fit(task, bags, bags, plan=Plan(epochs=3, batch=4))
    >>> fitted.step, sorted(fitted.history[-1])[:4]
    (12, ['epoch', 'step', 'val/accuracy', 'val/auroc'])
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distset.build import nearest
from distset.carried import Carried
from distset.checkpoints import Checkpoints, check_weights
from distset.optim import Optimisation
from distset.seeds import generator_for, seed_for, seeded
from distset.task import BatchTask, Example, PacedTask, Parts, Task
from distset.waiting import Stopwatch
from distset.world import World, current_world

__all__ = [
    "BatchTask", "DivergedError", "Example", "Fitted", "Parts", "Plan", "Task", "Watch", "Watches",
    "World", "fit", "predict_all",
]  # fmt: skip

Record = dict[str, float]


class DivergedError(ValueError):
    """A loss or a gradient that is not finite."""


class Plan(NamedTuple):
    """How long, how much at a time, and when to look.

    Attributes:
        epochs: passes over the training sets; None to go by ``max_steps`` alone.
        batch: sets a step, over all workers.
        seed: of everything random.
        log_every: steps between records of the training loss.
        evaluate_every: steps between evaluations; None for once an epoch.
        checkpoint_every: steps between checkpoints; None for once an epoch. The last step always has one.
        monitor: the validation metric that picks the best weights; lower is better for ``loss`` and names that end in
            ``loss`` or ``error``, higher for all others. None keeps the last weights, for validation sets too few to
            choose by.
        patience: stop after this many evaluations without a better one; None for never.
        precision: ``"float32"`` (the model's own precision) or ``"bfloat16"`` autocast.
        max_steps: the run ends after so many steps, whatever the epochs; None for no such end.
    """

    epochs: int | None = 10
    batch: int = 8
    seed: int = 0
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    monitor: str | None = "loss"
    patience: int | None = None
    precision: str = "float32"
    max_steps: int | None = None

    def check(self, train: int, valid: int) -> None:
        """Raise for values out of range, given the number of training and validation sets."""
        for name in ("epochs", "batch", "log_every", "evaluate_every", "checkpoint_every", "patience", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, wanted at least 1")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("epochs: got None without max_steps, wanted one of them: when does the run end?")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: got {self.precision!r}, wanted 'float32' or 'bfloat16'")
        if train < 1:
            raise ValueError("train: got no training sets, wanted at least one; is the split empty?")
        if self.patience is not None and valid < 1:
            raise ValueError("patience: got no validation sets to watch; give some, or set patience to None")
        if self.patience is not None and self.monitor is None:
            raise ValueError("patience: got no monitor to be patient with; name a metric, or set patience to None")

    @property
    def minimise(self) -> bool:
        return self.monitor is not None and self.monitor.endswith(("loss", "error"))

    def steps(self, size: int) -> int:
        """Steps of the whole run over ``size`` training sets; the last batch of an epoch may be smaller."""
        ends = [self.max_steps, None if self.epochs is None else self.epochs * math.ceil(size / self.batch)]
        return min(end for end in ends if end is not None)

    def indices(self, step: int, size: int) -> list[int]:
        """The training sets of step ``step`` (from 0): a pure function of seed and step.

        Example:
            >>> plan = Plan(epochs=2, batch=2)
            >>> sorted(plan.indices(0, 3) + plan.indices(1, 3))
            [0, 1, 2]
        """
        per_epoch = math.ceil(size / self.batch)
        epoch, place = divmod(step, per_epoch)
        order = _order(self.seed, epoch, size)
        return order[place * self.batch : (place + 1) * self.batch]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    return torch.randperm(size, generator=generator_for(seed, "epoch", epoch)).tolist()


class Watch:
    """What may look on while `fit` works; override what is of use. Called on every process."""

    def started(self, step: int, total: int, history: list[Record]) -> None:
        """Training starts, or goes on at ``step`` of ``total`` with the records so far."""

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        """``step`` steps are done; the last one read ``sets`` sets of ``elements`` elements over all processes."""

    def paced(self, step: int, seconds: float, waited: float) -> None:
        """Step ``step`` took this process ``seconds``, ``waited`` of them for elements; no part of the history."""

    def recorded(self, record: Record) -> None:
        """A line of the history: training loss and rate, or validation metrics."""


class Watches(Watch):
    """Several watches as one, told in order."""

    def __init__(self, *watches: Watch) -> None:
        self.watches = watches

    def started(self, step: int, total: int, history: list[Record]) -> None:
        for watch in self.watches:
            watch.started(step, total, history)

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        for watch in self.watches:
            watch.stepped(step, sets, elements, loss)

    def paced(self, step: int, seconds: float, waited: float) -> None:
        for watch in self.watches:
            watch.paced(step, seconds, waited)

    def recorded(self, record: Record) -> None:
        for watch in self.watches:
            watch.recorded(record)


class Fitted(NamedTuple):
    """What `fit` leaves behind; the task's model holds the last weights.

    Attributes:
        step: steps done.
        best: the best weights by ``monitor`` (the last ones without validation sets): ``model``, ``step``, ``value``.
        history: every record.
        stopped: True where patience ended the run.
    """

    step: int
    best: dict[str, Any]
    history: list[Record]
    stopped: bool


def fit(
    task: Task,
    train: Sequence[Example],
    valid: Sequence[Example] = (),
    *,
    plan: Plan = Plan(),  # noqa: B008  (a NamedTuple does not change)
    optimisation: Optimisation | None = None,
    checkpoints: Checkpoints | None = None,
    watch: Watch | None = None,
    meta: dict[str, Any] | None = None,
) -> Fitted:
    """Train ``task.model`` in place; where ``checkpoints`` holds a state, go on from it.

    Args:
        task: model, loss, metrics.
        train: the training sets; opened one at a time, so a lazy sequence is welcome. A set's ``name`` seeds its draws.
        valid: the validation sets, for the choice of the best weights and early stopping.
        plan: how long, how much at a time.
        optimisation: AdamW at its defaults if None.
        checkpoints: where to save and to go on from; None for nowhere.
        watch: told of every step and record.
        meta: plain data kept in every checkpoint, such as the configuration that rebuilds the model.

    Raises:
        ValueError: for plans out of range, a checkpoint of another model or another plan, a loss or gradient that is not
            finite, a ``monitor`` that the task's metrics lack.
    """
    plan.check(len(train), len(valid))
    loop = _Loop(task, train, valid, plan, optimisation or Optimisation())
    saved = None if checkpoints is None else checkpoints.load()
    if saved is not None:
        loop.load_state(saved)
    watch = watch or Watch()
    if len(set(loop.world.gather(loop.step))) > 1:
        raise ValueError("checkpoint: the workers found different ones; keep them in storage that every worker sees")
    watch.started(loop.step, loop.total, loop.history)
    while loop.step < loop.total and not loop.stopped:
        clock = Stopwatch()
        sets, elements, loss = loop.train_step()
        seconds, waited = clock.read()
        watch.stepped(loop.step, sets, elements, loss)
        watch.paced(loop.step, seconds, waited)
        fresh = [record for record in (loop.log(), loop.evaluate()) if record]
        loop.history.extend(fresh)
        for record in fresh:
            watch.recorded(record)
        if checkpoints is not None and loop.world.rank == 0 and loop.due(plan.checkpoint_every):
            checkpoints.save(loop.state(meta or {}))
    return Fitted(loop.step, loop.best or loop.weights(math.nan), loop.history, loop.stopped)


def predict_all(task: Task, examples: Sequence[Example], *, precision: str = "float32") -> tuple[list[Tensor], list[Any]]:
    """The outputs and targets of all examples, in order, on every process; each computes its share, in eval mode."""
    world = current_world()
    task.model.eval()
    mine = []
    with torch.no_grad(), _autocast(task.model, precision), world.step():
        for index in world.share(range(len(examples))):
            example = examples[index]
            mine.append((task.predict(world.place(example.set)).cpu(), example.target))
    pairs: list[Any] = [None] * len(examples)
    for part, share in enumerate(world.gather(mine)[:: world.team]):
        pairs[part :: world.parts] = share
    return [output for output, _ in pairs], [target for _, target in pairs]


class _Loop:
    """The state of a run and the ways it changes; all of it is in `state`."""

    def __init__(
        self, task: Task, train: Sequence[Example], valid: Sequence[Example], plan: Plan, optimisation: Optimisation
    ) -> None:
        self.task, self.train, self.valid, self.plan = task, train, valid, plan
        self.world = current_world()
        self.optimisation, self.optimiser = optimisation, optimisation.create(task.model)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.carried = Carried(task.model)
        self.total = plan.steps(len(train))
        self.step, self.bad, self.stopped = 0, 0, False
        self.losses: list[float] = []  # since the last record
        self.norm = math.nan
        self.best: dict[str, Any] | None = None
        self.history: list[Record] = []

    def due(self, every: int | None) -> bool:
        """Whether something that happens every ``every`` steps (None: once an epoch) happens after this step."""
        every = math.ceil(len(self.train) / self.plan.batch) if every is None else every
        return self.step % every == 0 or self.step == self.total or self.stopped

    def train_step(self) -> tuple[int, int, float]:
        """One step; returns the sets and elements it read over all processes, and its loss."""
        self.task.model.train()
        if isinstance(self.task, PacedTask):
            self.task.progress(self.step / self.total)
        indices = self.plan.indices(self.step, len(self.train))
        for parameter in self.parameters:
            # Zeros, not None: whether a parameter counts as used must not depend on which process met it.
            parameter.grad = torch.zeros_like(parameter)
        self.carried.watch()
        with self.world.step():
            loss, elements = self._accumulate(indices)
        tally = torch.tensor([loss, elements, *self.carried.written()], device=self.parameters[0].device)
        self.world.add_up([*(p.grad for p in self.parameters if p.grad is not None), tally])
        loss, elements, *writers = tally.tolist()
        self.carried.agree(self.world, writers)
        self._check_finite("loss", loss, indices)
        norm = self.optimisation.step(self.optimiser, self.step, self.total)
        self.norm = float(norm)
        self._check_finite("gradient's norm", self.norm, indices)
        self.step += 1
        self.losses.append(loss)
        return len(indices), int(elements), loss

    def _accumulate(self, indices: list[int]) -> tuple[float, int]:
        """Add this process's share of the gradient up, one group of sets after the other."""
        total, elements = 0.0, 0
        size = self.task.at_once if isinstance(self.task, BatchTask) else 1
        starts = range(0, len(indices), size)
        for start in self.world.share(starts):
            group = indices[start : start + size]
            examples = [Example(self.world.place(each.set), each.target) for each in (self.train[i] for i in group)]
            seed = seed_for(self.plan.seed, self.step, examples[0].set.name or group[0])
            # Dropout outside the encoder draws from torch's default generator: seeded here, put back after.
            with seeded(seed_for(seed, "task"), self.parameters[0].device):
                with _autocast(self.task.model, self.plan.precision):
                    loss = self._loss(examples, seed) * (len(group) / len(indices))
                loss.backward()
            total += float(loss.detach())
            elements += sum(len(example.set) for example in examples)
        return total, elements

    def _loss(self, examples: list[Example], seed: int) -> Tensor:
        """The mean loss of a group, which is one set unless the task takes more at once."""
        if isinstance(self.task, BatchTask):
            return self.task.batch_loss(examples, seed=seed)
        return self.task.loss(examples[0], seed=seed)

    def log(self) -> Record | None:
        if not self.due(self.plan.log_every):
            return None
        rate = self.optimisation.rate(self.step - 1, self.total)
        mean = sum(self.losses) / len(self.losses)
        self.losses = []
        return self._record({"train/loss": mean, "train/lr": rate, "train/gradient_norm": self.norm})

    def evaluate(self) -> Record | None:
        """Validation metrics, where they are due; keeps the best weights and counts evaluations without better ones."""
        if not len(self.valid) or not self.due(self.plan.evaluate_every):
            return None
        metrics = self.task.metrics(*predict_all(self.task, self.valid, precision=self.plan.precision))
        if self.plan.monitor is not None:
            self._choose(self.plan.monitor, metrics)
        return self._record({f"val/{name}": figure for name, figure in metrics.items()})

    def _choose(self, monitor: str, metrics: dict[str, float]) -> None:
        if monitor not in metrics:
            hint = nearest(monitor, metrics)
            raise ValueError(f"monitor: got {monitor!r}, which the task does not measure; {hint}")
        value = metrics[monitor]
        if math.isnan(value):
            raise ValueError(f"monitor: {monitor} of the validation sets is nan; do they hold every class?")
        if self.best is None or (value < self.best["value"] if self.plan.minimise else value > self.best["value"]):
            self.best, self.bad = self.weights(value), 0
        else:
            self.bad += 1
            self.stopped = self.plan.patience is not None and self.bad >= self.plan.patience

    def weights(self, value: float) -> dict[str, Any]:
        model = {name: t.detach().to("cpu", copy=True) for name, t in self.task.model.state_dict().items()}
        return {"step": self.step, "value": value, "model": model}

    def state(self, meta: dict[str, Any]) -> dict[str, Any]:
        return {
            "plan": self._settings(),
            "model": self.task.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": {key: getattr(self, key) for key in ("step", "bad", "stopped", "losses", "norm", "history")},
            "best": self.best or (self.weights(math.nan) if self.step == self.total else None),
            "meta": meta,
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        done = saved["progress"]["step"]
        now, then = _until(self._settings(), done), _until(saved["plan"], done)
        changed = [f"{key} {then.get(key)!r} -> {now[key]!r}" for key in now if then.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"checkpoint: was made with another plan ({', '.join(changed)}), so going on would not be the same run; "
                f"keep the plan, or start in another folder"
            )
        check_weights(self.task.model, saved["model"])
        self.task.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        for key, value in saved["progress"].items():
            setattr(self, key, value)
        self.best = saved["best"]

    def _settings(self) -> dict[str, Any]:
        """What must be the same where a run goes on."""
        settings = {**self.plan._asdict(), **self.optimisation.settings(), "training sets": len(self.train)}
        del settings["checkpoint_every"]
        return settings

    def _record(self, figures: Record) -> Record:
        epoch = self.step / math.ceil(len(self.train) / self.plan.batch)
        return {"step": self.step, "epoch": round(epoch, 4), **figures}

    def _check_finite(self, what: str, value: float, indices: list[int]) -> None:
        if not math.isfinite(value):
            names = ", ".join(self.train[index].set.name or str(index) for index in indices[:8])
            raise DivergedError(
                f"loss: the {what} is {value} at step {self.step + 1} (sets {names}); lower optim.lr, set optim.clip, or "
                f"look for extreme values in these sets"
            )


def _until(settings: dict[str, Any], step: int) -> dict[str, Any]:
    """The settings as far as the steps before ``step`` (from 0) knew them: what is changed later may differ."""
    return {**settings, "changes": [change for change in settings.get("changes", []) if change["step"] < step]}


def _autocast(model: nn.Module, precision: str) -> torch.autocast:
    device = next(model.parameters()).device.type
    # No cache of cast weights: what a sweep casts without a graph must not be met again with one.
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
