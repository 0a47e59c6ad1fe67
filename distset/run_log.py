"""What a run writes while it works: ``metrics.jsonl``, ``speed.jsonl``, TensorBoard, ``train.log``, a progress bar.

Where a run goes on from a checkpoint, records after it are taken back: the files are written anew from the checkpoint's
history, so that no step stands in them twice. Times are no part of the history, which repeats bit for bit: they have a
file of their own.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from distset.files import naming_full_disk, whole_lines, write_atomically
from distset.train import Record, Watch

__all__ = ["RunLog", "log"]

log = logging.getLogger("distset")


class RunLog(Watch):
    """Writes the files of a run folder, and draws the bar; a context manager.

    Messages go to the logger "distset": to the terminal and to ``train.log``.

    Args:
        folder: the run folder.
        bar: whether to draw a progress bar (on standard error; never where that is no terminal).

    Raises:
        ValueError: on entry, where another process is writing there.
    """

    def __init__(self, folder: str | Path, *, bar: bool = True) -> None:
        self.folder = Path(folder)
        self._bar = _Bar(enabled=bar and sys.stderr.isatty())
        self._speed = _Speed(self.folder / "speed.jsonl")
        self._writer: Any = None

    def started(self, step: int, total: int, history: list[Record]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        lost = "a worker was lost; " if self._writer is not None else ""
        self._close()
        if lost or step:
            log.info("%sgoes on at step %d of %d", lost, step, total)
        self._metrics = self.folder / "metrics.jsonl"
        with naming_full_disk(self.folder):
            write_atomically(self._metrics, "".join(map(_line, history)))
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            self._writer = SummaryWriter(str(self.folder / "tensorboard"))
            for record in [*history, *self._speed.start(step)]:
                self._scalars(record)
        self._bar.start(step, total)

    def stepped(self, step: int, sets: int, elements: int, loss: float) -> None:
        self._bar.step(step, sets, elements, loss)
        self._speed.read(sets, elements)

    def paced(self, step: int, seconds: float, waited: float) -> None:
        self._speed.took(seconds, waited)

    def recorded(self, record: Record) -> None:
        with naming_full_disk(self.folder):
            with open(self._metrics, "a") as file:
                file.write(_line(record))
            self._scalars(record)
            if "train/loss" in record:
                for speed in self._speed.write(record["step"]):
                    self._scalars(speed)
        figures = {key: value for key, value in record.items() if key.startswith("val/")}
        if figures:
            shown = ", ".join(f"{key.removeprefix('val/')} {value:.3f}" for key, value in figures.items())
            log.info("step %d, epoch %.1f: validation %s", record["step"], record["epoch"], shown)

    def __enter__(self) -> RunLog:
        file = logging.FileHandler(self.folder / "train.log")
        try:
            fcntl.flock(
                cast(TextIO, file.stream), fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # held until the process ends, however it ends
        except BlockingIOError as error:
            file.close()
            raise ValueError(f"run.dir: another process is training in {self.folder}; wait for it, or stop it") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._handlers = [file, _Terminal()]
        log.setLevel(logging.INFO)
        for handler in self._handlers:
            log.addHandler(handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if error is not None:
            self._handlers[0].emit(log.makeRecord(log.name, logging.ERROR, "", 0, f"ended by {error!r}", (), None))
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()

    def _close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalars(self, record: Record) -> None:
        for key, value in record.items():
            if key not in ("step", "epoch"):
                self._writer.add_scalar(key, value, int(record["step"]))


class _Speed:
    """Lines of ``speed.jsonl``: means over the steps since the line before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._steps, self._sets, self._elements = 0, 0, 0
        self._seconds, self._waited = 0.0, 0.0

    def start(self, step: int) -> list[Record]:
        """Take back what came after ``step``; returns what stays."""
        self._clear()
        kept = [record for record in map(json.loads, whole_lines(self.path)) if record["step"] <= step]
        write_atomically(self.path, "".join(map(_line, kept)))
        return kept

    def read(self, sets: int, elements: int) -> None:
        self._sets, self._elements = self._sets + sets, self._elements + elements

    def took(self, seconds: float, waited: float) -> None:
        self._steps, self._seconds, self._waited = self._steps + 1, self._seconds + seconds, self._waited + waited

    def write(self, step: float) -> list[Record]:
        """Write the line of ``step``, and return it; nothing where no step was timed."""
        if not self._steps:
            return []
        record = {
            "step": step,
            "speed/step_seconds": self._seconds / self._steps,
            "speed/input_wait_seconds": self._waited / self._steps,
            "speed/sets_per_second": self._sets / self._seconds,
            "speed/elements_per_second": self._elements / self._seconds,
        }
        with open(self.path, "a") as file:
            file.write(_line(record))
        self._clear()
        return [record]

    def _clear(self) -> None:
        self._steps, self._sets, self._elements = 0, 0, 0
        self._seconds, self._waited = 0.0, 0.0


class _Bar:
    """Steps done, sets and elements a second over the last half minute, time left."""

    WINDOW = 30.0

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.bar = enabled, None
        self.recent: deque[tuple[float, int, int]] = deque()

    def start(self, step: int, total: int) -> None:
        if self.enabled:
            from tqdm import tqdm

            shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
            self.bar = tqdm(total=total, initial=step, bar_format=shape, desc="training", leave=False, mininterval=0.2)
        self.recent.clear()

    def step(self, step: int, sets: int, elements: int, loss: float) -> None:
        if self.bar is None:
            return
        now = time.monotonic()
        self.recent.append((now, sets, elements))
        while now - self.recent[0][0] > self.WINDOW:
            self.recent.popleft()
        seconds = now - self.recent[0][0]
        if seconds > 0:
            _, *counted = zip(*list(self.recent)[1:])
            rates = [sum(column) / seconds for column in counted]
            self.bar.set_postfix_str(f" {rates[0]:.1f} sets/s, {rates[1]:,.0f} elements/s, loss {loss:.3f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class _Terminal(logging.Handler):
    """Prints above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def _line(record: Record) -> str:
    """A line of JSON; figures that are not finite, which JSON has no word for, are null."""
    return json.dumps({key: value if math.isfinite(value) else None for key, value in record.items()}) + "\n"
