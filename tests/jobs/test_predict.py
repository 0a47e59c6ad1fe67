"""jobs.evaluate and jobs.predict on a run that jobs.train made, from the command line on."""

import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image

from distset import InMemory, encode_set
from distset.bags.explain import ExplainPlan, Geometry, element_scores, explain_bag, folder_name, spacing
from distset.bags.predict import Trained, choose_sets, store_of_file
from distset.data import Bag, Split, Store, write_store
from distset.data.splits import save_splits
from distset.report import bag_scores
from distset.runs import RunFolder
from distset.tasks import bag_models
from distset.tasks.bags import BagTask, _inside
from jobs import evaluate, predict, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: bags of digits, one epoch, in this process."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    overrides = [f"run.dir={folder}", "run.bar=false", "cluster=none", "plan.epochs=1", "data.make.bags=[12,8,8]"]
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides), resolve=True)
    train.ensure_store(config["data"])
    train.train(config, folder)
    return folder


@pytest.fixture
def job(monkeypatch, capsys, tmp_path):
    """Call a job as the shell does; gives what it printed, errors too, and its exit code."""

    def call(module, *overrides: str) -> tuple[str, int]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__name__, *overrides])
        try:
            module.main()
            code = 0
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return captured.out + captured.err, code

    return call


def test_evaluate_gives_the_figures_of_the_run(run, job):
    said, code = job(evaluate, f"run={run}", "resamples=100")
    assert code == 0, said
    out = run / "evaluate" / "data-test"
    found, trained = json.loads((out / "metrics.json").read_text()), json.loads((run / "metrics.json").read_text())
    assert found["threshold"] == trained["threshold"]
    for name, interval in found["scores"].items():
        assert interval["value"] == pytest.approx(trained["test"][name]["value"], abs=1e-12)
        assert f"{interval['value']:.3f}" in said
    assert {path.name for path in (out / "plots").iterdir()} == {"roc.png", "confusion.png"}
    table, before = pd.read_csv(out / "predictions.csv"), pd.read_csv(run / "predictions.csv")
    before = before[before["split"] == "test"].reset_index(drop=True)
    np.testing.assert_allclose(table["prob_1"], before["prob_1"], atol=1e-7)
    assert table["predicted"].tolist() == before["predicted"].tolist()


@torch.no_grad()
def test_evaluate_measures_how_well_elements_are_found(run, job, tmp_path):
    said, code = job(evaluate, f"run={run}", "instances=true", "resamples=50", "data.part=val", "out=ev")
    assert code == 0, said
    found = json.loads((tmp_path / "ev" / "metrics.json").read_text())["instances"]
    assert found["bags"] == 4
    store, task = Store(run / "data"), RunFolder(run).load_task()
    aurocs = []
    for set_id in store.split().val:
        bag = store.open(set_id)
        truth = bag.instance_labels().numpy() > 0
        if not truth.any():
            continue
        images = bag.chunk(0).elements
        alone = [task.predict(InMemory(images[i : i + 1], element_ndim=3)).numpy() for i in range(len(truth))]
        aurocs.append(bag_scores(truth.astype(int), np.array(alone), resamples=0)["auroc"].value)
    assert found["alone"]["value"] == pytest.approx(np.mean(aurocs), abs=1e-6)


