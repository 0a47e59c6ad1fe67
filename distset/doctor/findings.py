"""What a check finds: a level, what is so, and what to do about it; as a table, as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

__all__ = ["Finding", "fail", "findings_of", "ok", "table", "warn", "worst"]

Level = Literal["ok", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail")


class Finding(NamedTuple):
    """One line of the doctor's report.

    Attributes:
        level: ``"ok"``; ``"warn"`` for what may be meant so; ``"fail"`` for what would end the run, or spoil it.
        message: what is so.
        advice: what to do about it.
        check: the check that found it.
    """

    level: Level
    message: str
    advice: str = ""
    check: str = ""


def ok(message: str) -> Finding:
    return Finding("ok", message)


def warn(message: str, advice: str = "") -> Finding:
    return Finding("warn", message, advice)


def fail(message: str, advice: str = "") -> Finding:
    return Finding("fail", message, advice)


def findings_of(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of one check under its name; an error that it meets is a finding as well, and ends it."""
    try:
        for finding in look():
            yield finding._replace(check=check)
    except Exception as error:  # whatever it is, the other checks have something to say as well
        name = "" if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: "
        yield Finding("fail", name + " ".join(str(error).split()), check=check)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def table(findings: Sequence[Finding], width: int = 110) -> str:
    """A line or more for each finding: level, check, message, and under it the advice."""
    lines = []
    column = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        head = f"{finding.level:4}  {finding.check:{column}}  "
        blank = " " * len(head)
        lines += textwrap.wrap(finding.message, width, initial_indent=head, subsequent_indent=blank)
        if finding.advice:
            lines += textwrap.wrap(finding.advice, width, initial_indent=f"{blank}-> ", subsequent_indent=f"{blank}   ")
    return "\n".join(lines)
