"""From slides to a heat-map that lies on the tissue, by the commands that the documentation names."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

pytest.importorskip("openslide")
pytest.importorskip("tifffile")

from data.made_slides import disc, picture, write_slide

from distset.data import Store
from distset.report import Heatmap
from distset.tasks.resnet import ResNet18
from jobs import ingest, predict, train
from jobs._overrides import check_overrides

SIZES = [(320, 256), (256, 352), (448, 300)]
PATCH = 32


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Call a job as the shell does, in a folder of its own; gives what it printed."""
    folder = tmp_path_factory.mktemp("work")

    def call(module, *overrides):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", [module.__name__, *map(str, overrides)])
            module.main()

    call.folder = folder
    return call


def shapes(number):
    """Size, tissue and tumour of the made slide ``number``; every other one has a tumour."""
    width, height = SIZES[number % 3]
    tissue = (width * 0.5, height * 0.48, min(width, height) * 0.4)
    tumour = (width * 0.56, height * 0.5, min(width, height) * 0.22)
    return (width, height), tissue, tumour if number % 2 else None


@pytest.fixture(scope="module")
def store(job):
    """Twelve made slides of three sizes, one broken, one of glass alone, and the real one where it is at hand."""
    folder = job.folder / "slides"
    lines = []
    for number in range(12):
        size, tissue, tumour = shapes(number)
        write_slide(folder / f"made-{number:02d}.tif", picture(size, tissue, tumour, seed=number))
        lines.append(f"p{number},made-{number:02d}.tif,{'tumour' if tumour else 'normal'}\n")
    (folder / "broken.tif").write_bytes((folder / "made-00.tif").read_bytes()[:5000])
    write_slide(folder / "glass.tif", picture((500, 500), None))
    (job.folder / "labels.csv").write_text("case_id,slide_id,label\n" + "".join(lines))
    job(
        ingest, "source=slides", "source.path=slides", f"source.patch_size={PATCH}", "labels.path=labels.csv",
        "missing=keep", "splits.test=0.34", "splits.val=0.25", "store=store", "bar=false", "verify=true",
    )  # fmt: skip
    return Store(job.folder / "store")


@pytest.fixture(scope="module")
def explained(job, store):
    """The folder that jobs.predict wrote, by a classifier trained from pixels."""
    job(
        train, "data=store", "data.path=store", "data.chunk_size=16", "backbone=cnn", "backbone.widths=[4,8]",
        "backbone.dim=8", "backbone.group_norm=false", "model=deepsets", "model.width=16", "grad=sampled", "grad.m=1",
        "optim.lr=1e-2", "cluster=none", "plan.epochs=10", "plan.batch=3", "plan.evaluate_every=10",
        "run.dir=run", "run.bar=false", "run.plots=false",
    )  # fmt: skip
    some = "sets=[made-06,made-11]"
    job(predict, "run=run", "data.path=store", some, "out=out", "elements=true", "explain.geojson=true", "explain.top=0")
    return job.folder / "out"


def test_what_became_of_each_slide(store):
    with open(store.path / "manifest.csv", newline="") as file:
        found = {row["set_id"]: row for row in csv.DictReader(file)}
    assert found["broken"]["status"] == "failed"
    assert found["glass"]["status"] == "empty"
    assert len(store) == 12
    assert all(found[name]["status"] == "written" for name in store.ids)
    assert {name for part in store.split() for name in part} == set(store.ids)


def test_a_classifier_learns_from_the_pixels_alone(job, explained):
    metrics = json.loads((job.folder / "run" / "metrics.json").read_text())
    assert metrics["test"]["auroc"]["value"] >= 0.75, metrics["test"]


@pytest.mark.parametrize("number", [6, 11])
def test_the_heat_map_lies_on_the_tissue(explained, number):
    size, tissue, tumour = shapes(number)
    folder = explained / "elements" / f"made-{number:02d}"
    elements = pd.read_parquet(folder / "elements.parquet")
    corners, score = elements[["x", "y"]].to_numpy(), elements["contribution_tumour"].to_numpy()
    heatmap = Heatmap(size, (PATCH, PATCH))
    heatmap.add(corners, score)
    values, truth = heatmap.values(), disc(size[1], size[0], *tissue)
    footprint = np.isfinite(values)
    assert (footprint & truth).sum() / truth.sum() > 0.85  # the tissue is covered
    assert (footprint & truth).sum() / footprint.sum() > 0.75  # and little else: patches are squares
    if tumour:
        inside = disc(size[1], size[0], *tumour)
        assert np.nanmean(values[inside]) > np.nanmean(values[truth & ~inside]) + np.nanstd(values) / 2
    with Image.open(folder / "contribution.png") as drawn:
        assert min(drawn.size) > 300


def test_a_slide_itself_is_predicted_as_it_is_in_a_store(job, explained):
    job(predict, "run=run", "bag=slides/made-11.tif", "out=one")
    one, stored = (pd.read_csv(folder / "predictions.csv") for folder in (job.folder / "one", explained))
    wanted = stored.set_index("set_id").loc["made-11", "prob_tumour"]
    assert one["prob_tumour"].tolist() == [wanted]
    with pytest.raises(SystemExit):
        job(predict, "run=run", "bag=slides/glass.tif", "out=none")


