"""Readers: every format gives the rows, coordinates and labels that were written, and a broken file is named."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distset.data import Source, ingest, readers
from distset.data.readers import h5, nuclei

DATA = Path(os.environ.get("DISTSET_DATA", Path(__file__).parents[3] / "shared" / "data"))
RNG = np.random.default_rng(0)
X = {name: RNG.standard_normal((n, 6)).astype(np.float16) for name, n in [("a", 5), ("b", 3)]}
XY = {name: RNG.integers(0, 9000, (len(x), 2)) for name, x in X.items()}


def with_h5(folder, key="features", *, attrs=(), file_attrs=(), coords=XY, batch=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, x in X.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file[key] = x[None] if batch else x
            file["coords"] = coords[name][None] if batch else coords[name]
            file["coords"].attrs.update(dict(attrs))
            file.attrs.update(dict(file_attrs))
    return folder


def check(source, *, coords=XY):
    assert isinstance(source, Source)
    assert list(source.ids) == ["a", "b"]
    for name, x in X.items():
        bag = source.read(name)
        assert np.array_equal(np.asarray(bag.elements, np.float32), x.astype(np.float32))
        assert bag.coords is None if coords is None else np.array_equal(bag.coords, coords[name])
    return bag


@pytest.mark.parametrize("inner", ["", "h5_files"])
def test_clam(tmp_path, inner):
    with_h5(tmp_path / inner)
    (tmp_path / "pt_files").mkdir(exist_ok=True)
    assert check(readers.clam(tmp_path)).extra["patch_size"] is None
    assert readers.clam(tmp_path, patch_size=512).read("a").extra["patch_size"] == 512


def test_clam_patch_size_comes_to_level_0(tmp_path):
    with_h5(tmp_path, attrs={"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0, 4.0])})
    assert readers.clam(tmp_path).read("a").extra["patch_size"] == 1024


@pytest.mark.parametrize("batch", [False, True])
def test_trident_keeps_attributes(tmp_path, batch):
    attributes = {"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20, "name": np.bytes_(b"slide")}
    bag = check(readers.trident(with_h5(tmp_path, attrs=attributes, batch=batch)))
    assert (bag.extra["patch_size"], bag.extra["coords_unit"]) == (512, "px")
    assert bag.extra["attributes"] == {**attributes, "name": "slide"}


@pytest.mark.parametrize("key", ["feats", "patch_embeddings"])
@pytest.mark.parametrize("said", [{"tile_size_um": 256.0, "tile_size_px": 224}, {"tile_size": 256.0, "unit": "um"}])
def test_stamp_counts_in_micrometres(tmp_path, key, said):
    bag = check(readers.stamp(with_h5(tmp_path, key, file_attrs=said)))
    assert (bag.extra["patch_size"], bag.extra["coords_unit"]) == (256.0, "um")


def test_stamp_of_the_first_version_is_brought_to_micrometres(tmp_path):
    old = {name: 224 * RNG.permutation(40)[: len(x), None] * np.array([1, 2]) for name, x in X.items()}
    for name in old:
        old[name][:2, 0] = [0, 224]
    with_h5(tmp_path, "feats", coords=old)
    bag = check(readers.stamp(tmp_path), coords={name: xy / 224 * 256 for name, xy in old.items()})
    assert bag.extra["patch_size"] == 256.0


def test_stamp_refuses_vectors_of_slides_and_coordinates_without_unit(tmp_path):
    with_h5(tmp_path / "slides", "feats", file_attrs={"feat_type": "slide"})
    with pytest.raises(ValueError, match=r"a\.h5.*one vector a slide"):
        readers.stamp(tmp_path / "slides").read("a")
    with_h5(tmp_path / "unit", "feats")
    with pytest.raises(ValueError, match="no unit of its coords"):
        readers.stamp(tmp_path / "unit").read("a")


@pytest.mark.parametrize("batch", [False, True])
def test_a_large_h5_goes_over_a_scratch_file(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(h5, "SPOOL_BYTES", 10)
    source = readers.clam(with_h5(tmp_path, batch=batch))
    assert isinstance(source.read("a").elements, np.memmap)
    check(source)


@pytest.mark.parametrize("inner", ["", "pt_files"])
def test_pt_files_hold_tensors_or_dicts(tmp_path, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    torch.save(torch.from_numpy(X["a"]), folder / "a.pt")
    torch.save({"features": torch.from_numpy(X["b"]), "instance_labels": torch.tensor([0, 1, 0])}, folder / "b.pt")
    bag = check(readers.pt_files(tmp_path), coords=None)
    assert bag.instance_labels.tolist() == [0, 1, 0]


def test_pt_files_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"features": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt"):
        readers.pt_files(tmp_path).read("a")
    assert not (tmp_path / "harm").exists()


def test_bfloat16_stays_bfloat16(tmp_path):
    torch.save(torch.randn(7, 4).bfloat16(), tmp_path / "a.pt")
    store = ingest(readers.pt_files(tmp_path), tmp_path / "store")
    assert store.dtype == torch.bfloat16
    bag = store.open("a")
    saved = torch.load(tmp_path / "a.pt")
    assert torch.equal(bag.chunk(0).elements, saved[bag.rows()])


def test_numpy_files(tmp_path):
    np.save(tmp_path / "a.npy", X["a"])
    np.savez(tmp_path / "b.npz", features=X["b"], coords=XY["b"])
    source = readers.arrays(tmp_path)
    assert source.read("a").coords is None
    assert np.array_equal(source.read("b").coords, XY["b"])
    assert np.array_equal(source.read("a").elements, X["a"])


def test_csv_bags_with_labels_from_their_folders(tmp_path):
    for label, name in [("LUAD", "a"), ("LUSC", "b")]:
        (tmp_path / label).mkdir()
        header = ",".join(map(str, range(6)))
        np.savetxt(tmp_path / label / f"{name}.csv", X[name].astype(np.float32), delimiter=",", header=header, comments="")
    source = readers.csv_bags(tmp_path, folder_is_label=True)
    assert source.ids == ["LUAD/a", "LUSC/b"]
    assert [source.read(i).label for i in source.ids] == ["LUAD", "LUSC"]
    assert np.allclose(source.read("LUAD/a").elements, X["a"], atol=1e-6)
    assert source.read("LUAD/a").elements.dtype == np.float32


def test_a_csv_bag_without_a_header_does_not_lose_its_first_element(tmp_path):
    np.savetxt(tmp_path / "a.csv", X["a"].astype(np.float32), delimiter=",")
    with pytest.raises(ValueError, match=r"a\.csv: .*has no header, its first line is "):
        readers.csv_bags(tmp_path).read("a")


def rows_of_table(kind):
    """The bags' rows, mixed up, with their columns."""
    ids = np.array(["a"] * 5 + ["b"] * 3)
    order = np.array([0, 5, 1, 6, 2, 3, 7, 4])
    x, xy = np.concatenate([X["a"], X["b"]])[order].astype(np.float32), np.concatenate([XY["a"], XY["b"]])[order]
    columns = {"set_id": ids[order], "label": np.where(ids == "a", "no", "yes")[order], "x": xy[:, 0], "y": xy[:, 1]}
    columns |= {"case_id": np.full(8, "p"), "kind": np.arange(8) % 2}
    if kind == "columns":
        return pa.table({**columns, **{f"f{i}": x[:, i] for i in range(6)}})
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 6)
    return pa.table({**columns, "feature": lists if kind == "fixed" else pa.array(list(x))})