def test_the_runs_own_store_brings_the_runs_own_split(run, job, tmp_path):
    """Named or not: the test part of another split holds sets that the run was trained on."""
    shutil.copytree(run, tmp_path / "run")
    store = Store(shutil.copytree(run / "data", tmp_path / "data"))
    train, val, test = store.split()
    save_splits(store.path / "splits" / "mine.csv", [Split(train, test, val)], store.cases)
    config = {**RunFolder(run).config, "data": {**RunFolder(run).config["data"], "path": str(store.path), "split": "mine"}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    for named in ([], ["data.path=data"], [f"data.path={tmp_path}/run/../data"]):
        said, code = job(evaluate, "run=run", "resamples=10", "out=ev", *named)
        assert code == 0, said
        assert pd.read_csv(tmp_path / "ev" / "predictions.csv")["set_id"].tolist() == val
    said, code = job(evaluate, "run=run", "resamples=10", "out=ev", "data.path=data", "data.split=default")
    assert code == 0, said
    assert pd.read_csv(tmp_path / "ev" / "predictions.csv")["set_id"].tolist() == test


def test_predict_all_sets_of_a_store(run, job):
    said, code = job(predict, f"run={run}", "out=p", "threshold=0.0", "data.chunk_size=7")
    assert code == 0, said
    table = pd.read_parquet("p/predictions.parquet")
    store, task = Store(run / "data"), RunFolder(run).load_task()
    assert table["set_id"].tolist() == store.ids
    assert set(table["predicted"]) == {"1"}
    wanted = task.predict(store.open(store.ids[5])).detach().numpy()
    np.testing.assert_allclose(table.loc[5, ["prob_0", "prob_1"]].astype(float), wanted, atol=1e-6)
    assert "and 18 more" in said


def test_elements_are_explained(run, job, tmp_path):
    said, code = job(
        predict,
        f"run={run}",
        "sets=[test-0001]",
        "out=p",
        "elements=true",
        "explain.alone=true",
        "explain.geojson=true",
        "explain.top=3",
    )
    assert code == 0, said
    (folder,) = (tmp_path / "p" / "elements").iterdir()
    assert folder.name == "test-0001"
    names = {"elements.parquet", "contribution.png", "attention.png", "patches.geojson", "top.csv", "top.parquet", "top.png"}
    assert {path.name for path in folder.iterdir()} == names
    elements = pd.read_parquet(folder / "elements.parquet")
    bag = Store(run / "data").open("test-0001")
    assert elements["element"].tolist() == list(range(len(bag)))
    assert sorted(elements["row"]) == list(range(len(bag)))
    np.testing.assert_array_equal(elements[["x", "y"]], bag.coords())
    np.testing.assert_array_equal(elements["label"], bag.instance_labels())
    assert elements["attention"].sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(elements["alone_0"] + elements["alone_1"], 1, atol=1e-6)
    top = pd.read_csv(folder / "top.csv")
    assert top["kind"].tolist() == ["top"] * 3 + ["bottom"] * 3
    order = elements.sort_values("contribution_1", ascending=False, kind="stable")
    assert top["element"].tolist()[:3] == order["element"].tolist()[:3]
    features = json.loads((folder / "patches.geojson").read_text())["features"]
    assert len(features) == len(bag)
    measured = [feature["properties"]["measurements"]["contribution"] for feature in features]
    np.testing.assert_allclose(measured, elements["contribution_1"])
    assert {f["properties"]["classification"]["name"] for f in features} == {"1", "other"}


def test_contributions_of_a_softmax_pool_sum_to_zero(run):
    store, task = Store(run / "data"), RunFolder(run).load_task()
    bag = store.open("test-0001")
    parts = list(element_scores(task, bag))
    contribution = torch.from_numpy(np.concatenate([part.contribution for part in parts]))[:, 0]
    # all weights scaled alike leave a softmax as it is
    assert abs(contribution.sum()) < 1e-5 * contribution.abs().sum()
    logit = task.model.head(encode_set(task.model.encoder, bag, seed=0))
    assert logit.shape == (1,)
    assert torch.sigmoid(logit).item() == pytest.approx(task.predict(bag)[1].item(), abs=1e-6)


def test_a_checkpoint_alone_needs_a_store(run, job, tmp_path):
    shutil.copy(run / "checkpoints" / "best" / "state.pt", tmp_path / "model.pt")
    said, code = job(predict, f"run={tmp_path}/model.pt")
    assert code == 1
    assert "checkpoint without its run; name a store" in said
    said, code = job(predict, f"run={tmp_path}/model.pt", f"data.path={run}/data", "sets=[test-0003]")
    assert code == 0, said
    assert len(pd.read_csv(tmp_path / "predict" / "data" / "predictions.csv")) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sets=[tset-0001]"], "sets: got 'tset-0001', which .* the nearest it holds is 'test-0001'"),
        (["data.part=tset"], "part: got 'tset', wanted train, val, test or all"),
        (["which=bst"], r"checkpoint: found no file .*bst/state\.pt"),
        (["device=cuda:x"], "device: got 'cuda:x'"),
        (["explain.targt=1"], r"explain\.targt: .* did you mean explain\.target"),
        (["elements=true", "explain.target=9"], "target: got '9', wanted one of the classes 0, 1"),
        (["data.fold=3", "data.part=test"], "fold: got 3"),
    ],
)
def test_clear_errors(run, job, overrides, words):
    said, code = job(predict, f"run={run}", *overrides)
    assert code == 1
    assert said.startswith("error: ")
    assert re.search(words, said), said


