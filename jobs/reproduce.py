"""Run the tables of docs/results.md: ``python -m jobs.reproduce table=oracle_moons [short=true] [rows=[DiffMF]]``.

Every row is a configuration of ``jobs.train`` over seeds; runs that are finished are only read, so the same command goes on
where it was stopped. ``table=all`` runs all of them, ``table=none`` only writes the page anew. ``paths`` says where data
lies (conf/reproduce.yaml).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from omegaconf import OmegaConf

from distset.reproduce import Row, Table, collect, measure, render
from jobs._common import job
from jobs._overrides import CONF

TABLES = CONF / "tables"


@job("reproduce")
def main(config: dict[str, Any]) -> None:
    order = sorted(path.stem for path in TABLES.glob("*.yaml"))
    wanted = {"all": order, "none": []}.get(config["table"], [config["table"]])
    if unknown := set(wanted) - set(order):
        raise ValueError(f"table: there is no {', '.join(unknown)}; there are {', '.join(order)}")
    apart = Path(config["runs"]) / "short"  # two steps of a small network must never be taken for results
    results = apart / "results" if config["short"] else Path(config["results"])
    runs = apart if config["short"] else Path(config["runs"])
    page = apart / "results.md" if config["short"] else Path(config["page"])
    for number, name in enumerate(wanted, 1):
        print(f"table {name} ({number} of {len(wanted)})")
        table = read_table(name, config)
        collect(table, runs, results, chosen_rows(table, config["rows"]))
    if config["benchmarks"] is not None:
        measure(_benchmarks(config["benchmarks"]), results)
    render(results, page, order)
    print(f"written: {page}")


def _benchmarks(wanted: str | list[str]) -> list[str]:
    from benchmarks.__main__ import names

    if wanted == "all":
        return names()
    if unknown := set(wanted) - set(names()):
        raise ValueError(f"benchmarks: there is no {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    return list(wanted)


def read_table(name: str, config: dict[str, Any]) -> Table:
    """A table of ``conf/tables``, its rows composed; ``short`` replaces sizes and seeds by small ones."""
    spec = yaml.safe_load((TABLES / f"{name}.yaml").read_text())
    short = [*spec.get("short", []), "plan.epochs=null"] if config["short"] else []
    rows = []
    for row in spec["rows"]:
        typed = [*spec.get("common", []), *row.get("overrides", [])]
        rows.append(_row(row, typed, short, config))
    figures, lower = spec["figures"], spec.get("lower", [])
    return Table(name, spec["title"], spec["text"], figures, lower, rows, spec.get("draw", {}))


def chosen_rows(table: Table, wanted: list[str] | None) -> list[str] | None:
    """The rows to run, None for all; unknown ones are refused."""
    known = [row.name for row in table.rows]
    if unknown := set(wanted or ()) - set(known):
        raise ValueError(f"rows: {table.name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    return wanted


def _row(row: dict[str, Any], typed: list[str], short: list[str], config: dict[str, Any]) -> Row:
    filled = [override.format(**config["paths"]) for override in typed] + ["run.bar=false", *short]
    resolved: dict[str, Any] = OmegaConf.to_container(compose("train", overrides=filled), resolve=True)  # type: ignore[assignment]
    named = [override.format(**{key: key.upper() for key in config["paths"]}) for override in typed]
    return Row(row["name"], resolved, row.get("published", {}), "python -m jobs.train " + shlex.join(named))


if __name__ == "__main__":
    main()
