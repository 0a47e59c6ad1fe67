"""Searches without Ray: spaces and draws, what is refused, what a trial is, whose past a taken-over state has."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image

from distset.checkpoints import Checkpoints, read_state
from distset.report.search_plots import plot_parallel, plot_slices
from distset.search import ASHA, PBT, Choice, Range, Search, apply, draw, read_search, read_space
from distset.search.results import trial_table, write_results
from distset.search.trial import Lineage, TrialFolder, _Judge, train_trial, trial_config
from distset.train import Watch
from distset.training import train_run
from jobs._overrides import CONF

ORACLE = ("task=oracle", "method@task=diffmf", "data.examples.sets=12", "data.examples.size=20", "data.examples.chosen=3")
SHORT = (
    "plan.epochs=null",
    "plan.max_steps=6",
    "plan.batch=4",
    "plan.evaluate_every=2",
    "plan.patience=null",
    "run.bar=false",
)


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_container(compose("tune", overrides=list(overrides)), resolve=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "search").glob("*.yaml")))
@pytest.mark.parametrize("task", [(), ORACLE, ("experiment=colon_umbc", "cluster=local")])
def test_every_search_composes_with_every_kind_of_task(name, task):
    search, space, base = read_search(composed(f"search={name}", *task))
    assert search.metric == ("val/jaccard" if task is ORACLE else "val/loss")
    assert search.minimise == (task is not ORACLE)
    assert "search" not in base
    assert len(draw(space, search.trials, search.seed)) == (search.trials or 6)


def test_draws_lie_in_the_space_and_more_of_them_begin_with_the_same():
    tree = {
        "a": {"lr": {"loguniform": [1e-4, 1e-2]}, "x": {"uniform": [-1, 1]}, "left_out": None},
        "b.slots": {"randint": [2, 4]},
        "b.kind": {"choice": ["p", "q"]},
    }
    space = read_space(tree)
    assert space["b.kind"] == Choice(("p", "q"))
    drawn = draw(space, 400, seed=3)
    assert list(drawn[0]) == ["a.lr", "a.x", "b.slots", "b.kind"]
    assert drawn[:7] == draw(space, 7, seed=3) != draw(space, 7, seed=4)
    table = pd.DataFrame(drawn)
    assert table["a.lr"].between(1e-4, 1e-2).all()
    assert table["a.x"].between(-1, 1).all()
    # Shares of an event of probability p over 400 draws: within 5 standard errors, sqrt(p (1 - p) / 400) at most 0.025.
    assert abs((table["a.lr"] < 1e-3).mean() - 0.5) < 0.125
    assert [abs((table["b.slots"] == slots).mean() - 1 / 3) < 0.125 for slots in (2, 3, 4)] == [True] * 3
    assert abs((table["b.kind"] == "p").mean() - 0.5) < 0.125


def test_grids_are_crossed_and_draws_repeat_them():
    space = read_space({"a": {"grid": [1, 2]}, "b": {"grid": ["x", None]}})
    assert draw(space, None, 0) == [{"a": a, "b": b} for a in (1, 2) for b in ("x", None)]
    mixed = draw({**space, "c": Range(0.0, 1.0)}, 3, 0)
    assert len(mixed) == 12
    assert len({settings["c"] for settings in mixed}) == 3
    with pytest.raises(ValueError, match=r"search.trials: got 3, but search.space holds grids alone, of 4 combinations"):
        draw(space, 3, 0)
    with pytest.raises(ValueError, match=r"search.trials: got None, wanted how often"):
        draw({"c": Range(0.0, 1.0)}, None, 0)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "search.space: got no setting"),
        ({"a": 3}, r"search.space.a: got 3, wanted one of loguniform"),
        ({"a": {"choice": [1], "grid": [2]}}, "search.space.a: got choice, grid, wanted one of .*; set the others to null"),
        ({"a": {"choice": []}}, r"search.space.a.choice: got \[\], wanted a list"),
        ({"a": {"loguniform": [0, 1]}}, "wanted low below high and above 0"),
        ({"a": {"uniform": [1, 0]}}, "wanted low below high"),
        ({"a": {"uniform": ["1", 2]}}, "wanted two numbers, low and high"),
        ({"a": {"randint": [1, 2.5]}}, "wanted whole numbers"),
    ],
)
def test_spaces_that_are_none(tree, message):
    with pytest.raises(ValueError, match=message):
        read_space(tree)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["search.metric=test/auroc"],
            "settings are not chosen by the test sets: the test sets are for the chosen setting alone",
        ),
        (["search.metric=train/loss"], "settings are not chosen by the train sets"),
        (["search.mode=low"], "search.mode: got 'low', wanted min, max"),
        (["search.concurrency=0"], "search.concurrency: got 0"),
        (["cluster.gpu=true"], "cluster.gpu: trials without workers of their own train on CPUs"),
        (["+search.space.model.slot={choice:[1]}"], "search.space.model.slot: is not in the .*did you mean 'model.slots'"),
        (["+search.space.seed={choice:[1,2]}"], "search.space.seed: .* a seed is not chosen for its luck"),
        (["+search.space.cluster.cpus={choice:[1,2]}"], "search.space.cluster.cpus: cluster is not for a search"),
        (["search=asha", "search.scheduler.grace=0"], "search.scheduler.grace: got 0"),
        (["search=asha", "search.scheduler.factor=1"], "search.scheduler.factor: got 1"),
        (["search=pbt", "search.trials=1"], "search.trials: got 1, wanted a population of at least 2"),
        (["search=pbt", "search.concurrency=2"], "search.concurrency: the trials of a population take turns"),
        (["search=pbt", "seeds=[0,1]"], "search.scheduler: a population is made of single runs, got folds or seeds"),
        (["search=pbt", "search.scheduler.quantile=0.7"], "search.scheduler.quantile: got 0.7"),
        (
            ["search=pbt", "~search.space.optim", "+search.space.model.slots={choice:[2,4]}"],
            "search.space: got model.slots; population-based training changes figures while a run is under way",
        ),
    ],
)
def test_searches_that_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        read_search(composed(*overrides))


def test_metrics_are_named_short_or_long():
    assert read_search(composed("search.metric=auroc"))[0][1:3] == ("val/auroc", "max")
    assert read_search(composed("search.metric=val/loss", "search.mode=max"))[0][1:3] == ("val/loss", "max")
    assert read_search(composed("plan.monitor=null"))[0].metric == "val/loss"


def test_settings_are_put_in_a_copy():
    config = {"a": {"b": {"c": 1}, "d": 2}}
    assert apply(config, {"a.b.c": 5, "a.d": [6]}) == {"a": {"b": {"c": 5}, "d": [6]}}
    assert config == {"a": {"b": {"c": 1}, "d": 2}}


def trial(tmp_path: Path, number: int, *overrides: str, **settings: Any):
    """The folder and configuration of a small oracle's trial."""
    search, _, base = read_search(composed(*ORACLE, *SHORT, *overrides))
    folder = TrialFolder(tmp_path / "trials" / f"{number:04d}")
    lineage = Lineage({key.replace("__", "."): value for key, value in settings.items()})
    folder.write("running", lineage)
    return search, base, folder, lineage