@pytest.mark.parametrize("kind", ["columns", "fixed", "lists"])
@pytest.mark.parametrize("file", ["t.parquet", "t.arrow", "folder"])
def test_tables_with_a_set_id(tmp_path, kind, file):
    rows, path = rows_of_table(kind), tmp_path / file
    if file == "folder":
        path.mkdir()
        pq.write_table(rows[:3], path / "0.parquet")
        pq.write_table(rows[3:], path / "1.parquet", row_group_size=2)
    elif file == "t.parquet":
        pq.write_table(rows, path, row_group_size=3)
    else:
        feather.write_feather(rows, path)
    bag = check(readers.table(path, instance_label="kind"))
    assert (bag.label, bag.case_id) == ("yes", "p")
    assert bag.instance_labels.tolist() == [1, 1, 0]


def test_names_in_csv_tables_are_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("set_id,f,label,case_id\n01,0.5,1,007\n1,1.5,NA,7\n1,2.5,NA,7\n2,3.5,,\n")
    source = readers.table(path)
    bags = [source.read(set_id) for set_id in source.ids]
    assert [(bag.set_id, len(bag.elements)) for bag in bags] == [("01", 1), ("1", 2), ("2", 1)]
    assert [(bag.label, bag.case_id) for bag in bags] == [("1", "007"), (None, "7"), (None, None)]
    path.write_text("set_id,f\na,0.5\n,1.5\n")
    with pytest.raises(ValueError, match="has 1 rows without a set_id"):
        readers.table(path)


