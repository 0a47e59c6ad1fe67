"""Slides on workers of Ray: the bytes of one process, whatever happens to a worker."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("openslide")
pytest.importorskip("tifffile")

from data.made_slides import picture, write_slide

from distset.cluster.config import Cluster
from distset.data import ingest_parts
from distset.data.slides import Features, SlidePlan, Slides
from distset.files import DiskFull
from distset.tasks.backbones import cnn
from distset.versions import installed

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for number, tissue in enumerate([(150, 150, 100), None, (200, 120, 110)]):
        write_slide(folder / f"s{number}.tif", picture((400, 300 + 100 * number), tissue, seed=number), levels=1)
    (folder / "s3.tif").write_bytes(b"II*\0")
    return Slides({f"s{i}": folder / f"s{i}.tif" for i in range(4)}, SlidePlan(patch_size=64))


@pytest.fixture
def runner(cluster):
    from distset.cluster.ingestion import RayRunner

    return RayRunner(Cluster(workers=2))


def contents(folder):
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.csv"]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files if "ingest" not in f.relative_to(folder).parts}


def wrapped(source, read):
    """The source with another ``read``; a class made in here goes to the workers by value."""

    class Wrapped(Slides):
        def read(self, set_id):
            return read(set_id, super().read)

    return Wrapped(source.files, source.plan)


def test_patches_and_features_have_the_bytes_of_one_process(source, runner, tmp_path):
    seen = []
    for name, made in (("patches", source), ("features", Features(source, functools.partial(cnn), batch=8))):
        ours = ingest_parts(made, tmp_path / name, runner=runner, progress=lambda *told: seen.append(told[:2]))
        assert contents(ours.path) == contents(ingest_parts(made, tmp_path / f"{name}-alone").path)
        assert ours.ids == ["s0", "s2"]
    assert seen == 2 * [(done, 4) for done in range(5)]


def test_a_worker_that_dies_is_replaced_and_its_slide_made_again(source, runner, tmp_path):
    once = str(tmp_path / "died")

    def read(set_id, plainly):
        if set_id == "s2" and not Path(once).exists():
            Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plainly(set_id)

    ours = ingest_parts(wrapped(source, read), tmp_path / "s", runner=runner)
    assert Path(once).exists()
    assert contents(ours.path) == contents(ingest_parts(source, tmp_path / "t").path)


@pytest.mark.parametrize("gpu", [False, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_slide_that_ends_every_process_is_left_out(source, tmp_path, cluster, monkeypatch, gpu):
    """In tasks, and in a pool of actors; a share of a GPU is asked for as such."""
    from distset.cluster import ingestion

    def read(set_id, plainly):
        if set_id == "s2":
            with (tmp_path / "starts").open("a") as file:
                file.write("+")
            os._exit(1)
        return plainly(set_id)

    made, asked = wrapped(source, read), []
    if gpu:  # there is none here, so the ask is noted and met without one
        plain = ingestion.ray.data.Dataset.map
        monkeypatch.setattr(ingestion, "require_workers", lambda cluster: None)
        monkeypatch.setattr(
            ingestion.ray.data.Dataset,
            "map",
            lambda rows, fn, num_gpus, **how: asked.append(num_gpus) or plain(rows, fn, **how),
        )
    runner = ingestion.RayRunner(Cluster(workers=2, max_failures=1, gpu=gpu))
    ours = ingest_parts(made, tmp_path / "s", runner=runner)
    assert ours.ids == ["s0"]
    assert (tmp_path / "starts").read_text() == "++"
    assert "its process ended without a word 2 times" in (tmp_path / "s" / "manifest.csv").read_text()
    assert asked == ([0.5] if gpu else [])
    assert contents(ingest_parts(source, tmp_path / "s", retry=True).path) == contents(
        ingest_parts(source, tmp_path / "t").path
    )


def test_a_cluster_that_does_not_fit_says_so(source, tmp_path, monkeypatch):
    from distset.cluster import ingestion

    with pytest.raises(ValueError, match=r"cluster.workers: 5 of 9 workers lack a place"):
        ingest_parts(source, tmp_path / "s", runner=ingestion.RayRunner(Cluster(workers=9)))
    monkeypatch.setattr(ingestion, "installed", lambda: {**installed(), "torch": "9.9.0"})
    with pytest.raises(ValueError, match=r"^cluster: a worker on .* has torch .* instead of 9.9.0"):
        ingest_parts(source, tmp_path / "s", runner=ingestion.RayRunner(Cluster(workers=1)))


def test_a_killed_run_goes_on_with_what_is_left(source, runner, tmp_path):
    def stop(done, total, elements):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_parts(source, tmp_path / "s", runner=runner, progress=stop)
    seen = []
    ours = ingest_parts(source, tmp_path / "s", progress=lambda *told: seen.append(told))
    assert seen[0][0] >= 1
    assert contents(ours.path) == contents(ingest_parts(source, tmp_path / "t").path)


def test_what_is_no_fault_of_a_slide_ends_the_run(source, runner, tmp_path):
    def full(set_id, plainly):
        raise DiskFull("/there: no space is left on its disk")

    def wrong(set_id, plainly):
        raise ZeroDivisionError("encoder")

    with pytest.raises(DiskFull, match="/there: no space is left"):
        ingest_parts(wrapped(source, full), tmp_path / "s", runner=runner)
    with pytest.raises(RuntimeError, match=r"set 's.': ZeroDivisionError: encoder"):
        ingest_parts(wrapped(source, wrong), tmp_path / "t", runner=runner)
    with pytest.raises(ValueError, match=r"set 's3': .*does not open"):
        ingest_parts(source, tmp_path / "u", runner=runner, on_error="raise")
