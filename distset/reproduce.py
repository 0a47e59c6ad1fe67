"""Tables of results: the runs of a table, what they measured beside what was published, and the page that shows it.

A `Table` is rows; a row is a configuration of ``jobs.train`` over some seeds (and folds). `collect` trains what is not
trained yet and gathers the test figures; `render` turns all gathered tables into one Markdown page. No figure is
typed by hand.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distset.bags.evaluate import evaluate
from distset.bags.predict import Work
from distset.files import write_atomically
from distset.report import write_json
from distset.report.table_figures import draw_table
from distset.train import DivergedError
from distset.training import final_figures, members, train_run

__all__ = ["Row", "Table", "collect", "measure", "render", "verdict"]

BENCHMARKS = "benchmarks.json"

HEAD = """# Results
Written by `python -m jobs.reproduce` from the runs' own figures: mean ± standard deviation over seeds or folds. Where a
published or wanted figure is not reached, it stands as missed. A figure is *reached* if it is at least as good, *within
spread* if it is worse by no more than its standard deviation.
"""

SPEED = """## Speed and memory
Ratios to the named baseline in the same run, by the scripts in `benchmarks/`, which say what is measured and exit 1 where a
bar does not hold. `python -m jobs.reproduce benchmarks=all` measures them and writes this table.
"""


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        name: of the method or setting.
        config: the resolved configuration of ``jobs.train``, with its ``seeds`` and ``folds``.
        published: by figure, what the paper reports or what is wanted; the name of another row wants what that one has.
        command: what a user types to get this row.
        evaluate: a configuration of ``jobs.evaluate`` (of any run): the row also has ``elements/attention``,
            ``elements/contribution`` and ``elements/alone``, see `distset.bags.evaluate.find_elements`; None for no such.
    """

    name: str
    config: dict[str, Any]
    published: dict[str, float | str]
    command: str
    evaluate: dict[str, Any] | None = None


class Table(NamedTuple):
    """One table of results.

    Attributes:
        name: of its files.
        title, text: heading and what a reader must know.
        figures: the test figures shown, by the name they are shown under.
        lower: those of them where less is better.
        rows: its lines.
        draw: what is drawn of it, see `distset.report.table_figures`.
        before: what a user types before the rows' commands, such as the ingestion of their store.
    """

    name: str
    title: str
    text: str
    figures: dict[str, str]
    lower: list[str]
    rows: list[Row]
    draw: Mapping[str, Any] = {}
    before: Sequence[str] = ()


def collect(table: Table, runs: str | Path, results: str | Path, rows: Sequence[str] | None = None) -> dict[str, Any]:
    """Train what is not trained yet, gather the figures, and write ``results/<table>.json`` after every row.

    Args:
        table: what to run.
        runs: folder of the run folders, ``runs/<table>/<row>/<member>``; finished ones are only read.
        results: folder of the gathered tables, and of what is drawn of them.
        rows: names of the rows to run; all if None. The others keep what is known of them, if their command is still
            the same, or stand as not measured.
    """
    path = Path(results) / f"{table.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text())["rows"] if path.is_file() else []
    known = {(row["name"], row["command"]): row for row in earlier}
    folders = {row.name: Path(runs) / table.name / _slug(row.name) for row in table.rows}
    for row in table.rows:
        if rows is None or row.name in rows:
            found, before = _measure(row, folders[row.name]), known.get((row.name, row.command), {})
            if not found.items() <= before.items():  # else it was only read again: the day and the machine stay
                before = {"date": datetime.date.today().isoformat(), "hardware": _hardware()}
            known[row.name, row.command] = {**before, **found}
        gathered = {
            "title": table.title,
            "text": table.text,
            "figures": table.figures,
            "lower": table.lower,
            "rows": [_described(row, known.get((row.name, row.command), {})) for row in table.rows],
            **({"before": list(table.before)} if table.before else {}),
        }
        write_json(path, gathered)
    draw_table(table.draw, gathered, folders, path.with_suffix(""))
    return gathered