def test_tables_say_what_is_wrong(tmp_path):
    rows = rows_of_table("columns")
    pq.write_table(rows, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet.*no column 'slide'"):
        readers.table(tmp_path / "t.parquet", set_id="slide")
    with pytest.raises(ValueError, match="no column 'z'"):
        readers.table(tmp_path / "t.parquet", features=["f0", "z"])
    with pytest.raises(ValueError, match="label is 'no' and 'yes'"):
        readers.table(tmp_path / "t.parquet", set_id="case_id", features=["f0"], case_id=None).read("p")
    pq.write_table(pa.table({"set_id": ["a", "a"], "feature": [[1.0, 2.0], [3.0]]}), tmp_path / "ragged.parquet")
    with pytest.raises(ValueError, match=r"rows of 1, 2 numbers, wanted one width"):
        readers.table(tmp_path / "ragged.parquet").read("a")


def patch_folder(folder, n=4, size=(5, 6), name="{}_{}"):
    folder.mkdir(parents=True)
    pixels = RNG.integers(0, 256, (n, *size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / (name.format(i, i * 10) + ".png"))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_folders_of_patches(tmp_path):
    pixels = {f"{label}/{i}": patch_folder(tmp_path / "in" / label / str(i)) for label in ("no", "yes") for i in range(3)}
    store = ingest(readers.patches(tmp_path / "in", folder_is_label=True), tmp_path / "store")
    assert store.ids == sorted(pixels)
    assert store.classes == ["no", "yes"]
    for set_id, expected in pixels.items():
        bag = store.open(set_id)
        assert torch.equal(bag.chunk(0).elements, expected[bag.rows()])
        assert torch.equal(bag.coords(), torch.stack([bag.rows(), 10 * bag.rows()], -1).double())


def test_patches_keep_the_bytes_of_their_files(tmp_path):
    patch_folder(tmp_path / "in" / "a", name="patch{}{}")
    source = readers.patches(tmp_path / "in")
    files = sorted((tmp_path / "in" / "a").iterdir())
    assert source.read("a").elements.take([2, 0]) == [files[2].read_bytes(), files[0].read_bytes()]
    assert source.read("a").coords is None


def test_cut_patches_have_the_nucleus_in_the_middle_and_reflect_at_the_border():
    image = np.arange(20 * 30 * 3, dtype=np.int64).reshape(20, 30, 3)
    cuts = nuclei.cut(image, np.array([[10.2, 7.4], [0.0, 0.0]]), 5)
    assert np.array_equal(cuts[0], image[5:10, 8:13].transpose(2, 0, 1))
    assert np.array_equal(cuts[1][:, 2:, 2:], image[:3, :3].transpose(2, 0, 1))
    assert np.array_equal(cuts[1][:, 0, 2], image[2, 0])


@pytest.mark.skipif(not (DATA / "colon_crc").is_dir(), reason="needs colon_crc under DISTSET_DATA")
def test_colon_bags_are_those_of_the_literature(tmp_path):
    store = ingest(readers.colon(DATA / "colon_crc"), tmp_path)
    sizes = store.sets["n"].to_pylist()
    assert (len(store), sum(sizes), min(sizes), max(sizes)) == (100, 22_444, 1, 796)
    assert store.sets["label"].to_pylist().count("1") == 51
    for set_id, label in zip(store.ids, store.labels(store.ids)):
        assert bool(store.open(set_id).instance_labels().any()) == bool(label)
    record = store.record("img1")
    with Image.open(record.extra["image"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    bag = store.open("img1")
    inside = ((bag.coords() > 14) & (bag.coords() < 485)).all(-1).nonzero()[0].item()
    x, y = bag.coords()[inside].round().int().tolist()
    assert np.array_equal(bag.chunk(0).elements[inside], pixels[y - 13 : y + 14, x - 13 : x + 14].transpose(2, 0, 1))


@pytest.mark.skipif(not (DATA / "mil_classic").is_dir(), reason="needs mil_classic under DISTSET_DATA")
def test_classic_bags_come_with_their_folds(tmp_path):
    path = DATA / "mil_classic" / "elephant.npz"
    store = ingest(readers.classic(path), tmp_path)
    with np.load(path) as archive:
        x, ptr, y, masks = archive["X"], archive["ptr"], archive["y"], archive["folds_train"]
    bag = store.open("bag-0007")
    assert np.array_equal(bag.chunk(0).elements, x[ptr[7] : ptr[8]][bag.rows()])
    assert store.labels(store.ids).tolist() == y.tolist()
    folds = store.folds()
    assert len(folds) == 50
    names = np.array(store.ids)
    for split, mask in zip(folds, masks.reshape(50, -1).astype(bool)):
        assert sorted(split.test) == sorted(names[~mask])
        assert sorted(split.train + split.val) == sorted(names[mask])
        assert len(split.val) == pytest.approx(0.15 * mask.sum(), abs=2)


READERS = {
    "h5": (readers.clam, "a.h5"),
    "stamp": (readers.stamp, "a.h5"),
    "pt": (readers.pt_files, "a.pt"),
    "npy": (readers.arrays, "a.npy"),
    "npz": (readers.arrays, "a.npz"),
    "csv": (readers.csv_bags, "a.csv"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("content", [b"", b"this is no such file\x00\xff" * 50], ids=["empty", "foreign"])
def test_foreign_files_are_named(tmp_path, kind, content):
    reader, name = READERS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}"):
        ingest(reader(tmp_path), tmp_path / "store")


@pytest.mark.parametrize("kind", ["h5", "pt", "npy", "npz"])
def test_truncated_files_are_named(tmp_path, kind):
    reader, name = READERS[kind]
    x = RNG.standard_normal((500, 6)).astype(np.float32)
    file = tmp_path / name
    if kind == "h5":
        with h5py.File(file, "w") as handle:
            handle["features"], handle["coords"] = x, np.zeros((500, 2))
    elif kind == "pt":
        torch.save(torch.from_numpy(x), file)
    else:
        np.save(file, x) if kind == "npy" else np.savez(file, features=x)
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(ValueError, match=rf"{name}"):
        ingest(reader(tmp_path), tmp_path / "store")


def test_an_h5_of_another_tool_says_what_it_holds(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["embedding"] = X["a"]
    with pytest.raises(ValueError, match=r"a\.h5.*no dataset 'features', it holds embedding"):
        readers.clam(tmp_path).read("a")


def test_a_folder_without_files_and_two_files_of_one_id(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.h5"):
        readers.clam(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        readers.arrays(tmp_path / "nowhere")
    np.save(tmp_path / "a.npy", X["a"])
    np.savez(tmp_path / "a.npz", features=X["a"])
    with pytest.raises(ValueError, match="would both be the set 'a'"):
        readers.arrays(tmp_path)


def test_folders_behind_links_are_read_once(tmp_path):
    for folder in ("here/b", "there/a"):
        patch_folder(tmp_path / folder)
        np.save(tmp_path / folder / "x.npy", X["a"])
    (tmp_path / "here" / "site").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "here" / "b")
    (tmp_path / "there" / "up").symlink_to(tmp_path)
    assert readers.arrays(tmp_path / "here").ids == ["b/x", "site/a/x"]
    assert readers.patches(tmp_path / "here").ids == ["b", "site/a"]


def test_broken_and_uneven_patches_are_named(tmp_path):
    patch_folder(tmp_path / "broken" / "a")
    (tmp_path / "broken" / "a" / "0_0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a: holds bytes that are not an image"):
        ingest(readers.patches(tmp_path / "broken"), tmp_path / "store")
    patch_folder(tmp_path / "uneven" / "a")
    patch_folder(tmp_path / "uneven" / "b", size=(7, 7))
    with pytest.raises(ValueError, match="one store holds one kind of element"):
        ingest(readers.patches(tmp_path / "uneven"), tmp_path / "store2")
    with pytest.raises(ValueError, match="holds no folder with"):
        readers.patches(tmp_path / "uneven" / "a")


def test_colon_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"nuclei\.csv"):
        readers.colon(tmp_path)
    (tmp_path / "nuclei.csv").write_text("image,x,y,class\n1,5,5,epithelial\n")
    (tmp_path / "labels.csv").write_text("image,y\n1,1\n")
    with pytest.raises(ValueError, match=r"1 images are missing.*img1\.png"):
        readers.colon(tmp_path)
    with pytest.raises(ValueError, match="wanted an odd number"):
        readers.colon(tmp_path, patch_size=26)


def test_classic_says_what_is_missing(tmp_path):
    np.savez(tmp_path / "m.npz", X=np.zeros((4, 2)), y=np.zeros(2))
    with pytest.raises(ValueError, match=r"m\.npz.*lacks ptr"):
        readers.classic(tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", X=np.zeros((4, 2)), y=np.zeros(2), ptr=[0, 2, 3])
    with pytest.raises(ValueError, match="ptr has 3 borders for 2 bags and 4 elements"):
        readers.classic(tmp_path / "m.npz")
