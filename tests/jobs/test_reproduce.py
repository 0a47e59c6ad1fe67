"""The tables of results: every row composes, a short table runs, is gathered and rendered; goes on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from distset.data import Bag, Store, StoreWriter, make_splits
from distset.mean_field import oracle_loss
from distset.reproduce import Row, Table, collect, measure, render
from jobs.reproduce import TABLES, chosen_rows, main, make_stores, read_table

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in TABLES.glob("*.yaml"))
FOLDERS = {"registry": "amazon_registry", "cells": "cells_pbmc68k", "davis": "davis", "mnist": "mnist",
           "fashion": "fashion_mnist", "movies": "movie_reviews", "flags": "flags_capitals", "colon": "colon_crc",
           "classic": "mil_classic"}  # fmt: skip
SETTINGS = {"short": False, "runs": "runs", "paths": dict.fromkeys(FOLDERS, "data")}


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


def test_what_was_measured_stands_beside_what_there_is_to_measure():
    """A row or a wanted figure that is new is on the page, measured or not."""
    results = [path for path in sorted((ROOT / "docs" / "results").glob("*.json")) if path.stem != "benchmarks"]
    assert results
    for path in results:
        gathered, table = json.loads(path.read_text()), yaml.safe_load((TABLES / path.name).with_suffix(".yaml").read_text())
        assert (gathered["title"], gathered["text"]) == (table["title"], table["text"]), path.name
        rows = [(row["name"], row.get("published", {})) for row in table["rows"]]
        assert [(row["name"], row["published"]) for row in gathered["rows"]] == rows, path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_of_every_table_runs_to_the_page(name, tmp_path, monkeypatch):
    """Every row trains two steps on the real data, is measured and shown; and nothing of it is near the real results."""
    data = Path(os.environ.get("DISTSET_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not data.is_dir():
        pytest.skip(f"no data at {data}")
    paths = [f"paths.{key}={data / folder}" for key, folder in FOLDERS.items()]
    places = [f"{key}={tmp_path / key}" for key in ("runs", "results", "page")]
    monkeypatch.setattr(sys, "argv", ["jobs.reproduce", f"table={name}", "short=true", *paths, *places])
    main()
    (gathered,) = (tmp_path / "runs" / "short" / "results").glob("*.json")
    rows = json.loads(gathered.read_text())["rows"]
    assert all(row["steps"] == [2, 2] for row in rows)
    assert all(row["values"] for row in rows)
    assert (tmp_path / "runs" / "short" / "results.md").is_file()
    assert not (tmp_path / "results").exists()


def test_a_short_table_is_gathered_rendered_and_not_trained_twice(tmp_path, monkeypatch):
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
    monkeypatch.setattr("distset.reproduce._hardware", lambda: "another machine")  # which only reads what is there
    assert collect(table, tmp_path / "runs", tmp_path / "results", rows=["DiffMF"])["rows"] == [row, other]
    changed = table._replace(rows=[table.rows[0]._replace(command="python -m jobs.train other"), table.rows[1]])
    assert collect(changed, tmp_path / "runs", tmp_path / "changed", rows=[])["rows"][0]["values"] == {}
    render(tmp_path / "results", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert f"| DiffMF | {row['values']['jaccard'][0]:.4f} |" in page
    assert "missed by" in page or "reached" in page
    assert "| EquiVSet_ind | – | – | – | 0.91 | not measured | 0 |" in page


def test_a_run_whose_loss_does_not_stay_finite_is_said_to_have_diverged(tmp_path, monkeypatch):
    with initialize_config_module("conf", version_base="1.3"):
        table = read_table("oracle_gaussian", {**SETTINGS, "short": True})
    table = table._replace(rows=[table.rows[0]._replace(config={**table.rows[0].config, "seeds": [0, 1]}), table.rows[1]])
    monkeypatch.setattr("distset.tasks.oracle.oracle_loss", diverging_after(2))
    gathered = collect(table, tmp_path / "runs", tmp_path / "results")
    one, none = gathered["rows"]
    assert (one["diverged"], none["diverged"]) == (1, 1)
    assert one["values"]["jaccard"][1] is None
    assert none["values"] == {}
    render(tmp_path / "results", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "(1 of 2)" in page
    assert "missing in 1 of 2 runs" in page
    assert "| EquiVSet_ind | – | – | – | 0.91 | diverged | 1 |" in page


def test_simple_rules_that_an_older_run_lacks_are_left_out(tmp_path):
    with initialize_config_module("conf", version_base="1.3"):
        table = read_table("oracle_gaussian", {**SETTINGS, "short": True})
    table = table._replace(rows=[table.rows[0]._replace(config={**table.rows[0].config, "seeds": [0, 1]})])
    rules = set(collect(table, tmp_path / "runs", tmp_path / "results")["rows"][0]["baselines"])
    (path,) = (tmp_path / "runs").glob("*/*/seed-1/metrics.json")
    metrics = json.loads(path.read_text())
    del metrics["baselines"]["classifier"]
    path.write_text(json.dumps(metrics))
    found = collect(table, tmp_path / "runs", tmp_path / "results")["rows"][0]["baselines"]
    assert "classifier" in rules
    assert set(found) == rules - {"classifier"}
    assert {len(values) for values in found.values()} == {2}


def diverging_after(calls: int):
    """`oracle_loss` for so many training steps; NaN from then on."""
    left = [calls]

    def loss(logits, *rest):
        if logits.requires_grad:
            left[0] -= 1
        return oracle_loss(logits, *rest) * (torch.nan if logits.requires_grad and left[0] < 0 else 1.0)

    return loss


def test_stores_are_made_for_the_rows_that_are_run(tmp_path):
    random = np.random.default_rng(0)
    train = np.ones((1, 2, 12), bool)
    train[0, 0, :4], train[0, 1, 8:] = False, False
    bags = {"X": random.normal(size=(36, 5)), "ptr": np.arange(0, 37, 3), "y": np.arange(12) % 2, "folds_train": train}
    np.savez(tmp_path / "musk1.npz", **bags)
    config = {**SETTINGS, "short": True, "runs": str(tmp_path / "runs")}
    config["paths"] = {**SETTINGS["paths"], "classic": str(tmp_path)}
    with initialize_config_module("conf", version_base="1.3"):
        table = read_table("bags_classic", config)
        make_stores("bags_classic", config, table.rows[:1])  # those of the other rows have no files here
    assert [path.name for path in (tmp_path / "runs" / "short" / "stores").iterdir()] == ["musk1"]
    gathered = collect(table, tmp_path / "runs" / "short", tmp_path / "results", rows=["MUSK1"])
    assert gathered["rows"][0]["steps"] == [2, 2]
    assert (
        gathered["before"][1]
        == "python -m jobs.ingest source=classic source.path=CLASSIC/musk2.npz splits.folds=10 store=store/musk2"
    )
    render(tmp_path / "results", tmp_path / "page.md")
    commands = (tmp_path / "page.md").read_text().partition("```bash\n")[2].splitlines()
    assert [line.split()[2] for line in commands[:4]] == ["jobs.ingest"] * 3 + ["jobs.train"]
    with initialize_config_module("conf", version_base="1.3"):
        digits = read_table("bags_digits", config)
        make_stores("bags_digits", config, digits.rows)  # by their own data.make
    assert len(Store(tmp_path / "runs" / "short" / "stores" / "digits").sets) == 32


def test_maps_of_elements_are_measured_once(tmp_path):
    random = np.random.default_rng(0)
    labels = {f"bag-{i}": ["no", "yes"][i % 2] for i in range(12)}
    with StoreWriter(tmp_path / "store") as writer:
        for i, (name, label) in enumerate(labels.items()):
            found = (np.arange(6) < 3 * (i % 2)).astype(np.int64)
            x = (random.normal(size=(6, 4)) + 3 * found[:, None]).astype(np.float32)
            writer.add(Bag(name, x, label=label, instance_labels=found))
        writer.finish(splits=make_splits(labels, folds=2))
    given = [
        "data=store",
        f"data.path={tmp_path / 'store'}",
        "model.width=8",
        "plan.epochs=1",
        "cluster=none",
        "run.bar=false",
    ]
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides=given), resolve=True)
        evaluate = OmegaConf.to_container(compose("evaluate", overrides=["run=.", "resamples=10"]), resolve=True)
    row = Row("UMBC", config, {}, "python -m jobs.train", evaluate)
    table = Table("bags", "Bags", "", {"auroc": "AUROC", "elements/attention": "map"}, [], [row])
    values = collect(table, tmp_path / "runs", tmp_path / "results")["rows"][0]["values"]
    (path,) = (tmp_path / "runs").rglob("evaluate/*/metrics.json")
    instances = json.loads(path.read_text())["instances"]
    assert values["elements/attention"] == [instances["attention"]["value"]]
    before = path.stat().st_mtime_ns
    assert collect(table, tmp_path / "runs", tmp_path / "results")["rows"][0]["values"] == values
    assert path.stat().st_mtime_ns == before


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
    assert "![" not in page
    drawn = f"import sys; at = sys.argv.index('--picture'); open(sys.argv[at + 1], 'w'); print({line!r})"
    (tmp_path / "benchmarks" / "drawn.py").write_text(drawn)
    (tmp_path / "benchmarks" / "long.py").write_text(f"import sys; assert sys.argv[1:] == ['--full']; print({line!r})")
    measure(["made", "drawn", "long --full"], tmp_path / "results")
    render(tmp_path / "results", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "![benchmark-drawn](results/benchmark-drawn.png)" in page
    assert "| `long --full` | fast | 3.5 | 2 | holds |" in page
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