def test_geojson_comes_back_as_the_patches(explained):
    folder = explained / "elements" / "made-11"
    elements = pd.read_parquet(folder / "elements.parquet")
    features = json.loads((folder / "patches.geojson").read_text())["features"]
    rings = np.array([feature["geometry"]["coordinates"][0] for feature in features])
    assert rings.shape == (len(elements), 5, 2)
    assert np.array_equal(rings[:, 0], elements[["x", "y"]].to_numpy())
    assert np.array_equal(rings[:, 2] - rings[:, 0], np.full((len(elements), 2), PATCH))
    score = [feature["properties"]["measurements"]["contribution"] for feature in features]
    assert np.allclose(score, elements["contribution_tumour"], rtol=1e-6)
    kinds = [feature["properties"]["classification"]["name"] for feature in features]
    assert kinds == ["tumour" if value > 0 else "other" for value in score]


def test_the_real_slide_goes_the_same_way(job, explained, data_folder):
    """Cut, predicted and explained by the classifier of made slides: what it says means nothing, where it says it does."""
    (job.folder / "real").mkdir()
    shutil.copy(data_folder / "wsi_cmu1" / "CMU-1-Small-Region.svs", job.folder / "real")
    how = ["source.mpp=1.0", f"source.patch_size={PATCH}"]
    job(ingest, "source=slides", "source.path=real", *how, "store=real-store", "bar=false")
    record = Store(job.folder / "real-store").record("CMU-1-Small-Region")
    assert record.extra["mpp"] == pytest.approx(0.998)
    assert record.n > 400
    job(predict, "run=run", "data.path=real-store", "out=real-out", "elements=true", "explain.geojson=true", "explain.top=0")
    folder = job.folder / "real-out" / "elements" / "CMU-1-Small-Region"
    features = json.loads((folder / "patches.geojson").read_text())["features"]
    assert len(features) == record.n
    with Image.open(job.folder / "real" / "CMU-1-Small-Region.svs") as file:
        pixels = np.asarray(file).astype(int)
    stained = pixels.max(-1) - pixels.min(-1) > 30
    covered = np.zeros(stained.shape, bool)
    for feature in features:
        (left, top), (right, bottom) = (np.array(feature["geometry"]["coordinates"][0])[[0, 2]]).astype(int)
        covered[top:bottom, left:right] = True
    assert stained[covered].mean() > 0.6
    assert (covered & stained).sum() / stained.sum() > 0.9
    assert (folder / "contribution.png").exists()


@pytest.fixture(scope="module")
def camelyon(job):
    root = job.folder / "camelyon"
    for number in range(4):
        for label in ("normal", "tumor"):
            spot = (100, 92, 40) if label == "tumor" else None
            pixels = picture((192, 192), (96, 96, 80), spot, seed=number)
            write_slide(root / "training" / label / f"{label}_{number:03d}.tif", pixels, levels=1)
            if number > 1:
                name = f"test_{2 * number + (label == 'tumor'):03d}"
                write_slide(root / "testing" / "images" / f"{name}.tif", pixels, levels=1)
    (root / "testing" / "reference.csv").write_text(
        "".join(f"test_{number:03d},{'Tumor' if number % 2 else 'Normal'},None,None\n" for number in range(4, 8))
    )
    torch.manual_seed(0)
    state = ResNet18(projection=16).state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, job.folder / "simclr.pth")
    return root


@pytest.mark.slow
def test_the_camelyon16_recipe_in_both_stages(job, camelyon, capsys):
    """Features, the head on them, then everything end to end from the head's weights."""
    cut = ["source.slides.path=camelyon", "source.slides.patch_size=64"]
    job(
        ingest, "source=slide_features", "source@source.slides=camelyon16", *cut, "backbone@source.encoder=resnet18",
        "source.encoder.weights=simclr.pth", "source.encoder.projection=16", "store=c16-features", "bar=false",
    )  # fmt: skip
    job(ingest, "source=camelyon16", *(line.replace(".slides", "") for line in cut), "store=c16", "bar=false")
    features, patches = Store(job.folder / "c16-features"), Store(job.folder / "c16")
    assert features.element_shape == (16,)
    assert features.split() == patches.split()
    assert patches.split().test == [f"test_{number:03d}" for number in range(4, 8)]
    tiny = [
        "cluster=none", "model.slots=2", "model.width=8", "run.bar=false", "run.plots=false", "data.chunk_size=4",
        "plan.monitor=loss",
    ]  # fmt: skip
    job(train, "experiment=camelyon16_head", "data.path=c16-features", "run.dir=head", "plan.epochs=1", *tiny)
    job(
        train, "experiment=camelyon16_finetune", "data.path=c16", "run.dir=tuned", "task.start=head",
        "backbone.weights=simclr.pth", "backbone.projection=16", "plan.epochs=1", "plan.batch=3", *tiny,
    )  # fmt: skip
    job(predict, "run=head", "bag=camelyon/testing/images/test_004.tif", "out=head-out")
    assert pd.read_csv(job.folder / "head-out" / "predictions.csv")["set_id"].tolist() == ["test_004"]
    (job.folder / "simclr.pth").unlink()  # a run stands on its own
    shutil.rmtree(job.folder / "head")
    job(predict, "run=tuned", "data.part=test", "out=tuned-out")
    table = pd.read_csv(job.folder / "tuned-out" / "predictions.csv")
    assert table["set_id"].tolist() == patches.split().test
    assert np.isfinite(table["prob_tumor"]).all()
    capsys.readouterr()


def commands_of_the_page():
    """The overrides of each command of docs/slides.md."""
    text = (Path(__file__).parents[2] / "docs" / "slides.md").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith(".venv/bin/python -m jobs."):
            module, *words = line.split()[2:]
            yield module.removeprefix("jobs."), words


@pytest.mark.parametrize(("name", "words"), commands_of_the_page(), ids=lambda value: str(value)[:40])
def test_commands_of_the_page_are_known(name, words):
    check_overrides(name, words)
