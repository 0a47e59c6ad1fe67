"""Slides: tissue, grid and pixels against the plain computation; manifests, kills, full disks."""

from __future__ import annotations

import csv
import functools
import io
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("openslide")
pytest.importorskip("tifffile")

import tifffile
from data.made_slides import disc, picture, write_slide
from torch import nn

from distset.data import Store, ingest_parts
from distset.data.slides import Features, Slide, SlidePlan, Slides, camelyon16, slides, tissue_mask
from distset.data.slides.grid import Cut, plan_grid, tissue_share
from distset.data.slides.reading import Level, _Tiles
from distset.data.slides.spool import Spool
from distset.data.slides.tissue import otsu
from distset.files import DiskFull

SIZE, TISSUE = (1000, 700), (420, 330, 250)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of slides of several sizes and kinds: three whole ones, one broken, one cut off, one of glass alone."""
    folder = tmp_path_factory.mktemp("slides")
    for name, size, tissue, how in (
        ("a", SIZE, TISSUE, {}),
        ("sub/b", (700, 900), (350, 500, 220), {"compression": "jpeg", "tile": 112}),
        ("c", (500, 400), (200, 200, 150), {"levels": 1, "mpp": 0.25}),
    ):
        write_slide(folder / f"{name}.tif", picture(size, tissue), **how)
    write_slide(folder / "glass.tif", picture((600, 600), None))
    whole = (folder / "a.tif").read_bytes()
    (folder / "broken.tif").write_bytes(whole[:3000])
    write_slide(folder / "unsaid.tif", picture((400, 400), (200, 200, 150)), mpp=None)
    return folder


def lines(store):
    with open(store.path / "manifest.csv", newline="") as file:
        return {row["set_id"]: row for row in csv.DictReader(file)}


def contents(folder):
    """All that is the store; the folder of the ingest and the manifest say how long it took."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.csv"]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files if "ingest" not in f.relative_to(folder).parts}


def pixels_of(bag):
    return torch.cat(list(bag.map(lambda chunk: chunk.elements)))


# Tissue and grid


@pytest.mark.parametrize("seed", range(5))
def test_otsu_maximises_the_variance_between_the_classes(seed):
    generator = np.random.default_rng(seed)
    values = np.concatenate([generator.normal(40, 12, 900), generator.normal(150, 25, 300 * seed)]).clip(0, 255)
    values = values.astype(np.uint8)

    def between(threshold):
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    best = max(between(threshold) for threshold in range(255))
    assert between(otsu(values)) == pytest.approx(best, rel=1e-9)


def test_the_mask_is_the_tissue_and_glass_has_none():
    found = tissue_mask(picture(SIZE, TISSUE))
    truth = disc(SIZE[1], SIZE[0], *TISSUE)
    assert (found & truth).sum() / (found | truth).sum() > 0.98
    glass = picture(SIZE, None)
    assert not tissue_mask(glass).any()
    dust = glass.copy()
    dust[100:102, 300:302] = (200, 20, 20)
    assert not tissue_mask(dust).any()


def test_shares_of_tissue_are_areas():
    generator = np.random.default_rng(0)
    mask = generator.random((12, 17)) < 0.5
    fine = np.repeat(np.repeat(mask, 100, 0), 100, 1)
    xs, ys, side = np.array([0.0, 1.37, 9.99, 14.2]), np.array([0.25, 3.0, 9.11]), 2.53
    found = tissue_share(mask, xs, ys, side)
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            area = fine[round(100 * y) : round(100 * (y + side)), round(100 * x) : round(100 * (x + side))]
            assert found[i, j] == pytest.approx(area.sum() / (100 * side) ** 2, abs=1e-9)


LEVELS = [Level(40_000, 30_000, 1.0), Level(10_000, 7500, 4.0), Level(2500, 1875, 16.0)]


@pytest.mark.parametrize(
    ("mpp", "level", "side", "found"),
    [
        (0.25, 0, 256, 0.25),
        (0.255, 0, 256, 0.25),  # within 5 %: as it is
        (0.5, 0, 512, 0.5),
        (0.96, 1, 256, 1.0),
        (1.0, 1, 256, 1.0),
        (1.3, 1, 333, 1.3),
        (8.0, 2, 512, 8.0),
    ],
)
def test_a_cut_takes_the_level_from_below(mpp, level, side, found):
    cut = Cut.of(LEVELS, 0.25, mpp=mpp, size=256, overlap=0)
    assert (cut.level, cut.side) == (level, side)
    assert cut.mpp == pytest.approx(found, rel=2e-3)
    assert cut.extent == side * LEVELS[level].downsample
    assert cut.step == side
    assert Cut.of(LEVELS, 0.25, mpp=mpp, size=256, overlap=0.5).step == round(side / 2)