def test_a_folder_without_a_run_and_a_run_without_a_checkpoint(run, job, tmp_path):
    said, code = job(predict, f"run={tmp_path}")
    assert (code, "holds no config.yaml" in said) == (1, True), said
    (tmp_path / "half").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "half")
    said, code = job(predict, f"run={tmp_path}/half")
    assert (code, "found no file" in said and "train first" in said) == (1, True), said


def test_a_store_of_other_elements(run, job, tmp_path):
    bags = [Bag(f"s{i}", np.zeros((3, 5), np.float32), label="ab"[i % 2]) for i in range(4)]
    write_store(tmp_path / "other", bags)
    said, code = job(predict, f"run={run}", f"data.path={tmp_path}/other")
    assert code == 1
    assert "elements of shape (5,), the model was trained on (1, 8, 8)" in said


def test_evaluate_on_another_store_knows_the_classes_by_name(run, job, tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (6, 1, 8, 8)).astype(np.uint8) for _ in range(4)]
    write_store(tmp_path / "other", [Bag(f"s{i}", x, label="01"[i % 2]) for i, x in enumerate(images)])
    said, code = job(evaluate, f"run={run}", f"data.path={tmp_path}/other", "data.part=all", "resamples=20", "out=o")
    assert code == 0, said
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["sets"] == 4
    write_store(tmp_path / "third", [Bag(f"s{i}", x, label="0b"[i % 2]) for i, x in enumerate(images)])
    said, code = job(evaluate, f"run={run}", f"data.path={tmp_path}/third", "data.part=all")
    assert (code, "has b, the model knows 0, 1" in said) == (1, True), said
    write_store(tmp_path / "none", [Bag(f"s{i}", x) for i, x in enumerate(images)])
    said, code = job(evaluate, f"run={run}", f"data.path={tmp_path}/none", "data.part=all")
    assert (code, "labels: 4 sets have none, the first is 's0'" in said) == (1, True), said
    said, code = job(predict, f"run={run}", f"data.path={tmp_path}/none", "out=n")
    assert code == 0, said
    assert "label" not in pd.read_csv(tmp_path / "n" / "predictions.csv").columns


def test_heatmaps_lie_over_the_image_of_the_set(run, tmp_path):
    image = np.full((40, 60, 3), 200, np.uint8)
    Image.fromarray(image).save(tmp_path / "img.png")
    rng = np.random.default_rng(0)
    coords = np.array([[4.0, 4.0], [20.0, 12.0], [50.0, 30.0]])
    extra = {"image": "elsewhere/img.png", "patch_size": 9, "anchor": "center"}
    elements = rng.integers(0, 255, (3, 1, 8, 8)).astype(np.uint8)
    store = write_store(
        tmp_path / "store", [Bag("a/b", elements, coords, label="0", extra=extra), Bag("c", elements, label="1")]
    )
    bag = store.open("a/b", 2)
    geometry = Geometry.of(bag)
    assert sorted(map(tuple, geometry.corners.tolist())) == [(0.0, 0.0), (16.0, 8.0), (46.0, 26.0)]
    assert geometry.patch == (9.0, 9.0)
    task = Trained.load(run).task
    folder = tmp_path / folder_name("a/b")
    explain_bag(task, bag, folder, ExplainPlan(images=str(tmp_path), target="0", top=0), [0.5, 0.5])
    picture = np.asarray(Image.open(folder / "contribution.png").convert("RGB"))
    assert ((picture == 200).all(-1)).mean() > 0.4  # the image, twice
    signs = pd.read_parquet(folder / "elements.parquet")["contribution_1"]
    assert signs.abs().max() > 0
    task.classes = ["tumour", "other"]
    explain_bag(task, bag, folder, ExplainPlan(images=str(tmp_path), png=False, geojson=True, top=0), [0.5, 0.5])
    found = json.loads((folder / "patches.geojson").read_text())["features"]
    kinds = {f["properties"]["classification"]["name"]: f["properties"]["classification"]["color"] for f in found}
    assert kinds == {"other": [203, 24, 29], "not other": [33, 102, 172]}
    nowhere = store.open("c")
    assert Geometry.of(nowhere) is None
    explain_bag(task, nowhere, tmp_path / "c", ExplainPlan(geojson=True), [0.5, 0.5])
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"elements.parquet", "top.csv", "top.parquet", "top.png"}


