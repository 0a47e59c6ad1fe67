"""One trial of a search: its runs, one a fold and seed, and the folder that holds all there is to know of it.

``trial.json`` says what is tried and how it ended, ``reports.jsonl`` what the search was told on the way, ``run/`` holds the
run folder (``run/fold-0``, ``run/seed-1``, ... of several). A trial that is started again goes on from there.

The figure of a run is the metric at the weights that it keeps, so a trial's figure is what ``metrics.json`` says of the
validation sets; over several runs it is their mean. On the way it is the mean over the runs done and the one under way. All
trials go through folds and seeds in the same order, so equal ``progress`` compares equals.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distset.checkpoints import Checkpoints
from distset.cluster.config import storage_below
from distset.files import whole_lines, write_atomically
from distset.report import write_json
from distset.search.plan import PBT, Search
from distset.search.space import apply
from distset.train import Plan, Record, Watch
from distset.training import members, train_run

__all__ = ["Lineage", "Report", "TrialFolder", "train_trial", "trial_config"]

Report = dict[str, float]
"""``member`` (which of the runs), ``step`` of it, ``progress`` (per cent of the trial's work), ``value``, ``now``."""


class Lineage(NamedTuple):
    """What a trial trains with: its first settings, and what became of them on the way.

    Attributes:
        settings: by dotted key.
        changes: as `distset.optim.Optimisation` takes them, of the runs whose state was taken over.
    """

    settings: dict[str, Any]
    changes: Sequence[Mapping[str, Any]] = ()

    @property
    def current(self) -> dict[str, Any]:
        """The settings as they stand after all changes."""
        current = dict(self.settings)
        for change in self.changes:
            current.update({f"optim.{name}": value for name, value in change.items() if name != "step"})
        return {key: current[key] for key in self.settings}

    def changed(self, settings: Mapping[str, Any], step: int) -> Lineage:
        """With other settings from ``step`` on."""
        other = {key: value for key, value in settings.items() if value != self.current[key]}
        if not other:
            return self
        change = {"step": step, **{key.removeprefix("optim."): value for key, value in other.items()}}
        return Lineage(self.settings, [*self.changes, change])


class TrialFolder:
    """The folder of one trial.

    Args:
        path: ``.../trials/0003``; its name is the trial's number.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, int(path.name)
        self.run = path / "run"

    @property
    def record(self) -> dict[str, Any] | None:
        """What ``trial.json`` says; None where the trial was never started."""
        path = self.path / "trial.json"
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def lineage(self) -> Lineage | None:
        """What the trial trains with; None where it was never started."""
        record = self.record
        return None if record is None else Lineage(record["settings"], record["changes"])

    @property
    def reports(self) -> list[Report]:
        """What the search was told."""
        return [json.loads(line) for line in whole_lines(self.path / "reports.jsonl")]

    def write(self, status: str, lineage: Lineage, **figures: Any) -> None:
        """Write ``trial.json``.

        Args:
            status: ``"waiting"``, ``"running"``, ``"finished"``, ``"stopped"`` (by the search) or ``"failed"``.
            lineage: what it trains with.
            figures: ``value``, ``std``, ``values``, ``steps``, or ``error``.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        head = {"number": self.number, "status": status, "settings": lineage.settings, "changes": list(lineage.changes)}
        write_json(self.path / "trial.json", {**head, **figures})

    def end(self, status: str, **figures: Any) -> None:
        """Write how a trial ended, unless that was written before: one that was stopped does not fail of it."""
        record, reports = self.record, self.reports
        if record is None or record["status"] not in ("waiting", "running"):
            return
        last = {"value": reports[-1]["value"], "steps": _steps(reports)} if reports else {}
        self.write(status, Lineage(record["settings"], record["changes"]), **{**last, **figures})

    def tell(self, reports: Sequence[Report]) -> None:
        """Write ``reports.jsonl`` anew."""
        write_atomically(self.path / "reports.jsonl", "".join(json.dumps(report) + "\n" for report in reports))

    def adopt(self, state: dict[str, Any], lineage: Lineage, reports: Sequence[Report], storage: str | None) -> None:
        """Become a trial that is where another one was: its checkpoint, what it had told, what it had trained with.

        Args:
            state: the other's checkpoint.
            lineage, reports: the other's.
            storage: URI of this trial's checkpoints, where they are not in its run folder.
        """
        draft, former = self.path / "adopted", self.path / "former"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
        Checkpoints(draft / "checkpoints").save(state)
        if storage is not None:
            from distset.cluster.storage import StorageCheckpoints

            StorageCheckpoints(storage).save(state)
        if self.run.exists():  # out of the way at once: a run of the past would not go on with the new settings
            os.replace(self.run, former)
        self.tell(reports)
        self.write("running", lineage)
        os.replace(draft, self.run)
        shutil.rmtree(former, ignore_errors=True)


def trial_config(base: Mapping[str, Any], search: Search, folder: TrialFolder, lineage: Lineage) -> dict[str, Any]:
    """The configuration of a trial: what ``jobs.train`` would be given to do the same.

    Args:
        base: of the search.
        search: a population's trials have a checkpoint at every evaluation, for others to take over.
        folder: where it runs.
        lineage: what it trains with.
    """
    config = apply(base, lineage.settings)
    if lineage.changes:
        config["optim"]["changes"] = [dict(change) for change in lineage.changes]
    if isinstance(search.scheduler, PBT):
        config["plan"]["checkpoint_every"] = config["plan"]["evaluate_every"]
    config["run"] = {**config["run"], "dir": str(folder.run), "bar": False, "plots": False}
    storage = config["cluster"]["storage"]
    if storage is not None:
        config["cluster"]["storage"] = storage_below(storage, folder.path.name)
    return config


def train_trial(
    config: dict[str, Any], search: Search, folder: TrialFolder, report: Callable[[Report], None]
) -> dict[str, Any]:
    """Train a trial's runs, one after the other, from wherever they are.

    Args:
        config: of `trial_config`.
        search: says what is measured.
        folder: of the trial.
        report: told of every evaluation but the last, once its checkpoint is written.

    Returns:
        ``value`` (mean), ``std``, ``values`` by run, ``steps`` in all.

    Raises:
        ValueError: where the validation metrics lack the one searched for; whatever a run raises.
    """
    assert search.metric is not None, "read_search() names it"
    runs = dict(members(config))
    values: dict[str, float] = {}
    steps = 0
    for place, (name, own) in enumerate(runs.items()):
        judge = _Judge(search.metric, config["plan"]["monitor"])
        watch = _Reports(judge, folder, list(values.values()), (place, len(runs)), report)
        train_run(own, folder.run / name, watch=watch)
        records = [json.loads(line) for line in (folder.run / name / "metrics.jsonl").read_text().splitlines()]
        values[name] = judge.value(records)
        steps += int(records[-1]["step"])
        if place + 1 < len(runs):
            watch.flush()
    spread = statistics.stdev(values.values()) if len(values) > 1 else None
    return {"value": statistics.fmean(values.values()), "std": spread, "values": values, "steps": steps}


class _Judge:
    """The figure of one run, from its records."""

    def __init__(self, metric: str, monitor: str | None) -> None:
        self.metric, self.plan = metric, Plan(monitor=monitor)

    def value(self, records: Sequence[Mapping[str, Any]]) -> float:
        """The metric at the weights that the run keeps: those of the best record by the monitor, or of the last one."""
        measured = [record for record in records if _measured(record)]
        if not measured:
            raise ValueError("search.metric: there are no validation sets to measure it on; the search needs some")
        self.check(measured[-1])
        kept = measured[-1]
        if self.plan.monitor is not None:
            pick, monitor = min if self.plan.minimise else max, f"val/{self.plan.monitor}"
            finite = [record for record in measured if record[monitor] is not None]  # null in metrics.jsonl
            kept = pick(finite or measured[:1], key=lambda record: record[monitor])
        value = kept[self.metric]
        return math.nan if value is None else value

    def check(self, record: Mapping[str, Any]) -> None:
        if self.metric not in record:
            found = ", ".join(key for key in record if key.startswith("val/"))
            raise ValueError(f"search.metric: got {self.metric!r}, which the task does not measure; it measures {found}")


class _Reports(Watch):
    """Makes reports of a run's evaluations, and passes each on when its checkpoint is written: at the step after."""

    def __init__(
        self,
        judge: _Judge,
        folder: TrialFolder,
        before: list[float],
        place: tuple[int, int],
        report: Callable[[Report], None],
    ) -> None:
        self.judge, self.folder, self.before, self.report = judge, folder, before, report
        self.place, self.count = place
        self.waiting: Report | None = None

    def started(self, step: int, total: int, history: list[Record]) -> None:
        self.total, self.records, self.waiting = total, list(history), None
        told = [report for report in self.folder.reports if (report["member"], report["step"]) <= (self.place, step)]
        self.folder.tell(told)
        measured = [record for record in history if _measured(record)]
        if measured and (self.place, measured[-1]["step"]) not in [(report["member"], report["step"]) for report in told]:
            self.waiting = self._report(measured[-1])  # the process was lost between its checkpoint and the step after

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        self.flush()

    def recorded(self, record: Record) -> None:
        self.records.append(record)
        if _measured(record):
            self.judge.check(record)
            self.waiting = self._report(record)

    def _report(self, record: Record) -> Report:
        return {
            "member": self.place,
            "step": record["step"],
            "progress": 100 * (self.place + record["step"] / self.total) / self.count,
            "value": statistics.fmean([*self.before, self.judge.value(self.records)]),
            "now": statistics.fmean([*self.before, record[self.judge.metric]]),
        }

    def flush(self) -> None:
        """Pass on what waits."""
        report, self.waiting = self.waiting, None
        if report is not None:
            with open(self.folder.path / "reports.jsonl", "a") as file:
                file.write(json.dumps(report) + "\n")
            self.report(report)


def _measured(record: Mapping[str, Any]) -> bool:
    """Whether a record is of validation sets."""
    return any(key.startswith("val/") for key in record)


def _steps(reports: Sequence[Report]) -> int:
    """Steps over all runs, as far as the reports know."""
    return int(sum({report["member"]: report["step"] for report in reports}.values()))