def test_a_slide_that_is_too_coarse():
    with pytest.raises(ValueError, match=r"finest pixels are 1 micrometres, wanted 0\.5"):
        Cut.of(LEVELS, 1.0, mpp=0.5, size=256, overlap=0)


def test_the_grid_takes_what_has_enough_tissue():
    mask = np.zeros((70, 100), bool)
    mask[20:40, 30:60] = True
    cut = Cut(level=0, side=100, step=100, size=100, downsample=1.0, mpp=0.5)
    corners = plan_grid(cut, Level(1000, 700, 1.0), mask, 10.0, 1.0)
    assert corners.tolist() == [[x, y] for y in (200, 300) for x in (300, 400, 500)]
    every = plan_grid(cut, Level(1050, 700, 1.0), np.ones_like(mask), 10.0, 0.5)
    assert len(every) == 70  # those wholly inside


# Pixels


@pytest.mark.parametrize("name", ["a", "sub/b", "c"])
def test_tiles_give_the_pixels_of_openslide(made, name):
    generator = np.random.default_rng(0)
    with Slide(made / f"{name}.tif") as slide:
        tiles = _Tiles.of(slide.path, slide.levels)
        for level, (wide, high, _) in enumerate(slide.levels):
            assert tiles.has(level)
            for _ in range(12):
                x, y = (int(generator.integers(-40, edge)) for edge in (wide, high))
                side = int(generator.integers(1, 300))
                ours, theirs = tiles.read(level, x, y, side, side), slide._by_openslide(level, x, y, side, side)
                assert np.array_equal(ours, theirs)
        tiles.close()


def test_tiles_that_a_file_leaves_out_are_white(tmp_path):
    """As scanners leave out bare glass (Camelyon16 does)."""
    tiles = [np.full((128, 128, 3), 60 + 10 * i, np.uint8) if i % 3 != 1 else None for i in range(12)]
    with tifffile.TiffWriter(tmp_path / "s.tif") as file:
        file.write(
            iter(tiles), shape=(384, 512, 3), dtype=np.uint8, tile=(128, 128), photometric="rgb", compression="zlib",
            resolution=(2e4, 2e4), resolutionunit="CENTIMETER", metadata=None,
        )  # fmt: skip
    with Slide(tmp_path / "s.tif") as slide:
        theirs = slide._by_openslide(0, 0, 0, 512, 384)
        slide.trust(0, np.array([[0, 0], [200, 100]]), 128)
        assert slide._tiles is not None
        assert np.array_equal(slide.read(0, 0, 0, 512, 384), theirs)
        assert theirs[:128, 128:256].min() == 255


def test_the_tiles_are_those_of_the_real_slide(data_folder):
    with Slide(data_folder / "wsi_cmu1" / "CMU-1-Small-Region.svs") as slide:
        assert slide.mpp == pytest.approx(0.499)
        slide.trust(0, np.array([[480, 720], [960, 1200]]), 240)
        assert slide._tiles is not None
        assert np.array_equal(slide.read(0, 700, 1100, 300, 300), slide._by_openslide(0, 700, 1100, 300, 300))


def test_tiles_that_do_not_agree_are_not_used(made, monkeypatch):
    corners = np.array([[200, 200], [300, 300]])
    with Slide(made / "a.tif") as slide:
        slide.trust(0, corners, 128)
        assert slide._tiles is not None
    read = _Tiles.read
    monkeypatch.setattr(_Tiles, "read", lambda self, level, x, y, w, h: read(self, level, x + 3, y, w, h))
    with Slide(made / "a.tif") as slide:
        slide.trust(0, corners, 128)
        assert slide._tiles is None
    with Slide(made / "a.tif", reader="tifffile") as slide, pytest.raises(ValueError, match="not what openslide shows"):
        slide.trust(0, corners, 128)


def test_an_overview_is_the_mean_of_its_pixels(made):
    pixels = picture(SIZE, TISSUE)
    with Slide(made / "a.tif") as slide:
        small, scale = slide.overview(250)
        assert (small.shape, scale) == ((175, 250, 3), 4.0)
        assert np.abs(small.astype(int) - pixels.reshape(175, 4, 250, 4, 3).mean((1, 3))).max() <= 2
        assert slide.overview(2000)[1] == 1.0


