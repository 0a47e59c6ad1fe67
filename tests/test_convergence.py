"""Curves of several methods in one picture, and on the page of results."""

import json

import pytest

from distset.report.convergence import plot_convergence
from distset.reproduce import render


def history(*values: float) -> list[dict[str, float]]:
    return [{"step": step, "train/loss": 1.0} for step in (1, 2)] + [
        {"step": 10 * place, "val/loss": value} for place, value in enumerate(values, 1)
    ]


def test_a_line_a_method(tmp_path) -> None:
    histories = {f"method {i}": [history(3, 2, 1 + i), history(3, 2.5, 1.5 + i)] for i in range(13)}
    plot_convergence({**histories, "not run": []}, "loss", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="histories: no record has val/accuracy"):
        plot_convergence(histories, "accuracy", tmp_path / "none.png")


def test_the_page_shows_the_picture_of_a_table(tmp_path) -> None:
    row = {"name": "A", "published": {}, "values": {"loss": [1.0]}, "steps": [1, 1], "cpu_seconds": None}
    row |= {"baselines": {}, "command": "c", "date": "d", "hardware": "h"}
    table = {"title": "T", "text": "t", "figures": {"loss": "loss"}, "lower": ["loss"]}
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "t.json").write_text(json.dumps({**table, "rows": [row]}))
    render(folder, tmp_path / "page.md")
    assert "![" not in (tmp_path / "page.md").read_text()
    plot_convergence({"A": [history(1, 2)]}, "loss", folder / "t-curve.png")
    render(folder, tmp_path / "page.md")
    assert "![t-curve](results/t-curve.png)" in (tmp_path / "page.md").read_text()
