"""Heat-maps, GeoJSON and the elements that say most, against loops over patches."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from distset import InMemory
from distset.report import Extremes, GeoJson, Heatmap, contact_sheet, load_image, pick_elements


def by_loop(heatmap: Heatmap, corners, values) -> np.ndarray:
    sums, counts = np.zeros(heatmap.shape), np.zeros(heatmap.shape)
    for (x, y), value in zip(corners, values, strict=True):
        top, left = int(np.floor(y - heatmap.origin[1])), int(np.floor(x - heatmap.origin[0]))
        bottom, right = round(y - heatmap.origin[1] + heatmap.patch[1]), round(x - heatmap.origin[0] + heatmap.patch[0])
        area = slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))
        sums[area] += value
        counts[area] += 1
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def test_values_are_means_where_patches_overlap():
    rng = np.random.default_rng(0)
    corners, values = rng.uniform(0, 70, (40, 2)), rng.normal(size=40)
    heatmap = Heatmap((90, 80), (9, 7))
    heatmap.add(corners[:13], values[:13])
    heatmap.add(corners[13:], values[13:])
    np.testing.assert_allclose(heatmap.values(), by_loop(heatmap, corners, values), atol=1e-12)


def test_an_area_around_the_patches():
    corners = np.array([[1000.0, 5000.0], [1020.0, 5010.0]])
    heatmap = Heatmap.around(corners, (10, 10))
    assert heatmap.origin == (1000, 5000)
    assert heatmap.shape == (20, 30)
    heatmap.add(corners, np.array([1.0, 2.0]))
    values = heatmap.values()
    assert (values[:10, :10] == 1).all()
    assert (values[10:, 20:] == 2).all()
    assert np.isnan(values).sum() == 600 - 200


def test_a_slide_is_scaled_down_and_no_patch_is_lost():
    corners = np.stack(np.meshgrid(np.arange(0, 100_000, 250), np.arange(0, 50_000, 250)), -1).reshape(-1, 2)
    heatmap = Heatmap((100_000, 50_000), (250, 250), longest=200)  # two patches a pixel each way
    heatmap.add(corners, np.arange(len(corners), dtype=float))
    assert heatmap.shape == (100, 200)
    values = heatmap.values()
    assert np.isfinite(values).all()
    assert values.mean() == pytest.approx((len(corners) - 1) / 2)


def test_patches_outside_of_the_area_stay_at_its_edge():
    heatmap = Heatmap((20, 20), (8, 8))
    heatmap.add(np.array([[-4.0, -4.0], [16.0, 16.0]]), np.ones(2))
    values = heatmap.values()
    assert (values[:4, :4] == 1).all()
    assert (values[16:, 16:] == 1).all()
    assert np.isfinite(values).sum() == 32


def test_pasted_patches_make_the_background():
    heatmap = Heatmap((20, 10), (10, 10))
    heatmap.paste(np.array([[0.0, 0.0], [10.0, 0.0]]), np.stack([np.full((1, 10, 10), 7), np.full((1, 10, 10), 9)]))
    assert (heatmap.background[:, :10] == 7).all()
    assert (heatmap.background[:, 10:] == 9).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_a_heatmap_is_drawn(tmp_path, signed, behind):
    heatmap = Heatmap((60, 40), (10, 10))
    heatmap.add(np.array([[0.0, 0.0], [30.0, 20.0]]), np.array([-1.0, 2.0]))
    image = np.full((40, 60, 3), 128, np.uint8) if behind else None
    heatmap.draw(tmp_path / "h.png", title="s", label="l", signed=signed, image=image)
    picture = np.asarray(Image.open(tmp_path / "h.png").convert("RGB")).astype(int)
    red, blue = picture[..., 0] - picture[..., 2] > 40, picture[..., 2] - picture[..., 0] > 30
    assert red.mean() > 0.01
    assert blue.mean() > 0.01 if signed else True


def test_bad_areas():
    with pytest.raises(ValueError, match="size, patch: got"):
        Heatmap((10, 10), (0, 5))


def area_of(ring) -> float:
    """Signed area by the shoelace formula: above 0 where the ring runs as GeoJSON wants (in its upright axes)."""
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in pairwise(ring)) / 2


def test_geojson_is_what_qupath_reads(tmp_path):
    path = tmp_path / "s.geojson"
    with GeoJson(path, patch=(256, 128), name="slide 1", colors={"tumour": (200, 0, 0)}) as file:
        file.add(np.array([[0, 0], [256, 128.5]]), {"contribution": np.array([0.5, -0.25], np.float32)}, ["tumour", None])
        file.add(np.array([[512, 0]]), {"contribution": np.array([0.0])})
        assert not path.exists()
    found = json.loads(path.read_text())
    assert found["type"] == "FeatureCollection"
    first, second, third = found["features"]
    for feature in found["features"]:
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert len(ring) == 5
        assert area_of(ring) == 256 * 128
        assert feature["properties"]["objectType"] == "detection"
    assert first["geometry"]["coordinates"][0][2] == [256, 128]
    assert first["properties"]["classification"] == {"name": "tumour", "color": [200, 0, 0]}
    assert second["properties"]["measurements"] == {"contribution": -0.25}
    assert "classification" not in second["properties"]
    assert len({first["id"], second["id"], third["id"]}) == 3


def test_geojson_of_nothing_and_of_a_failure(tmp_path):
    with GeoJson(tmp_path / "none.geojson", patch=(1, 1), name="s"):
        pass
    assert json.loads((tmp_path / "none.geojson").read_text())["features"] == []
    with pytest.raises(IndexError), GeoJson(tmp_path / "half.geojson", patch=(1, 1), name="s") as file:
        file.add(np.zeros((2, 2)), {"a": np.zeros(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["none.geojson"]


def test_extremes_of_a_stream_are_those_of_a_sort():
    values = np.random.default_rng(0).normal(size=100).round(1)  # with ties
    extremes, start = Extremes(7), 0
    for size in (1, 3, 50, 46):
        extremes.add(start, values[start : start + size])
        start += size
    assert extremes.top.positions.tolist() == np.argsort(-values, kind="stable")[:7].tolist()
    assert extremes.bottom.positions.tolist() == np.argsort(values, kind="stable")[:7].tolist()
    assert extremes.top.values.tolist() == values[extremes.top.positions].tolist()


def test_elements_are_picked_from_their_chunks_alone():
    x = torch.arange(40.0).view(20, 2)
    bag, read = InMemory(x, bounds=[0, 3, 9, 10, 20]), []
    chunk = bag.chunk
    bag.chunk = lambda index: read.append(index) or chunk(index)
    assert torch.equal(pick_elements(bag, [19, 3, 8, 3]), x[[19, 3, 8, 3]])
    assert read == [1, 3]
    with pytest.raises(ValueError, match=r"positions: got \[20\], wanted some from 0 to 19"):
        pick_elements(bag, [20])


def test_a_contact_sheet_shows_the_patches(tmp_path):
    red = np.zeros((3, 3, 8, 8), np.uint8)
    red[:, 0] = 255
    contact_sheet(
        tmp_path / "s.png",
        [("up", red, ["1", "2", "3"]), ("down", np.zeros((2, 1, 8, 8), np.uint8), ["4", "5"])],
        title="s",
        columns=2,
    )
    picture = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    assert (picture[..., 0] - picture[..., 1] > 200).mean() > 0.1
    assert (picture.max(-1) < 40).mean() > 0.1


def test_images_load_at_the_size_asked_for(tmp_path):
    Image.fromarray(np.zeros((300, 600), np.uint8)).save(tmp_path / "grey.png")
    image, size = load_image(tmp_path / "grey.png", longest=100)
    assert image.shape == (50, 100, 3)
    assert size == (600, 300)
    (tmp_path / "no.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"no\.png does not read"):
        load_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match="found no file"):
        load_image(tmp_path / "nowhere.png")


def test_a_slide_that_is_cut_off_is_named(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("openslide")
    file = tmp_path / "s.tif"
    tifffile.imwrite(file, np.zeros((512, 512, 3), np.uint8), tile=(256, 256), photometric="rgb")
    assert load_image(file)[1] == (512, 512)
    file.write_bytes(file.read_bytes()[:400_000])
    with pytest.raises(ValueError, match=r"s\.tif does not read as a slide"):
        load_image(file)


def test_without_openslide_images_still_load(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    Image.fromarray(np.zeros((30, 60), np.uint8)).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png")[1] == (60, 30)


def test_a_real_slide_has_a_thumbnail_and_its_level_0_size(data_folder):
    pytest.importorskip("openslide")
    image, size = load_image(data_folder / "wsi_cmu1" / "CMU-1-Small-Region.svs", longest=500)
    assert size == (2220, 2967)
    assert max(image.shape[:2]) <= 500
    assert image.std() > 10
