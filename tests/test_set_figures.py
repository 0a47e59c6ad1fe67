"""The figures that compare runs are drawn from gathered tables alone."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from distset.report import table_figures
from distset.report.set_figures import plot_completions, plot_variances
from distset.report.table_figures import draw_table


def gathered(**values):
    rows = [{"name": name, "values": own} for name, own in values.items()]
    return {"title": "made", "figures": {"micro_f1": "micro F1", "loss": "NLL"}, "rows": rows}


def drawn_lines(monkeypatch):
    seen = []
    monkeypatch.setattr(table_figures, "plot_lines", lambda curves, path, **words: seen.append((curves, path.name, words)))
    return seen


def test_rows_become_lines_over_a_setting(tmp_path, monkeypatch):
    seen = drawn_lines(monkeypatch)
    table = gathered(a={"micro_f1": [0.8, 0.9]}, b={"micro_f1": [0.7]}, c={"micro_f1": [0.6]}, d={})
    rows = {"sampled": {25: "b", 100: "a"}, "subset": {50: "c", 99: "d"}}
    wanted = {"figure": "micro_f1", "over": "words", "log": True, "rows": rows}
    draw_table({"lines": wanted}, table, {}, tmp_path / "documents")
    ((curves, name, words),) = seen
    sampled, subset = curves
    assert (sampled.name, sampled.x, sampled.y) == ("sampled", [25, 100], pytest.approx([0.7, 0.85]))
    assert sampled.spread == pytest.approx([0, np.std([0.8, 0.9], ddof=1)])
    assert (subset.name, subset.x) == ("subset", [50])
    assert (name, words["x"], words["y"], words["log_x"]) == ("documents-lines.png", "words", "micro F1", True)
    draw_table(
        {"lines": wanted}, gathered(a={}, b={}, c={}, d={}), {}, tmp_path / "documents"
    )  # nothing known, nothing drawn
    assert len(seen) == 1


def test_what_a_table_wants_is_drawn_beside_it(tmp_path):
    plots = tmp_path / "runs" / "seed-0" / "plots"
    plots.mkdir(parents=True)
    (plots / "tours.png").write_bytes(b"a picture")
    (plots.parent / "metrics.jsonl").write_text('{"step": 1, "val/loss": 2.0}\n{"step": 2, "val/loss": 1.0}\n')
    table = gathered(a={"loss": [2.1, 2.2]}, b={"loss": [2.4]}, c={})
    wanted = {"curve": "loss", "dots": "loss", "pictures": {"a": ["tours", "not there"]}}
    draw_table(wanted, table, {"a": tmp_path / "runs", "b": tmp_path / "none", "c": tmp_path / "none"}, tmp_path / "globe")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["globe-curve.png", "globe-dots.png", "globe-tours.png"]
    assert (tmp_path / "globe-tours.png").read_bytes() == b"a picture"
    for wrong, message in (
        ({"bars": 1}, "draw: got bars"),
        ({"pictures": {"x": []}}, "the table has no row x"),
        ({"dots": "lost"}, "the table has no figure lost"),
        ({"lines": {"figure": "lost", "over": "words", "rows": {}}}, "the table has no figure lost"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_table(wrong, table, {}, tmp_path / "globe")


def test_pixels_that_are_not_given_are_seen(tmp_path):
    given = np.full((4, 4), np.nan)
    plot_completions([[given, np.zeros((4, 4))]], ["context", "image"], tmp_path / "a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3].reshape(-1, 3)
    assert (np.abs(pixels - (0.35, 0.45, 0.6)).max(-1) < 0.01).mean() > 0.1
    plot_variances({"none": 0.0, "some": 1e-3}, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 1000