def _described(row: Row, found: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it is kept, with what was measured of it."""
    return {"values": {}, **found, "name": row.name, "command": row.command, "published": row.published}


def measure(names: Sequence[str], results: str | Path) -> None:
    """Run benchmarks, each in a process of its own, and keep their figures in ``results/benchmarks.json``.

    ``"meanfield --full"`` is the long form of one, kept beside the short one. Those that take ``--picture PATH`` draw
    ``results/benchmark-<name>.png``.

    Raises:
        RuntimeError: for one that ends without its line of figures.
    """
    path = Path(results) / BENCHMARKS
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for name in names:
        script, *options = name.split()
        command = [sys.executable, "-m", f"benchmarks.{script}", *options]
        if "--picture" in Path("benchmarks", f"{script}.py").read_text():
            path.parent.mkdir(parents=True, exist_ok=True)
            command += ["--picture", str(path.with_name(f"benchmark-{script}.png"))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        last = done.stdout.strip().rpartition("\n")[2]
        if not last.startswith("{"):
            raise RuntimeError(
                f"benchmarks: {name} ended with code {done.returncode} and no figures:\n{done.stdout[-2000:]}"
            )
        print(f"benchmark {name}: {'every bar holds' if done.returncode == 0 else 'a bar does not hold'}")
        kept[name] = {**json.loads(last), "date": datetime.date.today().isoformat(), "hardware": _hardware()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)


def render(results: str | Path, page: str | Path, order: Sequence[str] = ()) -> None:
    """Write the page: gathered tables (those of ``order`` first), benchmarks."""
    folder = Path(results)
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != BENCHMARKS]
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    names = [name for name in order if name in found] + [name for name in found if name not in order]
    sections = [_section(found[name], _drawn(folder, name, page)) for name in names]
    if (folder / BENCHMARKS).is_file():
        sections.append(_speed(json.loads((folder / BENCHMARKS).read_text()), _drawn(folder, "benchmark", page)))
    write_atomically(Path(page), "\n".join([HEAD, *sections]))


def _drawn(folder: Path, name: str, page: str | Path) -> list[str]:
    """The lines that show the pictures ``<name>-*.png`` on the page."""
    found = [(path.stem, Path(os.path.relpath(path, Path(page).parent))) for path in sorted(folder.glob(f"{name}-*.png"))]
    return [line for stem, path in found for line in ("", f"![{stem}]({path.as_posix()})")]


def _speed(kept: Mapping[str, Any], pictures: Sequence[str]) -> str:
    lines = [SPEED, _line(["benchmark", "bar", "measured", "wanted", "", "date"]), _line(["---"] * 6)]
    for name, found in sorted(kept.items()):
        for bar, (value, wanted, holds) in found["bars"].items():
            shown = "–" if value is None else f"{value:.4g}"
            verdict = "holds" if holds else "**missed**"
            lines.append(_line([f"`{name}`", bar.replace("|", "/"), shown, f"{wanted:g}", verdict, found["date"]]))
    hardware = sorted({found["hardware"] for found in kept.values()})
    return "\n".join([*lines, *pictures, "", f"{'; '.join(hardware)}.", ""])


def _measure(row: Row, folder: Path) -> dict[str, Any]:
    """The figures of every member, and the CPU seconds of those that were trained in one go."""
    figures: list[dict[str, float | None]] = []
    steps, baselines, seconds = [], [], []
    for name, config in members(row.config):
        own = folder / name
        begun = (own / "checkpoints").exists()
        clock = time.process_time()
        metrics = _trained(config, own)
        if not begun:
            write_json(own / "seconds.json", {"cpu_seconds": time.process_time() - clock})
        if (own / "seconds.json").is_file():
            seconds.append(json.loads((own / "seconds.json").read_text())["cpu_seconds"])
        if metrics is None:
            figures.append({})
            continue
        figures.append({**final_figures(metrics), **({} if row.evaluate is None else _of_elements(row.evaluate, own))})
        steps.append(metrics["steps"])
        baselines.append(metrics.get("baselines", {}))
    keys = dict.fromkeys(key for own in figures for key, value in own.items() if value is not None)
    rules = [rule for rule in baselines[0] if all(rule in own for own in baselines)] if baselines else []  # older: fewer
    return {
        "values": {key: [own.get(key) for own in figures] for key in keys},
        "diverged": figures.count({}),
        "steps": [min(steps), max(steps)] if steps else None,
        "cpu_seconds": statistics.fmean(seconds) if seconds else None,
        "baselines": {rule: [own[rule] for own in baselines] for rule in rules},
    }


def _trained(config: dict[str, Any], run: Path) -> Mapping[str, Any] | None:
    """The metrics of a run; None where its loss did not stay finite, which is a result too."""
    try:
        return train_run(config, run)
    except DivergedError as error:
        print(f"{run}: {error}", file=sys.stderr)
        return None


def _of_elements(config: Mapping[str, Any], run: Path) -> dict[str, float]:
    """How well a run's heat-maps find labelled elements, measured once: AUROC within a bag, the mean over bags."""
    work = Work.of({**config, "run": str(run)}, "evaluate")
    if not (work.out / "metrics.json").is_file():
        evaluate(work, resamples=config["resamples"], instances=True)
    found = json.loads((work.out / "metrics.json").read_text())["instances"]
    return {f"elements/{name}": found[name]["value"] for name in ("attention", "contribution", "alone")}


def _section(table: Mapping[str, Any], pictures: Sequence[str]) -> str:
    figures: dict[str, str] = table["figures"]
    values = {row["name"]: row["values"] for row in table["rows"]}
    head = ["", *figures.values(), "published or wanted", "verdict", "runs", "steps", "CPU min"]
    lines = [f"## {table['title']}", table["text"].strip(), "", _line(head), _line(["---"] * len(head))]
    for row in table["rows"]:
        shown = [_spread(row["values"].get(key, [])) for key in figures]
        published = ", ".join(
            f"as {wanted}" if isinstance(wanted, str) else f"{wanted:g}" for wanted in row["published"].values()
        )
        verdicts = [
            verdict(row["values"].get(key, []), _wanted(wanted, key, values), key in table["lower"])
            for key, wanted in row["published"].items()
        ]
        if not row["values"]:
            diverged = row.get("diverged", 0)
            lines.append(
                _line([row["name"], *shown, published, "diverged" if diverged else "not measured", str(diverged), "", ""])
            )
            continue
        low, high = row["steps"]
        minutes = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds'] / 60:.1f}"
        runs = str(max(len(own) for own in row["values"].values()))
        steps = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        lines.append(_line([row["name"], *shown, published, ", ".join(verdicts), runs, steps, minutes]))
    lines += _simple_rules(table["rows"])
    commands = "\n".join([*table.get("before", []), *(row["command"] for row in table["rows"])])
    measured = sorted({f"{row['date']}, {row['hardware']}" for row in table["rows"] if row["values"]})
    return "\n".join([*lines, *pictures, "", f"{'; '.join(measured)}.", "", f"```bash\n{commands}\n```", ""])


def _simple_rules(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What simple rules reach on the test examples: what most rows have once, then the rows that have something else."""
    shown = {row["name"]: ", ".join(starmap(_rule, row["baselines"].items())) for row in rows if row.get("baselines")}
    if not shown:
        return []
    most, times = Counter(shown.values()).most_common(1)[0]
    common = times > 1 or len(shown) == 1
    others = [f"- {name}: {text}" for name, text in shown.items() if not (common and text == most)]
    head = f"Simple rules on the same test examples: {most if common else ''}".rstrip()
    return ["", f"{head}{', but' if others and common else '.' * common}", *([""] if others else []), *others]


def _rule(name: str, values: Sequence[float]) -> str:
    """Without a spread where all runs have the same test examples."""
    return f"{name.replace('_', ' ')} {_spread(values[:1] if len(set(values)) == 1 else values)}"


def _wanted(wanted: float | str, key: str, values: Mapping[str, Mapping[str, Sequence[float | None]]]) -> float | None:
    """A figure itself, or the mean of another row's; None where that is not measured."""
    if not isinstance(wanted, str):
        return wanted
    known = [value for value in values[wanted].get(key, []) if value is not None]
    return statistics.fmean(known) if known else None


def verdict(values: Sequence[float | None], published: float | None, lower: bool) -> str:
    """How measured values stand to a published one; None is a run without the figure, or nothing to stand beside.

    Example:
        >>> verdict([0.90, 0.92], 0.905, lower=False), verdict([0.90, 0.92], 0.95, lower=False)
        ('reached', 'missed by 0.04')
        >>> verdict([0.90, None], 0.905, lower=False)
        'missing in 1 of 2 runs'
    """
    if not values or published is None:
        return "not measured"
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"missing in {len(values) - len(known)} of {len(values)} runs"
    mean = statistics.fmean(known)
    short = mean - published if lower else published - mean
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    if short <= 0:
        return "reached"
    return "within spread" if short <= spread else f"missed by {float(f'{short:.2g}'):g}"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = statistics.fmean(known)
    digits = 4 if abs(mean) < 10 else 2
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean:.{digits}f}{spread}" + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _slug(name: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    return "-".join(words)


def _hardware() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, {device}"
