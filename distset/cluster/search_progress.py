"""What the user sees of a search: a line for each trial that ended, and a bar where there is a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ray import tune

from distset.search.plan import Search
from distset.search.results import shown
from distset.search.trial import Lineage, TrialFolder

__all__ = ["Progress"]


class Progress(tune.Callback):
    """Writes down how trials end, and shows it; a context manager around the search.

    Args:
        search: what is searched for.
        trials: all trials, those that are done included.
        bar: whether to draw a bar (on standard error; never where that is no terminal).
    """

    def __init__(self, search: Search, trials: Sequence[TrialFolder], *, bar: bool = True) -> None:
        self.search, self.trials = search, list(trials)
        self.shares = {trial.number: 100.0 for trial in trials if _ended(trial)}
        self._wanted, self._bar = bar and sys.stderr.isatty(), None

    @property
    def left(self) -> list[TrialFolder]:
        """Trials that have not ended."""
        return [trial for trial in self.trials if not _ended(trial)]

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._advance(_number(trial), result.get("progress", 0.0))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(_number(trial), "stopped")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(_number(trial), "failed", error="its process was lost; see cluster.max_failures")

    def __enter__(self) -> Progress:
        self._level = logging.getLogger("ray.tune").level
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the lines below say what it would say
        if self._wanted:
            from tqdm import tqdm

            shape = "{l_bar}{bar}| {remaining} left{postfix}"
            total = 100 * len(self.trials)
            self._bar = tqdm(total=total, initial=sum(self.shares.values()), bar_format=shape, desc="search", leave=False)
        waiting = len(self.left)
        self._show(
            f"{waiting} of {len(self.trials)} trials to train; the figure is {self.search.metric} ({self.search.mode})"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        logging.getLogger("ray.tune").setLevel(self._level)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _ended(self, number: int, status: str, **figures: Any) -> None:
        trial = self.trials[number]
        trial.end(status, **figures)
        self._advance(number, 100.0)
        self._show(f"trial {number:04d}  {describe(trial)}  ({len(self.trials) - len(self.left)} of {len(self.trials)})")

    def _advance(self, number: int, progress: float) -> None:
        self.shares[number] = progress
        if self._bar is not None:
            self._bar.set_postfix_str(f" {len(self.trials) - len(self.left)} of {len(self.trials)} trials", refresh=False)
            self._bar.update(sum(self.shares.values()) - self._bar.n)

    def _show(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line)
        sys.stdout.flush()


def describe(trial: TrialFolder) -> str:
    """How a trial ended, in a line."""
    record = trial.record
    assert record is not None, "a trial that ended has a record"
    figure = shown(record.get("value")) + (f" ± {shown(record['std'])}" if record.get("std") is not None else "")
    if record["status"] == "failed":
        figure = record["error"].splitlines()[0]
    settings = "  ".join(
        f"{key}={shown(value)}" for key, value in Lineage(record["settings"], record["changes"]).current.items()
    )
    return f"{record['status']:8}  {figure:10}  {settings}"


def _ended(trial: TrialFolder) -> bool:
    return (trial.record or {}).get("status") in ("finished", "stopped", "failed")


def _number(trial: Any) -> int:
    return int(str(trial))