def test_one_file_is_a_bag(run, job, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (6, 1, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "slide 7.npy", images)
    torch.save({"features": torch.from_numpy(images)}, tmp_path / "slide-8.pt")
    for file, stem in (("slide 7.npy", "slide 7"), ("slide-8.pt", "slide-8")):
        said, code = job(predict, f"run={run}", f"bag='{tmp_path / file}'", "elements=true", f"out='{tmp_path / stem}'")
        assert code == 0, said
        row = pd.read_csv(tmp_path / stem / "predictions.csv").iloc[0]
        assert row["set_id"] == stem
        wanted = RunFolder(run).load_task().predict(InMemory(torch.from_numpy(images), element_ndim=3))
        assert row["prob_1"] == pytest.approx(wanted[1].item(), abs=1e-6)
        assert (tmp_path / stem / "elements" / folder_name(stem) / "elements.parquet").exists()
    np.save(tmp_path / "slide-8.npy", images[:2])  # what else lies in the folder is not asked
    (tmp_path / "pt_files").mkdir()
    said, code = job(predict, f"run={run}", f"bag={tmp_path}/slide-8.pt", "out=again")
    assert code == 0, said
    assert pd.read_csv("again/predictions.csv")["prob_1"].item() == row["prob_1"]
    np.save(tmp_path / "wide.npy", np.zeros((4, 7), np.float32))
    said, code = job(predict, f"run={run}", f"bag={tmp_path}/wide.npy")
    assert (code, "wide.npy has elements of shape (7,), the model" in said) == (1, True), said
    (tmp_path / "no.npy").write_text("no array")
    said, code = job(predict, f"run={run}", f"bag={tmp_path}/no.npy")
    assert (code, "no.npy does not read" in said) == (1, True), said
    said, code = job(predict, f"run={run}", f"bag={tmp_path}/slide.xml")
    assert (code, "bag: found nothing at" in said) == (1, True), said
    (tmp_path / "slide.xml").write_text("")
    said, code = job(predict, f"run={run}", f"bag={tmp_path}/slide.xml")
    assert (code, "bag: got slide.xml, wanted a file that ends in .h5" in said) == (1, True), said


def test_h5_files_of_slides_are_bags(tmp_path):
    h5py = pytest.importorskip("h5py")
    for name, key in (("clam", "features"), ("stamp", "feats")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file[key] = np.ones((5, 3), np.float32)
            file["coords"] = np.arange(10.0).reshape(5, 2)
            if name == "stamp":
                file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224})
        store = store_of_file(tmp_path / f"{name}.h5", tmp_path / "scratch")
        assert store.ids == [name]
        assert len(store.open(name)) == 5


def test_small_parts():
    assert folder_name("slide-1.2") == "slide-1.2"
    assert folder_name("a/b") != folder_name("a_b")
    assert "/" not in folder_name("../x")
    assert spacing(np.array([[0.0, 5.0], [256.0, 5.0], [1024.0, 261.0]])) == 256
    assert spacing(np.zeros((1, 2))) == 1


def test_parts_of_a_split(run):
    store = Store(run / "data")
    assert choose_sets(store) == store.ids
    assert choose_sets(store, part="val") == store.split().val
    with pytest.raises(ValueError, match="the nearest it holds is 'val-0000'"):
        choose_sets(store, sets=["val-0000x"])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("model", ["umbc", "sse", "hierarchical_sse", "deepsets", "abmil", "dsmil", "max_instance"])
def test_elements_of_every_model(model, classes):
    """With a network inside: attention sums to 1, contributions do not depend on chunks, an element alone is a bag."""
    outputs = 1 if classes == 2 else classes
    extractor = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh())
    encoder, head = getattr(bag_models, model)(8, outputs, width=8)
    task = BagTask.of(_inside(extractor, encoder), head, classes=["a", "b", "c"][:classes])
    task.model.double().eval()
    images = torch.randn(9, 3, 2, 2, dtype=torch.float64)

    def scores(chunk_size):
        parts = list(element_scores(task, InMemory(images, chunk_size, element_ndim=3), alone=True))
        return [np.concatenate([getattr(part, name) for part in parts]) for name in ("attention", "contribution", "alone")]

    attention, contribution, alone = scores(None)
    assert attention.sum() == pytest.approx(1)
    assert contribution.shape == (9, outputs)
    assert np.abs(contribution).max() > 0
    for got, wanted in zip(scores(4), (attention, contribution, alone), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    one = task.predict(InMemory(images[3:4], element_ndim=3)).detach()
    np.testing.assert_allclose(alone[3], one, atol=1e-6)