def test_what_is_not_a_slide(made):
    with pytest.raises(ValueError, match=r"broken.tif: does not open as a slide"):
        Slide(made / "broken.tif")
    with pytest.raises(ValueError, match="found no such file"):
        Slide(made / "nowhere.tif")
    with pytest.raises(ValueError, match=r"unsaid.tif: does not say .* slide_mpp=0.25"):
        Slide(made / "unsaid.tif")
    assert Slide(made / "unsaid.tif", mpp=0.4).mpp == 0.4
    with pytest.raises(ValueError, match="wanted one of auto"):
        Slide(made / "a.tif", reader="cv2")


# Stores


@pytest.fixture(scope="module")
def store(made, tmp_path_factory):
    return ingest_parts(slides(made, patch_size=64), tmp_path_factory.mktemp("store"))


def test_a_store_of_slides(store, made):
    assert store.ids == ["a", "c", "sub/b"]
    assert (store.kind, store.element_shape, store.info.encoding) == ("images", (3, 64, 64), "files")
    found = lines(store)
    assert {name: row["status"] for name, row in found.items()} == {
        "a": "written", "broken": "failed", "c": "written", "glass": "empty", "sub/b": "written", "unsaid": "failed",
    }  # fmt: skip
    assert "does not open" in found["broken"]["reason"]
    assert "slide_mpp" in found["unsaid"]["reason"]
    assert "no patch has enough tissue (0.0%" in found["glass"]["reason"]
    assert [int(found[name]["elements"]) for name in store.ids] == store.sets["n"].to_pylist()
    assert all(float(row["seconds"]) >= 0 for row in found.values())
    assert list(store.verify()) == store.ids


