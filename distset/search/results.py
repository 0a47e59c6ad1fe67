"""What a search leaves: a table of its trials, plots, the best trial's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from distset.files import write_atomically
from distset.report import write_json
from distset.report.search_plots import plot_parallel, plot_slices
from distset.search.plan import Search
from distset.search.space import Range, Space
from distset.search.trial import Lineage, TrialFolder, trial_config

__all__ = ["best_trial", "command", "shown", "trial_folders", "trial_table", "write_results"]

README = """# A search of distset over settings

| file | what it is |
|---|---|
| `search.yaml` | the resolved configuration; `python -m jobs.tune` with the same one goes on here, or says it is done |
| `summary.md`, `trials.csv` | the trials, best first: settings, figure (mean, spread), steps, how it ended |
| `search.json` | what was searched for, and the best trial |
| `plots/` | `parallel.png`: a line a trial, through its settings to its figure; `slices.png`: the figure over each setting |
| `best/config.yaml` | the best trial as a configuration of its own; `best/command.txt` trains it |
| `trials/0000/` | a trial: `trial.json`, `reports.jsonl`, and its run folders in `run/` |

Settings are chosen by the validation sets. The trials' own `metrics.json` hold test figures too: to choose by them would
make them worth nothing.
"""

HYDRA = """defaults:
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
hydra:
  run: { dir: . }
  output_subdir: null

"""


def trial_folders(folder: Path) -> list[TrialFolder]:
    """The trials that were started, by number."""
    return [TrialFolder(path.parent) for path in sorted(folder.glob("trials/*/trial.json"))]


def trial_table(folder: Path, search: Search) -> pd.DataFrame:
    """One row a trial: finished ones by their figure, then the others."""
    assert search.metric is not None, "read_search() names it"
    rows: list[dict[str, Any]] = []
    for record in (trial.record for trial in trial_folders(folder)):
        assert record is not None
        lineage = Lineage(record["settings"], record["changes"])
        changes = {"changes": len(lineage.changes)} if lineage.changes else {}
        rows.append(
            {
                "trial": record["number"],
                "status": record["status"],
                search.metric: record.get("value"),
                "std": record.get("std"),
                "steps": record.get("steps"),
                **lineage.current,
                **changes,
                "error": record.get("error"),
            }
        )
    table = pd.DataFrame(rows).astype({search.metric: float, "std": float, "steps": "Int64"})
    if "changes" in table:
        table["changes"] = table["changes"].fillna(0).astype(int)
    figure = table[search.metric] if search.minimise else -table[search.metric]
    order = pd.DataFrame({"other": table["status"] != "finished", "figure": figure, "trial": table["trial"]})
    return table.loc[order.sort_values(["other", "figure", "trial"]).index].reset_index(drop=True).dropna(axis=1, how="all")


def best_trial(folder: Path, search: Search) -> TrialFolder | None:
    """The finished trial of the best figure; the first of equals."""
    pick = min if search.minimise else max
    finished = []
    for trial in trial_folders(folder):
        record = trial.record
        if record is not None and record["status"] == "finished" and _finite(record["value"]):
            finished.append((record["value"], trial))
    return pick(finished, key=lambda pair: pair[0])[1] if finished else None


def write_results(folder: Path, search: Search, space: Space, base: dict[str, Any]) -> str:
    """Table, plots and the best trial's configuration; returns what to show.

    Raises:
        ValueError: where no trial finished; says what the first that failed said.
    """
    table, best = trial_table(folder, search), best_trial(folder, search)
    table.to_csv(folder / "trials.csv", index=False)
    write_atomically(folder / "README.md", README)
    if best is None:
        errors = table["error"].dropna().tolist() if "error" in table else []
        first = f"; the first that failed says: {errors[0]}" if errors else ""
        raise ValueError(
            f"search: no trial of {len(table)} finished with a figure{first} ({folder / 'trials.csv'} has them all)"
        )
    _write_best(folder, search, base, best)
    _plot(folder, search, space)
    record = best.record
    assert record is not None
    counts = table["status"].value_counts().to_dict()
    figures = {key: record.get(key) for key in ("number", "value", "std", "settings", "changes")}
    write_json(folder / "search.json", {"metric": search.metric, "mode": search.mode, "trials": counts, "best": figures})
    head = _head(search, counts, record)
    line = command(folder, base["cluster"])
    again = f"the best trial's configuration is {folder / 'best' / 'config.yaml'}; to train it:\n\n    {line}\n"
    write_atomically(folder / "summary.md", f"# Search\n\n{head}\n\n{_markdown(table)}\n\n{again}")
    return f"{head}\n{again}everything is in {folder} (see README.md there)"


def command(folder: Path, cluster: Mapping[str, Any]) -> str:
    """What trains the best trial again, with as many threads as it had: their number changes the rounding."""
    threads = "" if cluster["workers"] else f"OMP_NUM_THREADS={max(1, int(cluster['cpus']))} "
    return f"{threads}python -m jobs.train --config-dir {folder / 'best'} --config-name config"


def shown(value: Any) -> str:
    """A setting or a figure in a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return " ".join(str(value).split())
    return f"{value:.4g}"


def _write_best(folder: Path, search: Search, base: dict[str, Any], best: TrialFolder) -> None:
    import yaml

    lineage = best.lineage
    assert lineage is not None
    config = trial_config(base, search, best, lineage)
    config["cluster"] = base["cluster"]
    config["run"] = {**base["run"], "dir": str(folder / "best" / "run")}
    write_atomically(folder / "best" / "config.yaml", HYDRA + yaml.safe_dump(config, sort_keys=False))
    write_atomically(folder / "best" / "command.txt", command(folder, base["cluster"]) + "\n")


def _plot(folder: Path, search: Search, space: Space) -> None:
    assert search.metric is not None
    trials = []
    for trial in trial_folders(folder):
        record, lineage = trial.record, trial.lineage
        if record is not None and lineage is not None and record["status"] == "finished" and _finite(record["value"]):
            trials.append((lineage.current, record["value"]))
    log = {key for key, part in space.items() if isinstance(part, Range) and part.log}
    settings, figures = [dict(own) for own, _ in trials], [figure for _, figure in trials]
    for plot, name in ((plot_parallel, "parallel"), (plot_slices, "slices")):
        plot(settings, figures, folder / "plots" / f"{name}.png", name=search.metric, minimise=search.minimise, log=log)


def _head(search: Search, counts: dict[str, int], best: dict[str, Any]) -> str:
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    settings = ", ".join(
        f"{key}={shown(value)}" for key, value in Lineage(best["settings"], best["changes"]).current.items()
    )
    spread = "" if best.get("std") is None else f" ± {best['std']:.4g}"
    changes = f", changed {len(best['changes'])} times on the way" if best["changes"] else ""
    return (
        f"{sum(counts.values())} trials: {told}. Best by {search.metric} ({search.mode}): trial {best['number']:04d}, "
        f"{best['value']:.4g}{spread}, with {settings}{changes}"
    )


def _markdown(table: pd.DataFrame) -> str:
    columns = [column for column in table.columns if column != "error"]
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns)]
    for _, row in table.iterrows():
        lines.append([shown(row[column]).replace("|", "\\|") for column in columns])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
