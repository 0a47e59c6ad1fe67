"""CUB-200-2011 and CelebA in the layout of their archives, as problems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_folders import write_celeba, write_cub

from distset.problems import completion, offers, retrieval
from distset.tasks.retrieval import retrieval_task


def number(image: torch.Tensor) -> int:
    """Which image of the made folder this is; all of it must have one value."""
    assert image.max() - image.min() < 3 / 255
    return round(image.mean().item() * 255 / 4)


# CUB-200-2011

SPECIES = [1, 1, 100, 101, 200, 7, 7, 100, 101, 200, 1, 50, 150, 150, 7, 50, 101, 3, 3, 3, 3, 3]


def test_birds_are_divided_by_species(tmp_path):
    write_cub(tmp_path, SPECIES)
    parts = retrieval.birds(str(tmp_path), side=8, tested=5)
    met = []
    for part in parts[:3]:
        pairs = [pair for example in part for pair in zip(example.set.whole().elements, example.target.tolist())]
        assert all(SPECIES[number(image)] == label for image, label in pairs)
        met.append([number(image) for image, _ in pairs])
    train, val, test = met
    known = [i for i, kind in enumerate(SPECIES) if kind <= 100]
    assert sorted(train + val) == known
    assert len(val) == len(known) // 10
    assert len(set(test)) == 5
    assert all(SPECIES[i] > 100 for i in test)
    assert [len(part) for part in parts[:3]] == [len(train), 1, 1]  # one image an example, or all of a part
    assert parts.facts == {"shape": (3, 8, 8)}
    task = retrieval_task(**parts.facts, dim=4, width=2)
    task.batch_loss(parts.train, seed=0).backward()
    assert task.predict(parts.test[0].set).shape == (5, 4)


def test_birds_are_a_pure_function_of_the_seed_and_files_may_be_in_any_order(tmp_path):
    write_cub(tmp_path, SPECIES)
    first, same = (retrieval.birds(str(tmp_path), side=4) for _ in range(2))
    other = retrieval.birds(str(tmp_path), side=4, seed=1)
    order, again, moved = ([int(e.target) for e in parts.train] for parts in (first, same, other))
    assert order == again
    assert order != moved
    labels = (tmp_path / "image_class_labels.txt").read_text().splitlines()
    (tmp_path / "image_class_labels.txt").write_text("\n".join(reversed(labels)))
    assert [int(e.target) for e in retrieval.birds(str(tmp_path), side=4).train] == order
    (tmp_path / "image_class_labels.txt").write_text("\n".join(labels[:3]))
    with pytest.raises(ValueError, match=r"image_class_labels.txt lacks image 4 of images.txt"):
        retrieval.birds(str(tmp_path), side=4)


def test_a_folder_without_birds_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"path: .* has no images.txt, image_class_labels.txt, wanted the unpacked archive"):
        retrieval.birds(str(tmp_path))


# CelebA


def test_faces_to_complete(tmp_path):
    write_celeba(tmp_path, [0] * 6 + [1] * 3 + [2] * 4 + [0] * 2)
    parts = completion.faces(str(tmp_path), images=(7, 2, 3), side=6, contexts=(5, 20), chunk_size=4)
    assert [number(example.set.whole().elements[:, 2:]) for example in parts.train] == [0, 1, 2, 3, 4, 5, 13]
    assert parts.train[0].set.whole().elements.shape == (36, 5)
    for part, faces in ((parts.val, [6, 7]), (parts.test, [9, 10, 11])):
        assert [example.target.context for example in part] == [5, 20]
        for example in part:
            assert [number(image) for image in example.target.values] == faces
            given = example.set.whole().elements
            assert given.shape == (len(faces), example.target.context, 5)
            assert [number(image[:, 2:]) for image in given] == faces
    assert parts.facts == {"shape": [6, 6, 3]}
    assert np.isfinite(parts.baselines["loss_of_mean_image"])


def test_faces_keep_their_places(tmp_path):
    from PIL import Image

    write_celeba(tmp_path, [0, 1, 2])
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    Image.fromarray(picture).resize((5, 5)).save(tmp_path / "img_align_celeba" / "000001.jpg", format="png")
    elements = completion.faces(str(tmp_path), images=(1, 1, 1), side=5, contexts=(3,)).train[0].set.whole().elements
    wanted = np.asarray(Image.fromarray(picture).resize((5, 5)), dtype=np.float32).reshape(25, 3) / 255
    torch.testing.assert_close(elements[:, 2:], torch.from_numpy(wanted))
    assert elements[1, :2].tolist() == [-1, -0.5]  # rows go first


def test_odd_faces_of_every_part(tmp_path):
    partition = [0] * 24 + [1] * 16 + [2] * 20
    has = write_celeba(tmp_path, partition)
    parts = offers.faces(str(tmp_path), sets=(6, 3, 4), size=5, chosen=(1, 2), side=4)
    assert parts.facts == {"dim": 48}
    for code, (part, count) in enumerate(zip(parts[:3], (6, 3, 4))):
        pairs = [(image, target) for e in part for image, target in zip(e.set.whole().elements.view(-1, 5, 48), _rows(e))]
        assert len(pairs) == count
        for images, odd in pairs:
            faces = np.array([number(image) for image in images])
            assert {partition[face] for face in faces} == {code}
            shared = (has[faces[~odd]] == 1).all(0) & (has[faces[odd]] == -1).all(0)
            assert shared.sum() >= 2


def _rows(example):
    """Which of each offer's faces are odd, bool ``(offers, size)``."""
    return example.target.reshape(-1, 5).bool().numpy()
