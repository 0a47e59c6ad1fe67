"""Splits: whole patients, classes in proportion, made once, never leaking."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distset.data import Split, check_split, make_splits
from distset.data.split_tables import read_split_tables
from distset.data.splits import load_splits, save_splits


def cohort(cases=60, seed=0, sets_a_case=4):
    generator = np.random.default_rng(seed)
    labels, owners = {}, {}
    for case in range(cases):
        for number in range(generator.integers(1, sets_a_case + 1)):
            labels[f"s{case}-{number}"] = "abc"[case % 3]
            owners[f"s{case}-{number}"] = f"p{case}"
    return labels, owners


def parts_of(split):
    return [set(part) for part in split]


@settings(max_examples=40, deadline=None)
@given(st.integers(12, 90), st.integers(0, 5), st.integers(1, 5), st.sampled_from([1, 3, 4]))
def test_every_set_is_dealt_once_and_cases_stay_together(cases, seed, sets_a_case, folds):
    labels, owners = cohort(cases, seed, sets_a_case)
    splits = make_splits(labels, owners, folds=folds, seed=seed)
    assert len(splits) == folds
    for split in splits:
        train, val, test = parts_of(split)
        assert train | val | test == set(labels)
        assert sum(map(len, split)) == len(labels)
        owned = [{owners[i] for i in part} for part in (train, val, test)]
        assert not owned[0] & owned[1]
        assert not owned[0] & owned[2]
        assert not owned[1] & owned[2]
        assert all({labels[i] for i in part} == set("abc") for part in split)
    if folds > 1:
        tested = Counter(i for split in splits for i in split.test)
        assert set(tested) == set(labels)
        assert set(tested.values()) == {1}


def test_classes_keep_their_proportions():
    labels = {f"s{i}": "rare" if i % 10 == 0 else "common" for i in range(400)}
    split = make_splits(labels, val=0.15, test=0.25)[0]
    for part, share in zip(split, (0.6375, 0.1125, 0.25)):
        counts = Counter(labels[i] for i in part)
        assert counts["rare"] == pytest.approx(40 * share, abs=1)
        assert counts["common"] == pytest.approx(360 * share, abs=1)


def test_the_same_seed_gives_the_same_splits():
    labels, owners = cohort()
    assert make_splits(labels, owners, folds=3, seed=1) == make_splits(labels, owners, folds=3, seed=1)
    assert make_splits(labels, owners, folds=3, seed=1) != make_splits(labels, owners, folds=3, seed=2)


def test_splits_are_read_as_they_were_written(tmp_path):
    labels, owners = cohort()
    splits = make_splits(labels, owners, folds=4)
    save_splits(tmp_path / "s.csv", splits, owners)
    assert load_splits(tmp_path / "s.csv") == splits
    (tmp_path / "s.csv").write_text("fold,split,set_id\n0,trian,s0\n")
    with pytest.raises(ValueError, match=r"s\.csv: got the line .*trian"):
        load_splits(tmp_path / "s.csv")


CASES = {"a": "p", "b": "p", "c": "q", "d": "r"}


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (Split(["a", "c"], ["d"], ["c"]), "the set 'c' is in train and in test"),
        (Split(["a", "a"], ["c"], ["d"]), "the set 'a' is in train and in train"),
        (Split(["a"], ["c"], ["b"]), r"case 'p' is in train \(set 'a'\) and in test \(set 'b'\)"),
        (Split(["a", "x"], ["c"], ["d"]), "train names the set 'x', which the store does not hold"),
        (Split([], ["c"], ["d"]), "has no training sets"),
    ],
)
def test_leaks_are_refused(split, said):
    with pytest.raises(ValueError, match=said):
        check_split(split, CASES)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folds": -1}, "wanted at least 1 fold"),
        ({"val": 0.0}, "shares between 0 and 1"),
        ({"test": 1.5}, "shares between 0 and 1"),
        ({"folds": 30}, r"too few cases of some classes .* wanted at least 30 of each"),
    ],
)
def test_splits_that_cannot_be_made(given, said):
    with pytest.raises(ValueError, match=said):
        make_splits(*cohort(), **given)


IDS = ["s1", "s2", "s3", "dir/s4"]
EXPECTED = Split(["s1", "s3"], ["s2"], ["dir/s4"])


@pytest.mark.parametrize(
    "text",
    [
        ",train,val,test\n0,s1,s2,dir/s4\n1,s3,,\n",
        ",train,val,test\n0,s1.svs,s2.svs,dir/s4.svs\n1,s3.svs,nan,\n",
        ",train,val,test\ns1,True,False,False\ns3,True,False,False\ns2,False,True,False\ndir/s4,False,False,True\n",
        "slide_id,label,split\ns1,0,train\ns3,0,Train\ns2,1,valid\ndir/s4,1,test\n",
    ],
    ids=["lists", "lists with endings", "flags", "column"],
)
def test_split_tables_as_users_have_them(tmp_path, text):
    (tmp_path / "splits_0.csv").write_text(text)
    assert read_split_tables([tmp_path / "splits_0.csv"], IDS) == [EXPECTED]


def test_sets_named_0_and_1_are_no_flags(tmp_path):
    (tmp_path / "t.csv").write_text(",train,val,test\n0,1,0,3\n1,2,,\n")
    assert read_split_tables([tmp_path / "t.csv"], list("0123")) == [Split(["1", "2"], ["0"], ["3"])]


def test_a_folder_of_split_tables_is_taken_in_order(tmp_path):
    for number in (10, 2):
        train = IDS[number % 3]
        rest = [i for i in IDS if i != train]
        (tmp_path / f"splits_{number}.csv").write_text(f",train,val,test\n0,{train},{rest[0]},{rest[1]}\n")
    (tmp_path / "splits_2_bool.csv").write_text("not read")
    found = read_split_tables([tmp_path], IDS)
    assert [split.train for split in found] == [["s3"], ["s2"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (",train,val,test\n0,s1,s2,s9\n", "test names 's9', which the source does not hold"),
        (",train,test\n0,s1,s2\n", "has no column val"),
        (",train,val,test\n0,s1,,s2\n", "no sets for val"),
        ("slide_id,split\ns1,somewhere\n", "got 'somewhere' in the column split"),
    ],
)
def test_split_tables_that_are_wrong(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_split_tables([tmp_path / "t.csv"], IDS)