def test_a_trial_is_the_mean_over_its_runs_and_tells_how_it_goes(tmp_path):
    search, base, folder, lineage = trial(tmp_path, 3, "seeds=[0,1]", optim__lr=0.003)
    told: list[dict[str, float]] = []
    config = trial_config(base, search, folder, lineage)
    figures = train_trial(config, search, folder, told.append)
    stored = [json.loads((folder.run / f"seed-{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
    values = [metrics["val"]["jaccard"] for metrics in stored]
    assert figures["values"] == {"seed-0": values[0], "seed-1": values[1]}
    assert figures["value"] == pytest.approx(sum(values) / 2, abs=1e-15)
    assert figures["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert figures["steps"] == 12
    assert [(r["member"], r["step"], round(r["progress"])) for r in told] == [
        *[(0, 2, 17), (0, 4, 33), (0, 6, 50)],
        *[(1, 2, 67), (1, 4, 83)],  # the last evaluation is told with the trial's end
    ]
    assert told[2]["value"] == values[0]
    assert folder.reports == told
    assert train_trial(config, search, folder, told.append) == figures  # finished runs stay as they are
    assert len(told) == 5


@pytest.mark.parametrize(
    ("storage", "own"),
    [
        ("s3://b/runs?endpoint_override=minio:9000", "s3://b/runs/0003?endpoint_override=minio:9000"),
        ("/shared/runs/", "/shared/runs/0003"),
    ],
)
def test_a_trials_checkpoints_have_a_folder_of_their_own(tmp_path, storage, own):
    search, base, folder, lineage = trial(tmp_path, 3, f"cluster.storage='{storage}'")
    assert trial_config(base, search, folder, lineage)["cluster"]["storage"] == own


def test_a_metric_that_the_task_lacks_is_named(tmp_path):
    search, base, folder, lineage = trial(tmp_path, 0, "search.metric=aurok", optim__lr=0.003)
    with pytest.raises(
        ValueError, match=r"search.metric: got 'val/aurok', which the task does not measure; it measures val/"
    ):
        train_trial(trial_config(base, search, folder, lineage), search, folder, print)


class Stop(Exception):
    pass


def test_a_state_that_was_taken_over_has_its_past_and_is_trained_again_from_its_configuration(tmp_path):
    """Population-based training without the population: another's checkpoint, other figures from there on."""
    search, base, donor, lineage = trial(tmp_path, 0, "search=pbt", optim__lr=0.003, optim__weight_decay=0.0)
    _, _, own, _ = trial(tmp_path, 1, "search=pbt", optim__lr=0.0001, optim__weight_decay=0.1)

    def stop_at(step: int):
        def report(figures):
            if figures["step"] == step:
                raise Stop

        return report

    with pytest.raises(Stop):
        train_trial(trial_config(base, search, donor, lineage), search, donor, stop_at(4))
    state = read_state(donor.run / "checkpoints" / "last" / "state.pt")
    assert state["progress"]["step"] == 4
    taken = lineage.changed({"optim.lr": 0.001, "optim.weight_decay": 0.0}, 4)
    assert taken.changes == [{"step": 4, "lr": 0.001}]
    assert taken.current == {"optim.lr": 0.001, "optim.weight_decay": 0.0}
    own.adopt(state, taken, donor.reports, None)
    told: list[dict[str, float]] = []
    config = trial_config(base, search, own, taken)
    figures = train_trial(config, search, own, told.append)
    assert [report["step"] for report in own.reports] == [2, 4]
    train_run({**config, "plan": base["plan"]}, tmp_path / "again", watch=Watch())
    for name in ("metrics.jsonl", "metrics.json"):
        assert (own.run / name).read_text() == (tmp_path / "again" / name).read_text()
    weights = [read_state(path / "checkpoints" / "last" / "state.pt")["model"] for path in (own.run, tmp_path / "again")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert figures["value"] == json.loads((own.run / "metrics.json").read_text())["val"]["jaccard"]


def test_what_a_killed_trial_had_yet_to_tell_is_told_by_its_successor(tmp_path, monkeypatch):
    """Killed once its checkpoint is written, before the step after."""
    search, base, folder, lineage = trial(tmp_path, 0, optim__lr=0.003)
    config = trial_config(base, search, folder, lineage)
    config["plan"]["checkpoint_every"] = 2
    save = Checkpoints.save

    def dying(self, state):
        save(self, state)
        if state["progress"]["step"] == 4:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", dying)
        with pytest.raises(Stop):
            train_trial(config, search, folder, print)
    assert [report["step"] for report in folder.reports] == [2]
    told: list[dict[str, float]] = []
    train_trial(config, search, folder, told.append)
    assert [report["step"] for report in told] == [4]
    assert [report["step"] for report in folder.reports] == [2, 4]
    assert told[0]["now"] == json.loads((folder.run / "metrics.jsonl").read_text().splitlines()[1])["val/jaccard"]


def test_a_trial_that_is_killed_while_it_takes_over_a_state_goes_on(tmp_path, monkeypatch):
    """Killed before any of the moves and deletions, it has settings and a run that fit each other."""
    search, base, donor, lineage = trial(tmp_path, 0, "search=pbt", optim__lr=0.003)
    _, _, own, before = trial(tmp_path, 1, "search=pbt", optim__lr=0.0001)
    for folder, settings in ((donor, lineage), (own, before)):
        train_trial(trial_config(base, search, folder, settings), search, folder, lambda report: None)
    state = read_state(donor.run / "checkpoints" / "last" / "state.pt")
    kept = shutil.copytree(own.path, tmp_path / "kept")
    for moment in itertools.count():
        shutil.rmtree(own.path)
        shutil.copytree(kept, own.path)
        own.tell([{"member": 0, "step": 1, "progress": 50.0, "value": 0.5, "now": 0.5}])
        calls = itertools.count()

        def dying(call, moment=moment, calls=calls):
            def step(*args, **options):
                if next(calls) == moment:
                    raise Stop
                return call(*args, **options)

            return step

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dying(os.replace))
            patched.setattr(shutil, "rmtree", dying(shutil.rmtree))
            try:
                own.adopt(state, lineage.changed({"optim.lr": 0.001}, state["progress"]["step"]), donor.reports, None)
                break
            except Stop:
                pass
        train_trial(trial_config(base, search, own, own.lineage), search, own, lambda report: None)
    assert moment > 5


def test_a_line_that_a_full_disk_cut_short_is_no_report(tmp_path):
    _, _, folder, _ = trial(tmp_path, 0, optim__lr=0.003)
    report = {"member": 0, "step": 1, "progress": 50.0, "value": 0.5, "now": 0.5}
    (folder.path / "reports.jsonl").write_text(json.dumps(report) + '\n{"member": 0, "st')
    assert folder.reports == [report]


def test_a_figure_that_was_infinite_on_the_way_is_not_the_best():
    """A run's records hold null for it."""
    judge = _Judge("val/loss", "loss")
    assert judge.value([{"val/loss": None}, {"val/loss": 0.5}, {"val/loss": 0.7}]) == 0.5
    assert math.isnan(judge.value([{"val/loss": None}, {"val/loss": None}]))


def test_the_results_put_finished_trials_first_and_failures_with_their_reason(tmp_path):
    search, space, base = read_search(composed("search.metric=auroc"))
    for number, (status, more) in enumerate(
        [
            ("finished", {"value": 0.7, "std": 0.1, "steps": 40}),
            ("stopped", {"value": 0.95, "steps": 8}),
            ("failed", {"error": "model.heads: got 3\nmore"}),
            ("finished", {"value": 0.9, "std": 0.2, "steps": 40}),
            ("finished", {"value": float("nan"), "steps": 40}),
        ]
    ):
        settings = {"optim.lr": 10.0 ** -(number + 1), "optim.weight_decay": 0.1}
        TrialFolder(tmp_path / "trials" / f"{number:04d}").write(status, Lineage(settings), **more)
    assert trial_table(tmp_path, search)["trial"].tolist() == [3, 0, 4, 1, 2]
    said = write_results(tmp_path, search, space, base)
    assert "5 trials: 3 finished, 1 stopped, 1 failed. Best by val/auroc (max): trial 0003, 0.9 ± 0.2" in said
    assert pd.read_csv(tmp_path / "trials.csv")["error"].dropna().tolist() == ["model.heads: got 3\nmore"]
    rows = [line for line in (tmp_path / "summary.md").read_text().splitlines() if line.startswith("|")]
    assert rows[2].split(" | ")[:4] == ["| 3", "finished", "0.9", "0.2"]
    best = OmegaConf.load(tmp_path / "best" / "config.yaml")
    assert best.optim.lr == 1e-4
    assert json.loads((tmp_path / "search.json").read_text())["best"]["number"] == 3
    for number in (0, 3, 4):
        TrialFolder(tmp_path / "trials" / f"{number:04d}").write("failed", Lineage(settings), error="no disk")
    with pytest.raises(
        ValueError, match="search: no trial of 5 finished with a figure; the first that failed says: no disk"
    ):
        write_results(tmp_path, search, space, base)


@pytest.mark.parametrize("count", [1, 7])
def test_plots_take_numbers_names_and_single_values(tmp_path, count):
    settings = [{"lr": 10.0**-i, "slots": 4, "kind": ["a", None][i % 2], "flag": i % 3 == 0} for i in range(count)]
    for plot, name in ((plot_parallel, "parallel"), (plot_slices, "slices")):
        plot(settings, [0.3 + i % 4 for i in range(count)], tmp_path / f"{name}.png", name="loss", minimise=True, log={"lr"})
        assert Image.open(tmp_path / f"{name}.png").width > 400


def test_halving_remembers_what_trials_told_before(tmp_path):
    """A rung's cutoff after a new start is that of the old one."""
    pytest.importorskip("ray")
    from types import SimpleNamespace

    from distset.cluster.schedulers import scheduler_for

    search = Search(metric="val/loss", mode="min", scheduler=ASHA(grace=10, factor=2))
    folders = [TrialFolder(tmp_path / f"{number:04d}") for number in range(3)]
    for folder, value in zip(folders, (0.2, 0.4, 0.9)):
        folder.write("waiting", Lineage({"a": 1}))
        folder.tell([{"member": 0, "step": 3, "progress": 12.0, "value": value, "now": value}])

    def verdict(value: float, done, left) -> str:
        scheduler = scheduler_for(search, {}, done, left)
        trials = [SimpleNamespace(trial_id=f"x{n}", config={"trial": {"number": n}}) for n in (2, 9)]
        for trial in trials:
            scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trials[1], {"progress": 12.0, "value": value})

    assert verdict(0.5, [], []) == "CONTINUE"  # the first at its rung
    assert verdict(0.5, folders[:2], []) == "STOP"
    assert verdict(0.5, folders[:1], folders[2:]) == "CONTINUE"  # between 0.2 and 0.9: on the better side of 0.55
    assert verdict(0.6, folders[:1], folders[2:]) == "STOP"


def test_a_population_stays_in_the_space():
    pytest.importorskip("ray")
    from distset.cluster.schedulers import scheduler_for

    space = {"optim.lr": Range(1e-3, 2e-3, log=True), "model.slots": Choice((4, 8))}
    scheduler = scheduler_for(Search(mode="min", scheduler=PBT(resample=0.0, factors=(0.1, 10.0))), space, [], [])
    for _ in range(20):
        config = {"trial": {"number": 5, "settings": {"optim.lr": 1.5e-3, "model.slots": 4}}}
        explored, _ = scheduler._get_new_config(None, type("Donor", (), {"config": config}))
        assert explored["trial"]["settings"]["optim.lr"] in (1e-3, 2e-3)
        assert explored["trial"]["settings"]["model.slots"] == 4
