"""The figures that compare runs are drawn from gathered tables alone."""

from __future__ import annotations

import json
import sys

import matplotlib.image
import numpy as np
import pytest

from distset.report import set_figures
from distset.report.set_figures import plot_completions, plot_variances, read_curves


def row(name, values):
    return {"name": name, "values": values}


def test_rows_that_end_in_a_number_become_curves():
    table = {
        "rows": [
            row("UMBC + BERT, sampled 100", {"micro_f1": [0.8, 0.9]}),
            row("UMBC + BERT, sampled 25", {"micro_f1": [0.7]}),
            row("UMBC + BERT, subset 100", {"micro_f1": [0.6]}),
            row("UMBC + BERT, full", {"micro_f1": [0.9]}),
            row("UMBC + BERT, subset 1,000", {}),
        ]
    }
    sampled, subset = read_curves(table, "micro_f1")
    assert (sampled.name, list(sampled.x), list(sampled.y)) == (
        "UMBC + BERT, sampled",
        [25, 100],
        pytest.approx([0.7, 0.85]),
    )
    assert sampled.spread == pytest.approx([0, np.std([0.8, 0.9], ddof=1)])
    assert (subset.name, list(subset.x)) == ("UMBC + BERT, subset", [100])


def test_the_script_draws_what_has_been_gathered(tmp_path, monkeypatch):
    documents = {"rows": [row("A, sampled 25", {"micro_f1": [0.7]}), row("A, sampled 50", {"micro_f1": [0.8]})]}
    activations = {"rows": [row("softmax", {"loss": [2.1, 2.2]}), row("sigmoid", {"loss": [2.4]})]}
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    (tmp_path / "activations.json").write_text(json.dumps(activations))
    monkeypatch.setattr(sys, "argv", ["set_figures", "--results", str(tmp_path), "--out", str(tmp_path / "out")])
    set_figures.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["activations.png", "documents_f1.png"]


def test_pixels_that_are_not_given_are_seen(tmp_path):
    given = np.full((4, 4), np.nan)
    plot_completions([[given, np.zeros((4, 4))]], ["context", "image"], tmp_path / "a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3].reshape(-1, 3)
    assert (np.abs(pixels - (0.35, 0.45, 0.6)).max(-1) < 0.01).mean() > 0.1
    plot_variances({"none": 0.0, "some": 1e-3}, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 1000
