"""Bad input is a clear error before work is lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from distset.data import Bag, Labelled, Split, SplitPlan, Store, StoreWriter, gaussian_bags, ingest, write_store

ONES = np.ones((4, 3), np.float32)


class Bags:
    """A source of given bags."""

    def __init__(self, *bags, splits=()):
        self.bags, self.splits, self.read_ids = {bag.set_id: bag for bag in bags}, list(splits), []
        self.ids = [bag.set_id for bag in bags]

    def read(self, set_id):
        self.read_ids.append(set_id)
        return self.bags[set_id]


class Many:
    """More images than a store can number."""

    def __len__(self):
        return 2**31


def with_value(value, dtype=np.float32):
    x = np.ones((4, 3), dtype)
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    ("bag", "said"),
    [
        (Bag("b", np.ones((0, 3), np.float32)), "set 'b' is empty"),
        (Bag("b", np.ones((4, 0), np.float32)), "set 'b' is empty"),
        (Bag("a", ONES), "set_id: 'a' comes twice"),
        (Bag("", ONES), "set_id: got an empty one"),
        (Bag("b", np.ones((4, 2), np.float32)), r"set 'b': elements are float32 of shape \(2,\), those of the sets before"),
        (Bag("b", np.ones((4, 3), np.float16)), "set 'b': elements are float16"),
        (Bag("b", np.ones(4, np.float32)), r"shape \(4,\), wanted \(N, D\) or \(N, C, H, W\)"),
        (Bag("b", np.ones((4, 3), np.int64)), "elements are int64, wanted one of uint8, float16"),
        (Bag("b", with_value(np.nan)), "set 'b': row 2 is not finite"),
        (Bag("b", with_value(-np.inf)), "set 'b': row 2 is not finite"),
        (Bag("b", torch.from_numpy(with_value(np.nan))), "set 'b': row 2 is not finite"),
        (Bag("b", ONES, np.zeros((3, 2))), r"coords have shape \(3, 2\), wanted finite numbers \(4, 2\)"),
        (Bag("b", ONES, np.full((4, 2), np.nan)), "wanted finite numbers"),
        (Bag("b", ONES, None, np.zeros(3)), r"instance_labels have shape \(3,\), wanted \(4,\)"),
        (Bag("b", ONES, None, np.array([0, 1, np.nan, 0])), "instance_labels hold nan at row 2, wanted whole numbers"),
        (Bag("b", ONES, None, np.array([0, 0.5, 1, 0])), "instance_labels hold 0.5 at row 1, wanted whole numbers"),
        (Bag("b", ONES, None, np.array([2**32, 1, 0, 0])), "instance_labels hold 4294967296 at row 0"),
        (Bag("b", ONES, None, np.array(list("abca"))), "instance_labels hold a at row 0"),
        (Bag("b", ONES, label=1), "set 'b': label is 1, wanted text or None"),
        (Bag("b", ONES, case_id=7), "set 'b': case_id is 7, wanted text or None"),
        (Bag(5, ONES), "set_id: got 5, wanted text"),
        (Bag("b", Many()), "has 2,147,483,648 elements, wanted at most 2,147,483,647"),
    ],
)
def test_a_bad_bag_is_named(tmp_path, bag, said):
    with StoreWriter(tmp_path) as writer:
        writer.add(Bag("a", ONES))
        with pytest.raises(ValueError, match=said):
            writer.add(bag)


def test_values_too_large_for_the_stored_type(tmp_path):
    with StoreWriter(tmp_path, dtype="float16") as writer, pytest.raises(ValueError, match="row 2 is too large for float16"):
        writer.add(Bag("a", with_value(1e6)))


def test_types_that_would_cut_values(tmp_path):
    with StoreWriter(tmp_path / "a", dtype="uint8") as writer, pytest.raises(ValueError, match="would cut"):
        writer.add(Bag("a", ONES))
    with pytest.raises(ValueError, match="dtype: got 'int4', wanted one of"):
        StoreWriter(tmp_path / "b", dtype="int4")


def test_a_store_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="wanted at least one set"):
        write_store(tmp_path, [])
    with pytest.raises(ValueError, match="holds no sets"):
        ingest(Bags(), tmp_path / "s")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"labels": {"a": Labelled("p", "x")}}, r"labels: 2 of 3 sets have none \(b, c\)"),
        ({"labels": {i: Labelled(i, "x") for i in "abc"}}, "all sets are 'x', wanted at least two classes"),
        (
            {"labels": {i: Labelled(i, "xyz"["abc".index(i)]) for i in "abc"}, "classes": ["x", "y"]},
            "classes: labels hold z, wanted only x, y",
        ),
        (
            {"labels": {i: Labelled("p", "xyx"["abc".index(i)]) for i in "abc"}, "splits": SplitPlan(folds=1)},
            "too few cases",
        ),
    ],
)
def test_bad_labels_are_said_before_a_bag_is_read(tmp_path, given, said):
    source = Bags(*(Bag(i, ONES) for i in "abc"))
    with pytest.raises(ValueError, match=said):
        ingest(source, tmp_path, **given)
    assert source.read_ids == []


def test_a_leak_in_the_users_splits_is_said_before_a_bag_is_read(tmp_path):
    (tmp_path / "t.csv").write_text("slide_id,split\na,train\nb,val\nc,test\n")
    source = Bags(*(Bag(i, ONES) for i in "abc"))
    labels = {"a": Labelled("p", "x"), "b": Labelled("q", "y"), "c": Labelled("p", "x")}
    with pytest.raises(ValueError, match=r"case 'p' is in train \(set 'a'\) and in test \(set 'c'\)"):
        ingest(source, tmp_path / "s", labels=labels, splits=SplitPlan(files=[tmp_path / "t.csv"]))
    assert source.read_ids == []


def test_a_leak_in_shipped_splits_is_refused(tmp_path):
    bags = [Bag(i, ONES, label=i, case_id="p") for i in "abc"]
    with pytest.raises(ValueError, match="case 'p' is in train"):
        ingest(Bags(*bags, splits=[Split(["a"], ["b"], ["c"])]), tmp_path)
    assert not (tmp_path / "store.json").exists()


def test_ids_that_come_twice(tmp_path):
    with pytest.raises(ValueError, match="1 set ids come twice, the first is 'a'"):
        ingest(Bags(Bag("a", ONES), Bag("a", ONES)), tmp_path)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "s", gaussian_bags(num_sets=4, size=300, dim=8))


def test_chunk_size_0_and_unknown_sets(store):
    with pytest.raises(ValueError, match="chunk_size: got 0, wanted at least 1"):
        store.open("set-0", 0)
    with pytest.raises(ValueError, match=r"'set-9' is not in .*, which holds 4 sets"):
        store.open("set-9")


def test_a_damaged_byte_is_found(store):
    record = store.record("set-2")
    with open(store.path / record.file, "r+b") as file:
        file.seek(record.offsets[0] + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    whole = []
    with pytest.raises(ValueError, match="set 'set-2': its checksum differs"):
        whole += Store(store.path).verify()
    checked = Store(store.path).verify()
    assert [next(checked), next(checked)] == ["set-0", "set-1"]


def test_a_shard_cut_short_or_missing_is_named(store):
    file = store.path / store.record("set-0").file
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"part-00000\.parquet: has .* bytes instead of"):
        Store(store.path)
    file.unlink()
    with pytest.raises(ValueError, match=r"part-00000\.parquet: is missing"):
        Store(store.path)


def test_folders_that_are_no_store(tmp_path, store):
    with pytest.raises(ValueError, match=r"holds no finished store .* run jobs.ingest first"):
        Store(tmp_path / "nowhere")
    info = store.path / "store.json"
    text = info.read_text()
    info.write_text(text[:50])
    with pytest.raises(ValueError, match="not the description of a store"):
        Store(store.path)
    info.write_text(json.dumps({**json.loads(text), "version": 99}))
    with pytest.raises(ValueError, match="layout version 99"):
        Store(store.path)
    info.write_text(json.dumps({**json.loads(text), "num_sets": 99}))
    with pytest.raises(ValueError, match=r"holds 4 sets, store\.json says 99"):
        Store(store.path)
    (store.path / "sets.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"sets\.parquet: does not read"):
        Store(store.path)


def test_splits_that_are_not_there(store):
    with pytest.raises(ValueError, match="has no splits"):
        store.split()
    (store.path / "splits").mkdir()
    (store.path / "splits" / "mine.csv").write_text("fold,split,set_id\n0,train,set-0\n0,test,set-1\n")
    assert store.split("mine") == store.split() == Split(["set-0"], [], ["set-1"])
    with pytest.raises(ValueError, match="fold: got 1, wanted 0 to 0"):
        store.split(1)
    with pytest.raises(ValueError, match=r"got 'yours', .* has mine"):
        store.split("yours")
