"""Scores against scikit-learn, tables and pictures by what stands in them."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn import metrics

from distset.report import (
    ElementTable,
    Interval,
    bag_scores,
    choose_threshold,
    plot_confusion,
    plot_curves,
    plot_roc,
    plot_spread,
    predicted_classes,
    prediction_table,
    write_json,
    write_table,
)
from distset.report.kept_words import KeptWords, plot_kept_words
from distset.report.scores import _figures, auroc, resampled


def problem(n: int = 60, classes: int = 2, seed: int = 0, signal: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities with ties."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    logits = rng.normal(size=(n, classes)).round(1)
    logits[np.arange(n), y] += signal
    p = np.exp(logits)
    return y, p / p.sum(1, keepdims=True)


def by_sklearn(y, p, predicted, weights=None) -> dict[str, float]:
    several = p.shape[1] > 2
    return {
        "auroc": metrics.roc_auc_score(
            y, p if several else p[:, 1], multi_class="ovr", average="macro", sample_weight=weights
        ),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, predicted, sample_weight=weights),
        "f1": metrics.f1_score(y, predicted, average="macro" if several else "binary", sample_weight=weights),
        "accuracy": metrics.accuracy_score(y, predicted, sample_weight=weights),
    }


@pytest.mark.parametrize(("classes", "threshold"), [(2, None), (2, 0.37), (4, None)])
def test_scores_are_those_of_scikit_learn(classes, threshold):
    y, p = problem(classes=classes)
    got = bag_scores(y, p, threshold=threshold, resamples=50)
    wanted = by_sklearn(y, p, predicted_classes(p, threshold))
    assert {name: interval.value for name, interval in got.items()} == pytest.approx(wanted, abs=1e-12)
    for interval in got.values():
        assert interval.low <= interval.value <= interval.high


@pytest.mark.parametrize("classes", [2, 3])
def test_resampled_scores_are_those_of_scikit_learn(classes):
    """Also for samples that are drawn twice, which scikit-learn takes as a weight."""
    y, p = problem(40, classes)
    weights = next(resampled(y, None, 5, seed=1))
    predicted = predicted_classes(p)
    figures = _figures(y, p, predicted, weights)
    for draw in range(5):
        wanted = by_sklearn(y, p, predicted, weights[draw])
        assert {name: values[draw] for name, values in figures.items()} == pytest.approx(wanted, abs=1e-12)


def test_resamples_are_whole_cases_drawn_class_by_class():
    y = np.array([0, 0, 0, 1, 1, 0, 1, 0])
    cases = ["a", "a", "b", "c", "c", "d", "e", "e"]  # patient e has a set of each class
    weights = np.concatenate(list(resampled(y, cases, 400, seed=0)))
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 4]).all()
    assert (weights[:, 6] == weights[:, 7]).all()
    assert (weights[:, [0, 2, 5]].sum(1) == 3).all()  # cases of class 0
    assert (weights[:, [3, 6]] == 1).all()  # one case of class 1, one of both
    assert weights[:, 0].var() == pytest.approx(3 * (1 / 3) * (2 / 3), rel=0.2)


def test_the_interval_covers_the_truth():
    """Gaussian scores of known AUROC: 95 % intervals of 200 samples of 60 sets hold it in 88 to 100 % of them."""
    truth, hits = 0.76025, 0  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        y = np.arange(60) % 2
        s = 1 / (1 + np.exp(-rng.normal(y)))
        interval = bag_scores(y, np.stack([1 - s, s], 1), resamples=200, seed=seed)["auroc"]
        hits += interval.low <= truth <= interval.high
    assert 176 <= hits <= 200


def test_auroc_of_one_class_is_undefined():
    scores = bag_scores([1, 1], [[0.2, 0.8], [0.7, 0.3]], resamples=10)
    assert np.isnan(scores["auroc"].value)
    assert scores["accuracy"].value == 0.5
    assert np.isnan(auroc(np.array([True]), np.array([0.5]), np.ones((1, 1))))


def test_without_resamples_there_is_no_interval():
    interval = bag_scores(*problem(), resamples=0)["auroc"]
    assert 0.5 < interval.value < 1
    assert np.isnan([interval.low, interval.high]).all()


def test_a_roc_curve_without_resamples_has_no_band(tmp_path):
    for classes in (2, 3):
        y, p = problem(classes=classes)
        plot_roc(y, p, list("abc"[:classes]), tmp_path / "roc.png", resamples=0)
        assert ink(tmp_path / "roc.png") > 0


def test_words_are_no_formulas(tmp_path):
    words = ["$x_$", "a", "$$"]
    plot_kept_words([KeptWords(words, [True] * 3, "", "")], tmp_path / "words.png")
    assert ink(tmp_path / "words.png") > 0


def test_the_threshold_is_the_best_of_all():
    y, p = problem(50, seed=3)
    threshold = choose_threshold(y, p)
    best = metrics.balanced_accuracy_score(y, predicted_classes(p, threshold))
    for other in np.linspace(0, 1, 301):
        assert metrics.balanced_accuracy_score(y, predicted_classes(p, other)) <= best + 1e-12
    separated = choose_threshold([0, 0, 1], [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    assert separated == pytest.approx(0.4)
    useless = choose_threshold([0, 1], [[0.5, 0.5], [0.5, 0.5]])
    assert useless == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bag_scores([0, 1], [[0.5, 0.5]]), "wanted \\(N\\) and \\(N, C\\)"),
        (lambda: bag_scores([0, 2], np.full((2, 2), 0.5)), "labels: got .* from 0 to 1"),
        (lambda: bag_scores([0, 1], np.full((2, 2), np.nan)), "2 sets have values that are not finite"),
        (lambda: bag_scores([0, 1], np.full((2, 3), 0.3), threshold=0.5), "threshold: got 0.5 with 3 classes"),
        (lambda: bag_scores([0, 1], np.full((2, 2), 0.5), cases=["a"]), "cases: got 1, wanted 2"),
        (lambda: choose_threshold([1, 1], np.full((2, 2), 0.5)), "labels: all 2 sets are of class 1"),
        (lambda: choose_threshold([1, 1], np.full((2, 3), 0.5)), "got 3 classes, wanted 2"),
    ],
)
def test_bad_scores(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_prediction_table(tmp_path):
    frame = prediction_table(
        [[0.8, 0.2], [0.4, 0.6]],
        ["normal", "tumour"],
        set_ids=["s1", "s2"],
        case_ids=["p1", "p1"],
        labels=["normal", None],
        split="test",
        threshold=0.7,
    )
    assert list(frame.columns) == ["set_id", "case_id", "split", "label", "prob_normal", "prob_tumour", "predicted"]
    assert frame["predicted"].tolist() == ["normal", "normal"]
    paths = write_table(frame, tmp_path / "predictions.v1")
    assert [path.name for path in paths] == ["predictions.v1.csv", "predictions.v1.parquet"]
    assert pd.read_csv(paths[0])["prob_tumour"].tolist() == [0.2, 0.6]
    assert pd.read_parquet(paths[1])["set_id"].tolist() == ["s1", "s2"]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match=r"probabilities: got shape \(1, 2\), wanted \(2, 2\)"):
        prediction_table([[0.5, 0.5]], ["a", "b"], set_ids=["s1", "s2"])


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "m.json", {"auroc": Interval(float("nan"), 0.1, np.float64(0.2)), "n": np.int64(3), "p": tmp_path})
    found = json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail)
    assert found == {"auroc": {"value": None, "low": 0.1, "high": 0.2}, "n": 3, "p": str(tmp_path)}


def test_an_element_table_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "elements.parquet"
    with pytest.raises(ValueError, match="length"), ElementTable(path) as table:
        [table.add({"element": np.arange(3), "contribution": np.ones(rows)}) for rows in (3, 4)]
    assert list(tmp_path.iterdir()) == []
    with ElementTable(path) as table:
        table.add({"element": np.arange(3), "contribution": np.ones(3, np.float32)})
        assert not path.exists()
        table.add({"element": np.arange(3, 5), "contribution": np.zeros(2, np.float32)})
    assert pq.read_table(path).column("element").to_pylist() == [0, 1, 2, 3, 4]
    assert pq.ParquetFile(path).num_row_groups == 2


def ink(path) -> float:
    """The share of a picture that is not white."""
    return float((np.asarray(Image.open(path).convert("L")) < 250).mean())


def test_plots_are_drawn(tmp_path):
    history = [{"step": s, "epoch": 0, "train/loss": 1 / (s + 1)} for s in range(40)]
    history += [{"step": 20, "val/loss": 0.5, "val/auroc": 0.7}, {"step": 40, "val/loss": 0.4, "val/auroc": float("nan")}]
    plot_curves(history, tmp_path / "plots" / "loss.png", metrics=["loss"])
    plot_curves(history, tmp_path / "plots" / "metrics.png")
    y, p = problem()
    plot_roc(y, p, ["a", "b"], tmp_path / "plots" / "roc.png", threshold=0.5, resamples=50)
    plot_confusion(y, predicted_classes(p), ["a", "b"], tmp_path / "plots" / "confusion.png")
    y, p = problem(classes=3)
    plot_roc(y, p, ["a", "b", "c"], tmp_path / "plots" / "roc3.png", resamples=50)
    plot_spread([{"auroc": 0.9, "f1": 0.8}, {"auroc": 0.8, "f1": 0.7}], tmp_path / "plots" / "folds.png")
    pictures = sorted((tmp_path / "plots").iterdir())
    assert len(pictures) == 6
    assert all(0.02 < ink(path) < 0.9 for path in pictures)


def test_curves_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="history: has loss, wanted"):
        plot_curves([{"step": 1, "train/loss": 0.5}], tmp_path / "m.png")


def test_a_roc_curve_is_that_of_scikit_learn():
    from distset.report.plots import _roc

    y, p = problem(50, seed=2)
    false, true = _roc(y == 1, p[:, 1], np.ones((1, 50)))
    wanted = metrics.roc_curve(y, p[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(false[0], wanted[0], atol=1e-12)
    np.testing.assert_allclose(true[0], wanted[1], atol=1e-12)