@pytest.mark.parametrize(("name", "scale"), [("a", 1), ("c", 2)])
def test_patches_are_where_their_coordinates_say(store, made, name, scale):
    """``c`` has half the pixel size, so its patches span twice the pixels and are resampled."""
    size, tissue = {"a": (SIZE, TISSUE), "c": ((500, 400), (200, 200, 150))}[name]
    whole, truth, bag = picture(size, tissue), disc(size[1], size[0], *tissue), store.open(name)
    assert bag.record.extra["patch_size"] == 64 * scale
    assert bag.record.extra["mpp"] == pytest.approx(0.5)
    shares = []
    for patch, (x, y) in zip(pixels_of(bag).numpy(), bag.coords().numpy().astype(int)):
        area = np.s_[y : y + 64 * scale, x : x + 64 * scale]
        wanted = whole[area].reshape(64, scale, 64, scale, 3).mean((1, 3))
        assert np.abs(patch.transpose(1, 2, 0) - wanted).mean() < 5  # JPEG and resampling
        shares.append(truth[area].mean())
    assert min(shares) > 0.2
    grid = truth[: size[1] // (64 * scale) * 64 * scale, : size[0] // (64 * scale) * 64 * scale]
    blocks = grid.reshape(-1, 64 * scale, size[0] // (64 * scale), 64 * scale).mean((1, 3))
    assert (blocks > 0.3).sum() <= len(shares) <= (blocks > 0.2).sum()


def test_rows_are_permuted_and_readers_and_threads_agree(store, made, tmp_path):
    rows = store.open("a").rows()
    assert not torch.equal(rows, torch.arange(len(rows)))
    assert torch.equal(rows.sort().values, torch.arange(len(rows)))
    again = ingest_parts(slides(made, patch_size=64, reader="openslide", threads=3), tmp_path)
    for name in ("a", "c"):  # lossless: two JPEG decoders may differ in a bit
        assert torch.equal(pixels_of(again.open(name)), pixels_of(store.open(name)))
        assert torch.equal(again.open(name).coords(), store.open(name).coords())


def test_errors_can_be_fatal(made, tmp_path):
    with pytest.raises(ValueError, match=r"set '(broken|unsaid)': .*does not"):
        ingest_parts(slides(made, patch_size=64), tmp_path / "s", on_error="raise")
    with pytest.raises(ValueError, match="wanted skip or raise"):
        ingest_parts(slides(made), tmp_path / "s", on_error="ignore")
    with pytest.raises(ValueError, match=r"none of 6 sets could be written; 'a' failed: .*finest pixels.*manifest.csv"):
        ingest_parts(slides(made, mpp=0.1), tmp_path / "t")
    with pytest.raises(ValueError, match=r"overlap, least_tissue, quality: got 1\.0"):
        slides(made, overlap=1.0)
    with pytest.raises(ValueError, match="mpp: got 0"):
        slides(made, mpp=0)


@pytest.mark.parametrize("overview", [1024, 500])
def test_a_slide_that_opens_and_does_not_read_leaves_nothing_behind(made, tmp_path, overview):
    """A tile is lost that the overview reads, or the patches alone: the slide fails as a whole, the others are written."""
    for name in ("a", "c"):
        (tmp_path / f"{name}.tif").write_bytes((made / f"{name}.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tile = file.pages[0].dataoffsets[27]  # the fourth of the fourth row, in the midst of the tissue
    raw = bytearray((tmp_path / "a.tif").read_bytes())
    raw[tile : tile + 200] = bytes(200)
    (tmp_path / "a.tif").write_bytes(raw)
    store = ingest_parts(slides(tmp_path, patch_size=64, overview=overview), tmp_path / "s")
    assert store.ids == ["c"]
    assert "a.tif" in lines(store)["a"]["reason"]
    assert list(store.verify()) == ["c"]
    assert [file.name for file in (store.path / "shards").iterdir()] == ["part-00001.parquet"]


def test_a_mended_slide_is_taken_up_on_request(made, tmp_path):
    folder = tmp_path / "slides"
    for name in ("a", "c"):
        os.makedirs(folder, exist_ok=True)
        (folder / f"{name}.tif").write_bytes((made / f"{name}.tif").read_bytes())
    (folder / "c.tif").write_bytes(b"II*\0")
    source = functools.partial(slides, folder, patch_size=64)
    assert ingest_parts(source(), tmp_path / "s").ids == ["a"]
    (folder / "c.tif").write_bytes((made / "c.tif").read_bytes())
    assert ingest_parts(source(), tmp_path / "s").ids == ["a"]
    watched = Watched(source().files, SlidePlan(patch_size=64))
    assert ingest_parts(watched, tmp_path / "s", retry=True).ids == ["a", "c"]
    assert watched.read_ids == ["c"]
    assert contents(tmp_path / "s") == contents(ingest_parts(source(), tmp_path / "t").path)


def killed_at(moment, source, path):
    """Run the ingest in a child that kills itself at the given write; False where it ended before."""
    child = os.fork()
    if child == 0:
        left = iter(range(moment))

        def counted(fn):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return fn(*args, **kwargs)

            return call

        os.replace, os.open = counted(os.replace), counted(os.open)
        try:
            ingest_parts(source, path)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


class Watched(Slides):
    def __init__(self, files, plan):
        super().__init__(files, plan)
        self.read_ids = []

    def read(self, set_id):
        self.read_ids.append(set_id)
        return super().read(set_id)


def test_a_killed_ingest_goes_on_and_does_nothing_twice(made, tmp_path):
    source = Slides({name: made / f"{name}.tif" for name in ("a", "glass", "c", "broken")}, SlidePlan(patch_size=64))
    expected = contents(ingest_parts(source, tmp_path / "whole").path)
    kills, moment = 0, 2
    while killed_at(moment, source, path := tmp_path / str(moment)):
        with pytest.raises(ValueError, match=r"run the same ingest again|run jobs.ingest first"):
            Store(path)
        there = {f.stem for f in path.glob("ingest/part-*.json")}
        watched = Watched(source.files, source.plan)
        ingest_parts(watched, path)
        again = {f"part-{source.ids.index(name):05d}" for name in watched.read_ids} & there
        assert again <= {"part-00003"}  # what failed is tried again
        assert contents(path) == expected
        kills, moment = kills + 1, moment + 7
    assert kills >= 4


def test_a_full_disk_is_named_and_nothing_half_written_counts(made, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        source = slides(made, patch_size=64)
        with pytest.raises(DiskFull, match=r"disk.*: no space is left .*start the same command again"):
            ingest_parts(source, disk / "s")
        with pytest.raises(ValueError, match="cut off"):
            Store(disk / "s")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert contents(ingest_parts(source, disk / "s").path) == contents(ingest_parts(source, tmp_path / "t").path)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_spool_gives_what_it_took():
    spool = Spool()
    for number in range(50):
        spool.append(bytes([number]) * number)
    assert len(spool) == 50
    assert spool.take([7, 0, 49]) == [b"\7" * 7, b"", b"1" * 49]


# Features


class Mean(nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8
        return images.float().mean((2, 3))


def mean_colour(shape):
    return Mean()


def test_features_are_the_encoders(made, tmp_path):
    cut = Slides({name: made / f"{name}.tif" for name in ("a", "c")}, SlidePlan(patch_size=64, quality=100))
    store = ingest_parts(Features(cut, mean_colour, batch=7, precision="float16"), tmp_path / "f")
    images = ingest_parts(cut, tmp_path / "i")
    assert (store.kind, store.element_shape, store.info.dtype) == ("features", (3,), "float16")
    for name in ("a", "c"):
        found = torch.cat([chunk.elements for chunk in store.open(name).map(lambda chunk: chunk)])
        wanted = pixels_of(images.open(name)).float().mean((2, 3))
        assert torch.equal(store.open(name).rows(), images.open(name).rows())
        assert torch.allclose(found.float(), wanted, atol=2.0)  # JPEG between them
    assert store.record("a").extra == images.record("a").extra


def test_an_encoder_that_gives_no_vectors_is_no_fault_of_the_slides(made, tmp_path):
    cut = Slides({"a": made / "a.tif"}, SlidePlan(patch_size=64))
    with pytest.raises(RuntimeError, match=r"encoder: gave \(54, 3, 64, 64\) for 54 patches, wanted \(54, D\)"):
        ingest_parts(Features(cut, lambda shape: nn.Identity()), tmp_path)
    with pytest.raises(ValueError, match="batch: got 0"):
        Features(cut, mean_colour, batch=0)
    with pytest.raises(ValueError, match="precision: got 'uint8'"):
        Features(cut, mean_colour, precision="uint8")


# Camelyon16


@pytest.fixture
def camelyon(tmp_path):
    for number in range(5):
        for label in ("normal", "tumor"):
            spot = (120, 100, 30) if label == "tumor" else None
            path = tmp_path / "training" / label / f"{label}_{number:03d}.tif"
            write_slide(path, picture((256, 256), (130, 120, 100), spot, seed=number), levels=1)
    for number in (1, 2):
        write_slide(tmp_path / "testing" / "images" / f"test_{number:03d}.tif", picture((256, 256), (130, 120, 100)))
    (tmp_path / "testing" / "reference.csv").write_text("test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n")
    return tmp_path


def test_camelyon16_has_its_labels_and_its_official_test_set(camelyon, tmp_path):
    store = ingest_parts(camelyon16(camelyon, patch_size=64, leave_out=["normal_004"]), tmp_path / "s")
    assert len(store) == 11
    assert store.classes == ["normal", "tumor"]
    split = store.split()
    assert split.test == ["test_001", "test_002"]
    assert store.labels(split.test).tolist() == [1, 0]
    assert sorted(split.train + split.val + split.test) == sorted(store.ids)
    assert {name.split("_")[0] for name in split.val} == {"normal", "tumor"}
    assert all(store.record(name).label == name.split("_")[0] for name in split.train + split.val)


def test_what_camelyon16_must_have(camelyon):
    with pytest.raises(ValueError, match=r"leave_out: .* holds no slide 'normal_999'"):
        camelyon16(camelyon, leave_out=["normal_999"])
    (camelyon / "testing" / "reference.csv").write_text("test_001,Tumor,IDC,Macro\n")
    with pytest.raises(ValueError, match=r"reference.csv: says None of 'test_002'"):
        camelyon16(camelyon)
    (camelyon / "testing" / "reference.csv").unlink()
    with pytest.raises(ValueError, match=r"reference.csv is missing"):
        camelyon16(camelyon)
    with pytest.raises(ValueError, match=r"wanted the layout of Camelyon16"):
        camelyon16(camelyon / "training")


def test_a_broken_slide_leaves_the_split(camelyon, tmp_path):
    (camelyon / "testing" / "images" / "test_002.tif").write_bytes(b"II*\0")
    (camelyon / "training" / "tumor" / "tumor_000.tif").write_bytes(b"")
    store = ingest_parts(camelyon16(camelyon, patch_size=64), tmp_path / "s")
    split = store.split()
    assert split.test == ["test_001"]
    assert "tumor_000" not in split.train + split.val + store.ids
    assert lines(store)["tumor_000"]["status"] == "failed"


def test_jpeg_is_of_the_quality_asked_for(made, tmp_path):
    sizes = {}
    for quality in (30, 95):
        source = Slides({"a": made / "a.tif"}, SlidePlan(patch_size=128, quality=quality))
        data = source.read("a").elements.take([3])[0]
        assert Image.open(io.BytesIO(data)).format == "JPEG"
        sizes[quality] = len(data)
    assert sizes[30] < 0.6 * sizes[95]
