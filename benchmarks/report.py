"""What every benchmark prints: tables for people, one JSON object as its last line for machines, and an exit code.

A benchmark ends with ``raise SystemExit(report("read", figures, bars))``; ``bars`` says what must hold of its figures.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["report", "table"]

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


def table(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Print rows as an aligned table; the keys of the first row are its columns."""
    if not rows:
        return
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    if title:
        print(f"\n{title}")
    for number, line in enumerate(cells):
        left, *rest = line
        print("  ".join([left.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def report(name: str, figures: Mapping[str, Any], bars: Mapping[str, tuple[float, str, float]]) -> int:
    """Print figures and bars, then one line of JSON; returns the exit code, 1 where a bar does not hold.

    Args:
        name: of the benchmark.
        figures: what was measured: numbers or short texts.
        bars: ``{bar: (value, comparison, wanted)}``, the comparison one of ``>= <= > < ==``. A value that is not a number
            holds no bar.

    Raises:
        ValueError: for an unknown comparison.

    Example:
        >>> code = report("read", {"GB/s": 3.1}, {"share of copy": (0.62, ">=", 0.35)})  # doctest: +ELLIPSIS
        <BLANKLINE>
        figures...
        {"benchmark": "read", "figures": {"GB/s": 3.1}, "bars": {"share of copy": [0.62, 0.35, true]}}
        >>> code
        0
    """
    held = {bar: _holds(*triple) for bar, triple in bars.items()}
    table([{"figure": key, "value": value} for key, value in figures.items()], title="figures")
    rows = [
        {"bar": bar, "value": value, "wanted": f"{comparison} {_cell(wanted)}", "holds": "yes" if held[bar] else "NO"}
        for bar, (value, comparison, wanted) in bars.items()
    ]
    table(rows, title="bars")
    found = {bar: [_plain(value), _plain(wanted), held[bar]] for bar, (value, _, wanted) in bars.items()}
    plain = {key: _plain(value) for key, value in figures.items()}
    print(json.dumps({"benchmark": name, "figures": plain, "bars": found}, allow_nan=False), flush=True)
    return 0 if all(held.values()) else 1


def _holds(value: float, comparison: str, wanted: float) -> bool:
    if comparison not in COMPARISONS:
        raise ValueError(f"bars: got the comparison {comparison!r}, wanted one of {', '.join(COMPARISONS)}")
    return bool(COMPARISONS[comparison](value, wanted))


def _plain(value: Any) -> Any:
    """A value JSON knows: tensor and numpy scalars as numbers, what is not finite as null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
