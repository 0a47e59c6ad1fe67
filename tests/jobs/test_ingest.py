"""jobs.ingest: from the user's files to a store, in one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from distset.data import Store
from jobs import ingest
from jobs._overrides import check_overrides

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(monkeypatch, capsys):
    """Run the job in this process; returns its exit code and what it wrote to the terminal."""

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["jobs.ingest", *map(str, overrides)])
        try:
            ingest.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def clam_folder(folder, slides=12, rows=30, dim=8):
    """Slides of six patients, two each."""
    generator = np.random.default_rng(0)
    (folder / "h5_files").mkdir(parents=True)
    for i in range(slides):
        with h5py.File(folder / "h5_files" / f"slide{i}.h5", "w") as file:
            file["features"] = generator.standard_normal((rows, dim)).astype(np.float32)
            file["coords"] = generator.integers(0, 9000, (rows, 2))
    lines = [f"p{i // 2},slide{i}.svs,{['benign', 'tumour'][i // 2 % 2]}" for i in range(slides)]
    (folder / "labels.csv").write_text("case_id,slide_id,label\n" + "\n".join(lines) + "\n")
    return [f"source.path={folder}", f"labels.path={folder / 'labels.csv'}", "source=clam"]


def test_the_default_is_bags_of_digits(start, tmp_path):
    code, out, _ = start(f"store={tmp_path / 's'}", "source.bags=[4,2,2]", "verify=true")
    assert code == 0
    assert "8 sets are whole" in out
    assert "splits: 1 (4 train, 2 val, 2 test)" in out
    assert f"python -m jobs.train data=store data.path={tmp_path / 's'}" in out


def test_slides_with_a_label_table(start, tmp_path):
    order = clam_folder(tmp_path / "in")
    code, out, _ = start(*order, f"store={tmp_path / 's'}", "dtype=float16", "source.patch_size=256")
    assert code == 0
    assert "labels: 6 benign, 6 tumour" in out
    store = Store(tmp_path / "s")
    assert (store.dtype, len(store)) == (torch.float16, 12)
    assert store.record("slide3").case_id == "p1"
    assert store.record("slide3").extra["patch_size"] == 256
    cases = [{store.record(i).case_id for i in part} for part in store.split()]
    assert not cases[0] & cases[1]
    assert not cases[0] & cases[2]
    assert not cases[1] & cases[2]


def test_classes_may_be_numbers(start, tmp_path):
    code, _, err = start(f"store={tmp_path / 's'}", "source.bags=[2,2,2]", "classes=[1,0]")
    assert (code, err) == (0, "")
    assert Store(tmp_path / "s").classes == ["1", "0"]


def test_the_users_folds(start, tmp_path):
    order = clam_folder(tmp_path / "in")
    for fold, (val, test) in enumerate([(2, 4), (4, 2)]):
        parts = {"val": [2 * val, 2 * val + 1], "test": [2 * test, 2 * test + 1]}
        parts["train"] = [i for i in range(12) if i // 2 not in (val, test)]
        table = "slide_id,split\n" + "".join(f"slide{i},{part}\n" for part, ids in parts.items() for i in ids)
        (tmp_path / "in" / f"splits_{fold}.csv").write_text(table)
    code, out, _ = start(*order, f"store={tmp_path / 's'}", f"splits.files=[{tmp_path / 'in'}]")
    assert code == 0
    assert "splits: 2 (8 train, 2 val, 2 test in the first)" in out
    assert Store(tmp_path / "s").split(1).test == ["slide4", "slide5"]


def test_a_second_start_says_what_is_there_and_reads_nothing(start, tmp_path):
    order = clam_folder(tmp_path / "in")
    first = start(*order, f"store={tmp_path / 's'}")
    for file in (tmp_path / "in" / "h5_files").iterdir():
        file.write_bytes(b"")
    assert start(*order, f"store={tmp_path / 's'}") == first


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("source=klam", "did you mean source=clam?"),
        ("source.pth=x", "did you mean source.path?"),
        ("label.path=x", "did you mean labels.path?"),
        ("splits.fold=3", "did you mean splits.folds?"),
        ("labels.set_id=slide", "has no column 'slide'"),
        ("missing=ignore", "wanted error, keep or drop"),
        ("dtype=float8", "wanted one of uint8, float16"),
        ("classes=[benign]", "labels hold tumour, wanted only benign"),
        ("splits.folds=9", "too few cases"),
    ],
)
def test_what_is_wrong_is_one_line(start, tmp_path, wrong, said):
    code, _, err = start(*clam_folder(tmp_path / "in"), f"store={tmp_path / 's'}", wrong)
    assert code == 1
    assert err.startswith("error: ")
    assert said in err
    assert not (tmp_path / "s" / "store.json").exists()


def test_a_source_without_a_path(start):
    code, _, err = start("source=trident")
    assert code == 1
    assert "source.path" in err


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(tmp_path):
    order = clam_folder(tmp_path / "in", slides=60, rows=4000, dim=1024)
    command = [sys.executable, "-m", "jobs.ingest", *order]

    def killed(store, parts):
        job = subprocess.Popen([*command, f"store={store}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        while job.poll() is None and len(list((store / "ingest").glob("part-*.parquet"))) < parts:
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        return job.wait() == -signal.SIGKILL

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert killed(cut, 1)
    assert killed(cut, 2)
    with pytest.raises(ValueError, match="cut off"):
        Store(cut)
    done = subprocess.run([*command, f"store={cut}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "of 60 sets are there already" in done.stdout
    subprocess.run([*command, f"store={whole}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    names = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(cut) for file in cut.rglob("*") if file.is_file())
    assert all((cut / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert json.loads((cut / "store.json").read_text())["num_sets"] == 60
    assert os.path.getsize(cut / "shards" / "part-00000.parquet") > 2**28


def commands_of_the_documentation():
    for line in (ROOT / "docs" / "store.md").read_text().splitlines():
        if line.startswith("| ") and "source=" in line:
            yield [word for part in line.split("`")[1::2] for word in part.split() if "=" in word and not word.endswith("=")]


@pytest.mark.parametrize("words", commands_of_the_documentation(), ids=lambda words: words[0])
def test_commands_of_the_documentation_are_known(words):
    assert words[0].startswith("source=")
    check_overrides("ingest", words)


def test_the_bar_shows_sets_and_elements_a_second(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ingest.Progress(show=True)
    progress(2, 5, 0)
    for done in (3, 4, 5):
        progress(done, 5, 1000)
    progress.close()
    out, err = capsys.readouterr()
    assert out == "2 of 5 sets are there already\n"
    assert "5/5" in err
    assert "elements/s" in err
