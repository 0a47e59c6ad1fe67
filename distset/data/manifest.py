"""What became of each set of an ingest: a table for people, a small file a set for the next start."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distset.files import write_atomically

__all__ = ["Outcome", "read_outcome", "write_manifest"]

COLUMNS = ("set_id", "status", "elements", "seconds", "reason", "mpp", "tissue", "image")


class Outcome(NamedTuple):
    """What became of a set.

    Attributes:
        number, set_id: its place among the source's sets, and its name.
        status: "written", "empty" (nothing to store, such as a slide without tissue) or "failed".
        elements, seconds: how many, and how long it took.
        reason: why it was not written.
        mpp, tissue, image: of a slide; None for others.
    """

    number: int
    set_id: str
    status: str
    elements: int
    seconds: float
    reason: str = ""
    mpp: float | None = None
    tissue: float | None = None
    image: str | None = None

    @staticmethod
    def of(
        number: int, set_id: str, status: str, began: float, *, elements: int = 0, reason: str = "", extra: Any = None
    ) -> Outcome:
        """One of a set that was begun at ``began`` (`time.perf_counter`), with what its bag says."""
        said = extra or {}
        return Outcome(
            number, set_id, status, elements, round(time.perf_counter() - began, 3), " ".join(reason.split()),
            said.get("mpp"), said.get("tissue"), said.get("image"),
        )  # fmt: skip

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(self._asdict()) + "\n")


def read_outcome(path: Path) -> Outcome | None:
    """What `Outcome.save` wrote; None where there is none."""
    return Outcome(**json.loads(path.read_text())) if path.exists() else None


def write_manifest(path: Path, outcomes: Iterable[Outcome]) -> None:
    """One line a set, in the order of the source, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for outcome in sorted(outcomes):
        line: Mapping[str, Any] = outcome._asdict()
        writer.writerow(["" if line[name] is None else line[name] for name in COLUMNS])
    write_atomically(path, text.getvalue())
