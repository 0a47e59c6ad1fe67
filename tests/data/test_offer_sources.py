"""Images, compounds and faces as offers: what is read, what is refused."""

from __future__ import annotations

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from distset.data.affinities import affinity_offers, letter_groups, read_affinities, read_davis
from distset.data.celeba import celeba_offers
from distset.data.idx_images import read_idx, read_idx_folder
from distset.data.synthetic_offers import gaussian_offers
from distset.problems.offers import _parts, cells, compounds


def write_idx(path, array: np.ndarray) -> None:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(head + array.tobytes())


def test_idx_files(tmp_path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([1, 0], np.uint8))
    found = read_idx_folder(tmp_path, "train")
    assert torch.equal(found.images, torch.from_numpy(images))
    assert found.labels.tolist() == [1, 0]
    assert found.pixels().shape == (2, 12)
    assert found.pixels().max() == pytest.approx(23 / 255)
    with pytest.raises(ValueError, match=r"has no t10k-images-idx3-ubyte\.gz"):
        read_idx_folder(tmp_path, "test")
    with pytest.raises(ValueError, match="part: got 'val'"):
        read_idx_folder(tmp_path, "val")
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="has 2 train images and 3 labels"):
        read_idx_folder(tmp_path, "train")


def test_broken_idx_files(tmp_path):
    (tmp_path / "a").write_bytes(b"no idx at all")
    with pytest.raises(ValueError, match="is no idx file"):
        read_idx(tmp_path / "a")
    (tmp_path / "b").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 10) + b"123")
    with pytest.raises(ValueError, match=r"holds 3 bytes for shape \(10,\); it is not whole"):
        read_idx(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.gz", gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3]))[:-9], "cut.gz cannot be unpacked"),
        ("raw.gz", bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3]), "raw.gz cannot be unpacked .*Not a gzipped file"),
        ("short", bytes([0, 0, 8, 3, 0, 0]), "short ends in its header of 16 bytes"),
        ("huge", bytes([0, 0, 8, 3]) + 12 * b"\xff", "huge holds 0 bytes for shape"),
    ],
)
def test_idx_files_that_are_not_whole(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        read_idx(tmp_path / name)


def test_the_strongest_pairs_are_chosen(tmp_path):
    rows = ["drug,target,affinity", *(f"C{'N' * d},M{'K' * t},{d + 10 * t}" for d in range(6) for t in range(6)), "CN,MK,13"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    found = read_affinities(tmp_path / "table.csv")
    assert len(found.pairs) == 36
    offers = affinity_offers(found, torch.arange(36), sets=3, size=12, chosen=4, width=16)
    assert offers.elements.shape == (3, 12, 32)
    assert (offers.chosen.sum(-1) == 4).all()
    targets = torch.stack([letter_groups(text, 3, 16) for text in found.targets])
    length = torch.cdist(offers.elements[..., 16:], targets).argmin(-1).float()  # the longest bind best
    weakest = length.where(offers.chosen, torch.tensor(torch.inf)).amin(-1)
    assert (weakest >= length.where(~offers.chosen, torch.tensor(-1.0)).amax(-1)).all()
    parts = compounds(str(tmp_path / "table.csv"), sets=(2, 1, 1), size=6, chosen=2, width=8)
    assert parts.facts == {"dim": 16}
    with pytest.raises(ValueError, match="size, chosen: got 40, 4 of 36 pairs"):
        affinity_offers(found, torch.arange(36), sets=1, size=40, chosen=4)


@pytest.mark.parametrize(("table", "said"), [
    ("drug,target\nC,M", "has no column affinity"),
    ("drug,target,affinity\nC,M,strong", "line 2 of .* has affinity 'strong'"),
    ("drug,target,affinity\nC,M,nan", "line 2 of .* has affinity 'nan'"),
])  # fmt: skip
def test_bad_tables_of_affinities(tmp_path, table, said):
    (tmp_path / "table.csv").write_text(table)
    with pytest.raises(ValueError, match=said):
        read_affinities(tmp_path / "table.csv")


def test_a_pickle_of_affinities_is_no_table(tmp_path):
    (tmp_path / "table.pkl").write_bytes(pickle.dumps({"drug": ["C"], "target": ["M"], "affinity": [1.0]}))
    with pytest.raises(ValueError, match=r"path: .*table.pkl is no table in text .*wanted CSV .*to_csv"):
        read_affinities(tmp_path / "table.pkl")


def test_davis(data_folder):
    if not (data_folder / "davis").is_dir():
        pytest.skip(f"no folder {data_folder / 'davis'}")
    found = read_davis(data_folder / "davis")
    assert len(found.drugs) == 68
    assert len(found.targets) == 442
    assert len(found.strength) == 30_056
    assert int((found.strength == 5).sum()) == 20_931  # Kd = 10,000 nM: no binding seen
    assert int((found.strength > 7).sum()) == 2_457


def test_letter_groups_have_unit_norm_and_do_not_depend_on_the_process():
    found = letter_groups("CCN", 2, 8)
    assert found.norm() == pytest.approx(1)
    assert torch.equal(found, letter_groups("CCN", 2, 8))
    counts = (found / found[found > 0].min()).round()
    assert counts.sum() == 5  # C, C, N, CC, CN


def test_cells_are_met_in_one_part_only(tmp_path):
    x = np.arange(200, dtype=np.float32)[:, None].repeat(3, 1)
    np.savez(tmp_path / "cells.npz", X_pca=x, label=np.arange(200) % 3)
    parts = cells(str(tmp_path / "cells.npz"), sets=20, size=8, chosen=(1, 2))
    met = [set() for _ in range(3)]
    for own, part in zip(met, parts[:3]):
        for example in part:
            own.update(example.set.elements.flatten().tolist())
    assert not met[0] & met[1] and not met[0] & met[2] and not met[1] & met[2]  # noqa: PT018
    with pytest.raises(ValueError, match=r"has no array \['other'\], it has X_pca, label"):
        cells(str(tmp_path / "cells.npz"), elements="other")


def test_classes_of_cells_may_be_names(tmp_path):
    x, kinds = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32), np.arange(100) % 3
    found = []
    for labels in (kinds, np.array(["B cell", "NK", "T cell"])[kinds]):
        np.savez(tmp_path / "cells.npz", X_pca=x, label=labels)
        found.append(cells(str(tmp_path / "cells.npz"), sets=4, size=6, chosen=(1, 2)).train)
    assert all(torch.equal(a.set.elements, b.set.elements) and torch.equal(a.target, b.target) for a, b in zip(*found))


@pytest.mark.parametrize(("arrays", "said"), [
    ({"label": np.array(["a", None] * 20, dtype=object)}, r"cannot be read .*wanted an npz .*numpy\.savez\(target, X_pca="),
    ({"X_pca": np.full((40, 3), np.nan)}, "has 40 of 40 rows of X_pca that are NaN"),
    ({"X_pca": np.where(np.eye(40, 3), np.inf, 0.0)}, "has 3 of 40 rows of X_pca that are NaN or infinite"),
    ({"label": np.zeros(39)}, r"has X_pca float64 \(40, 3\) and label \(39,\), wanted numbers"),
    ({"X_pca": np.full((40, 3), "x")}, r"has X_pca <U1 \(40, 3\)"),
])  # fmt: skip
def test_bad_cells_are_named(tmp_path, arrays, said):
    np.savez(tmp_path / "cells.npz", **{"X_pca": np.zeros((40, 3)), "label": np.arange(40) % 2, **arrays})
    with pytest.raises(ValueError, match=f"path: .*cells.npz {said}"):
        cells(str(tmp_path / "cells.npz"))


def test_a_file_that_is_no_npz_is_named(tmp_path):
    (tmp_path / "cells.npz").write_bytes(pickle.dumps({"X_pca": [[0.0]]}))
    np.save(tmp_path / "cells.npy", np.zeros((4, 2)))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("cells.npz", "cells.npy", "cut.npz"):
        with pytest.raises(ValueError, match=f"path: .*{name} cannot be read .*wanted an npz of plain arrays"):
            cells(str(tmp_path / name))


def test_offers_are_checked_before_anything_is_fitted():
    offers = gaussian_offers(4, size=8, chosen=2)
    offers.elements[2, 3] = torch.nan
    with pytest.raises(
        ValueError, match=r"elements: 1 of 32 have features that are NaN.*of the validation offers from 0 on"
    ):
        _parts([gaussian_offers(4, size=8, chosen=2), offers, offers], {})


def test_faces_without_two_attributes_of_the_others(tmp_path):
    rng = np.random.default_rng(0)
    has = rng.integers(0, 2, (60, 4)) * 2 - 1
    (tmp_path / "img_align_celeba").mkdir()
    lines, parts = ["60", "A B C D"], []
    for i, row in enumerate(has):
        Image.fromarray(np.full((10, 8, 3), i, np.uint8)).save(tmp_path / "img_align_celeba" / f"{i}.png")
        lines.append(f"{i}.png " + " ".join(map(str, row)))
        parts.append(f"{i}.png {0 if i < 40 else 2}")
    with pytest.raises(ValueError, match=r"has no list_attr_celeba.txt, list_eval_partition.txt"):
        celeba_offers(tmp_path, "train", sets=1)
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(lines))
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(parts))
    offers = celeba_offers(tmp_path, "train", sets=5, side=4)
    assert offers.elements.shape == (5, 8, 48)
    faces = (offers.elements[..., 0] * 255).round().long()
    assert faces.max() < 40
    for row, chosen in zip(faces, offers.chosen, strict=True):
        shared = (has[row[~chosen]] == 1).all(0) & (has[row[chosen]] == -1).all(0)
        assert shared.sum() >= 2


def test_true_densities_reach_what_the_papers_ceiling_is():
    """.9102 +- .0034 and .9995 of 1,000 offers."""
    from distset.problems.offers import gaussian, moons

    assert gaussian(sets=1000).baselines["true_densities"] == pytest.approx(0.910, abs=0.011)  # three standard errors
    assert moons(sets=300).baselines["true_densities"] > 0.998
