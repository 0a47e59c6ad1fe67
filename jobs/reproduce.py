"""Run the tables of docs/results.md: ``python -m jobs.reproduce table=oracle_moons [short=true] [rows=[DiffMF]]``.

Every row is a configuration of ``jobs.train`` over seeds; runs that are finished are only read, so the same command goes on
where it was stopped. ``table=all`` runs all of them, ``table=none`` only writes the page anew. ``paths`` says where data
lies (conf/reproduce.yaml). A table of bags names its ``stores`` with the overrides of ``jobs.ingest`` that make them, in
``runs/stores``; a row with ``elements: true`` also says how well heat-maps find labelled elements.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from omegaconf import OmegaConf

from distset.reproduce import Row, Table, collect, measure, render
from jobs._common import ensure_store, job
from jobs._overrides import CONF
from jobs.ingest import stored

TABLES = CONF / "tables"


@job("reproduce")
def main(config: dict[str, Any]) -> None:
    order = sorted(path.stem for path in TABLES.glob("*.yaml"))
    wanted = {"all": order, "none": []}.get(config["table"], [config["table"]])
    if unknown := set(wanted) - set(order):
        raise ValueError(f"table: there is no {', '.join(unknown)}; there are {', '.join(order)}")
    runs = apart = _runs(config)
    results = apart / "results" if config["short"] else Path(config["results"])
    page = apart / "results.md" if config["short"] else Path(config["page"])
    for number, name in enumerate(wanted, 1):
        print(f"table {name} ({number} of {len(wanted)})")
        table = read_table(name, config)
        chosen = chosen_rows(table, config["rows"])
        make_stores(name, config, [row for row in table.rows if chosen is None or row.name in chosen])
        collect(table, runs, results, chosen)
    if config["benchmarks"] is not None:
        measure(_benchmarks(config["benchmarks"]), results)
    render(results, page, order)
    print(f"written: {page}")


def _benchmarks(wanted: str | list[str]) -> list[str]:
    from benchmarks.__main__ import names

    if wanted == "all":
        return names()
    if unknown := {name.removesuffix(" --full") for name in wanted} - set(names()):
        raise ValueError(
            f"benchmarks: there is no {', '.join(sorted(unknown))}; there are {', '.join(names())}, each also with ' --full'"
        )
    return list(wanted)


def _runs(config: dict[str, Any]) -> Path:
    """Two steps of a small network must never be taken for results: they lie apart."""
    runs = Path(config["runs"])
    return runs / "short" if config["short"] else runs


def _spec(name: str) -> dict[str, Any]:
    return yaml.safe_load((TABLES / f"{name}.yaml").read_text())


def make_stores(name: str, config: dict[str, Any], rows: list[Row]) -> None:
    """The stores that these rows of a table train on; those that are there are left as they are."""
    for store, overrides in _spec(name).get("stores", {}).items():
        path = f"{_places(config)['stores']}/{store}"
        if any(row.config["data"].get("path") == path for row in rows):
            filled = [override.format(**_places(config)) for override in overrides]
            found = stored(_composed("ingest", [*filled, f"store={path}", "bar=false"]))
            print(f"store: {found}")
    for row in rows:
        if row.config["data"].get("make") is not None:
            ensure_store(row.config["data"])


def read_table(name: str, config: dict[str, Any]) -> Table:
    """A table of ``conf/tables``, its rows composed; ``short`` replaces sizes and seeds by small ones."""
    spec = _spec(name)
    short = [*spec.get("short", []), "plan.epochs=null"] if config["short"] else []
    rows = []
    for row in spec["rows"]:
        typed = [*spec.get("common", []), *row.get("overrides", [])]
        rows.append(_row(row, typed, short, config))
    before = [
        "python -m jobs.ingest " + shlex.join([*(one.format(**_named(config)) for one in overrides), f"store=store/{store}"])
        for store, overrides in spec.get("stores", {}).items()
    ]
    figures, lower = spec["figures"], spec.get("lower", [])
    return Table(name, spec["title"], spec["text"], figures, lower, rows, spec.get("draw", {}), before)


def chosen_rows(table: Table, wanted: list[str] | None) -> list[str] | None:
    """The rows to run, None for all; unknown ones are refused."""
    known = [row.name for row in table.rows]
    if unknown := set(wanted or ()) - set(known):
        raise ValueError(f"rows: {table.name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    return wanted


def _row(row: dict[str, Any], typed: list[str], short: list[str], config: dict[str, Any]) -> Row:
    filled = [override.format(**_places(config)) for override in typed] + ["run.bar=false", *short]
    command = "python -m jobs.train " + shlex.join(override.format(**_named(config)) for override in typed)
    evaluate = _composed("evaluate", ["run=."]) if row.get("elements") else None
    return Row(row["name"], _composed("train", filled), row.get("published", {}), command, evaluate)


def _places(config: dict[str, Any]) -> dict[str, str]:
    """What stands for ``{mnist}``, ``{stores}`` and so on where a table is run."""
    return {**config["paths"], "stores": str(_runs(config).resolve() / "stores")}


def _named(config: dict[str, Any]) -> dict[str, str]:
    """The same in a command to read."""
    return {**{key: key.upper() for key in config["paths"]}, "stores": "store"}


def _composed(job: str, overrides: list[str]) -> dict[str, Any]:
    return OmegaConf.to_container(compose(job, overrides=overrides), resolve=True)  # type: ignore[return-value]


if __name__ == "__main__":
    main()
