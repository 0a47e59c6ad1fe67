"""The tables of results: every row composes, a short table runs, is gathered and rendered; goes on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hydra import initialize_config_module

from distset.reproduce import collect, measure, render
from jobs.reproduce import TABLES, chosen_rows, main, read_table

NAMES = sorted(path.stem for path in TABLES.glob("*.yaml"))
SETTINGS = {"short": False, "paths": dict.fromkeys(
    ("registry", "cells", "davis", "mnist", "fashion", "movies", "flags"), "data")}  # fmt: skip


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_composes(name, short):
    with initialize_config_module("conf", version_base="1.3"):
        table = read_table(name, {**SETTINGS, "short": short})
    assert table.rows
    assert set(table.lower) <= set(table.figures)
    for row in table.rows:
        assert set(row.published) <= set(table.figures)
        assert row.command.startswith("python -m jobs.train")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_of_every_table_runs_to_the_page(name, tmp_path, monkeypatch):
    """Every row trains two steps on the real data, is measured and shown; and nothing of it is near the real results."""
    data = Path(os.environ.get("DISTSET_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folders = {"registry": "amazon_registry", "cells": "cells_pbmc68k", "davis": "davis", "mnist": "mnist",
               "fashion": "fashion_mnist", "movies": "movie_reviews", "flags": "flags_capitals"}  # fmt: skip
    if not data.is_dir():
        pytest.skip(f"no data at {data}")
    paths = [f"paths.{key}={data / folder}" for key, folder in folders.items()]
    places = [f"{key}={tmp_path / key}" for key in ("runs", "results", "page")]
    monkeypatch.setattr(sys, "argv", ["jobs.reproduce", f"table={name}", "short=true", *paths, *places])
    main()
    (gathered,) = (tmp_path / "runs" / "short" / "results").glob("*.json")
    rows = json.loads(gathered.read_text())["rows"]
    assert all(row["steps"] == [2, 2] for row in rows)
    assert all(row["values"] for row in rows)
    assert (tmp_path / "runs" / "short" / "results.md").is_file()
    assert not (tmp_path / "results").exists()


def test_a_short_table_is_gathered_rendered_and_not_trained_twice(tmp_path):
    with initialize_config_module("conf", version_base="1.3"):
        table = read_table("oracle_gaussian", {**SETTINGS, "short": True})
    table = table._replace(rows=table.rows[:2])
    gathered = collect(table, tmp_path / "runs", tmp_path / "results", rows=["DiffMF"])
    row, other = gathered["rows"]
    (path,) = (tmp_path / "runs").rglob("metrics.json")
    assert row["values"]["jaccard"] == [json.loads(path.read_text())["test"]["jaccard"]]
    assert row["steps"] == [2, 2]
    before = path.stat().st_mtime_ns
    assert collect(table, tmp_path / "runs", tmp_path / "results", rows=["DiffMF"])["rows"] == [row, other]
    assert path.stat().st_mtime_ns == before
    assert collect(table, tmp_path / "runs", tmp_path / "results", rows=[])["rows"] == [row, other]  # nothing is forgotten
    changed = table._replace(rows=[table.rows[0]._replace(command="python -m jobs.train other"), table.rows[1]])
    assert collect(changed, tmp_path / "runs", tmp_path / "changed", rows=[])["rows"][0]["values"] == {}
    render(tmp_path / "results", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert f"| DiffMF | {row['values']['jaccard'][0]:.4f} |" in page
    assert "missed by" in page or "reached" in page
    assert "| EquiVSet_ind | – | – | – | 0.91 | not measured | 0 |" in page


def test_benchmarks_are_measured_and_a_missed_bar_stands_as_missed(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    line = json.dumps({"benchmark": "made", "figures": {}, "bars": {"fast": [3.5, 2.0, True], "small": [9.0, 5.0, False]}})
    (tmp_path / "benchmarks" / "made.py").write_text(f"print('a table')\nprint({line!r})\nraise SystemExit(1)")
    (tmp_path / "benchmarks" / "dumb.py").write_text("raise SystemExit('broken')")
    monkeypatch.chdir(tmp_path)
    measure(["made"], tmp_path / "results")
    render(tmp_path / "results", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| `made` | fast | 3.5 | 2 | holds |" in page
    assert "| `made` | small | 9 | 5 | **missed** |" in page
    with pytest.raises(RuntimeError, match="benchmarks: dumb ended with code 1 and no figures"):
        measure(["dumb"], tmp_path / "results")


def test_the_page_is_what_the_gathered_figures_say(tmp_path):
    """No figure of a table on it was typed by hand."""
    docs = TABLES.parents[1] / "docs"
    shutil.copytree(docs / "results", tmp_path / "results")
    render(tmp_path / "results", tmp_path / "results.md", NAMES)
    assert (tmp_path / "results.md").read_text() == (docs / "results.md").read_text()


def test_unknown_rows_are_refused():
    with initialize_config_module("conf", version_base="1.3"):
        table = read_table("oracle_moons", SETTINGS)
    with pytest.raises(ValueError, match="rows: oracle_moons has no X"):
        chosen_rows(table, ["X"])
