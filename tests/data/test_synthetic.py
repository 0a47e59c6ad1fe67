"""Sets made up on the spot are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distset.data import DigitBags, Source, gaussian_bags, ingest


def images_of(source, ids):
    return {image.tobytes() for set_id in ids for image in source.read(set_id).elements}


def test_digit_bags_say_whether_they_hold_the_digit():
    source = DigitBags(bags=(20, 10, 10), size=(20, 60), target=9)
    assert isinstance(source, Source)
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    number = {np.round(d * (255 / 16)).astype(np.uint8).tobytes(): t for d, t in zip(digits.images, digits.target)}
    labels = []
    for set_id in source.ids:
        bag = source.read(set_id)
        held = np.array([number[image.tobytes()] for image in bag.elements])
        assert 20 <= len(held) <= 60
        assert np.array_equal(bag.instance_labels, held == 9)
        assert bag.label == str(int((held == 9).any()))
        labels.append(bag.label)
    assert labels.count("1") == 20


def test_no_image_is_in_bags_of_two_parts():
    source = DigitBags()
    train, val, test = (images_of(source, part) for part in source.splits[0])
    assert not train & val
    assert not train & test
    assert not val & test


def test_a_digit_bag_does_not_depend_on_how_many_there_are():
    few, many = DigitBags(bags=(4, 2, 2)), DigitBags(bags=(40, 2, 2))
    assert np.array_equal(few.read("train-0003").elements, many.read("train-0003").elements)


def test_digit_bags_become_a_store_of_images(tmp_path):
    store = ingest(DigitBags(bags=(6, 4, 2)), tmp_path)
    assert (store.kind, store.element_shape, store.dtype, store.classes) == ("images", (1, 8, 8), torch.uint8, ["0", "1"])
    assert [len(part) for part in store.split()] == [6, 4, 2]
    bag = store.open("val-0001", 16)
    assert bag.instance_labels().any()
    assert bag.coords().shape == (len(bag), 2)
    assert next(bag.map(lambda c: c.elements.shape[1:])) == (1, 8, 8)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"target": 10}, "wanted a digit"),
        ({"bags": (1, 2, 2)}, "2 bags or more"),
        ({"size": (5, 4)}, "wanted 1 <= from <= to"),
    ],
)
def test_digit_bags_refuse_what_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        DigitBags(**wrong)


def test_gaussian_bags_are_shifted_where_they_say():
    bags = list(gaussian_bags(num_sets=4, size=(500, 900), dim=6, witnesses=0.2, dtype="float64"))
    for bag in bags:
        shifted = bag.instance_labels.astype(bool)
        assert 500 <= len(bag.elements) <= 900
        assert bag.label == str(int(shifted.any()))
        assert abs(bag.elements[~shifted].mean()) < 0.1
        if shifted.any():
            assert abs(bag.elements[shifted][:, :4].mean() - 2) < 0.2
