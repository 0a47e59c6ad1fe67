"""Label tables as users have them."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distset.data import Labelled, label_table
from distset.data.labels import match_labels
from distset.data.slides import source as slides


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


SLIDES = {"007": Labelled("p1", "tumour"), "s2": Labelled("p1", "tumour"), "s3": Labelled("p2", None)}


@pytest.mark.parametrize("kind", ["csv", "tsv", "bom", "parquet", "xlsx"])
def test_one_line_a_slide(tmp_path, kind):
    text = "case_id,slide_id,label\np1,007,tumour\np1,s2, tumour \np2,s3,NA\n"
    path = tmp_path / ("t.csv" if kind == "bom" else f"t.{kind}")
    columns = {"case_id": ["p1", "p1", "p2"], "slide_id": list(SLIDES), "label": ["tumour", " tumour ", None]}
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    elif kind == "xlsx":
        pytest.importorskip("openpyxl")
        pd.DataFrame(columns).to_excel(path, index=False)
    else:
        write(path, {"tsv": text.replace(",", "\t"), "bom": "\ufeff" + text}.get(kind, text))
    assert label_table(path) == SLIDES


def test_a_clinical_and_a_slide_table(tmp_path):
    clini = write(tmp_path / "clini.csv", "PATIENT,isMSIH,AGE\np1,MSIH,50\np2,nonMSIH,60\np3,,70\n")
    slide = write(tmp_path / "slide.csv", "PATIENT,FILENAME\np1,a.h5\np1,b.h5\np2,c.h5\np3,d.h5\n")
    found = label_table(clini, label="isMSIH", case_id="PATIENT", set_id="FILENAME", slides=slide)
    assert found["b.h5"] == Labelled("p1", "MSIH")
    assert match_labels(found, ["a", "b", "c"]) == {
        "a": Labelled("p1", "MSIH"),
        "b": Labelled("p1", "MSIH"),
        "c": Labelled("p2", "nonMSIH"),
    }
    write(tmp_path / "slide.csv", "PATIENT,FILENAME\np9,a.h5\n")
    with pytest.raises(ValueError, match=r"slide\.csv, line 2: PATIENT 'p9' is not in .*clini\.csv"):
        label_table(clini, label="isMSIH", case_id="PATIENT", set_id="FILENAME", slides=slide)


def test_each_slide_its_own_case_without_a_case_column(tmp_path):
    path = write(tmp_path / "t.csv", "slide_id,label\na,x\nb,y\n")
    assert label_table(path, case_id=None) == {"a": Labelled("a", "x"), "b": Labelled("b", "y")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("case_id,slide_id,label\np,a,x\nq,a,y\n", r"line 3: slide_id 'a' was on line 2 before"),
        (
            "case_id,slide,label\np,a,x\n",
            "no column 'slide_id', its columns are case_id, slide, label; did you mean 'slide'",
        ),
        ("case_id,slide_id,label\np,,x\n", "line 2: slide_id is empty"),
        ("case_id,slide_id,label\n,a,x\n", "line 2: case_id is empty"),
        ("case_id,slide_id,label\n", "holds no lines"),
        ("case_id,slide_id,label\np,a,x,extra\n", "line 2: has more fields than the header"),
        ("case_id,slide_id,label,label\np,a,x,y\n", "has the column 'label' twice"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        label_table(write(tmp_path / "t.csv", text))


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        label_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00,\xff\n\xff")
    with pytest.raises(ValueError, match=r"t\.csv: is not a table of text"):
        label_table(tmp_path / "t.csv")
    for kind in ("parquet", "xlsx"):
        (tmp_path / f"t.{kind}").write_bytes(b"no table")
        with pytest.raises(ValueError, match=rf"t\.{kind}: is not a table"):
            label_table(tmp_path / f"t.{kind}")
    (tmp_path / "t.doc").write_text("x")
    with pytest.raises(ValueError, match=r"got a \.doc file"):
        label_table(tmp_path / "t.doc")


def test_a_table_may_name_sets_with_the_endings_of_all_their_files():
    for ending in (*slides.ENDINGS, ".pth", ".jpeg"):
        assert match_labels({f"a{ending}": Labelled("p", "x")}, ["a"]) == {"a": Labelled("p", "x")}


def test_sets_without_a_label():
    table = {"a": Labelled("p", "x"), "b": Labelled("q", None)}
    with pytest.raises(ValueError, match=r"2 of 3 sets have none \(b, c\)"):
        match_labels(table, ["a", "b", "c"])
    assert list(match_labels(table, ["a", "b", "c"], "drop")) == ["a"]
    assert match_labels(table, ["a", "b", "c"], "keep")["c"] == Labelled("c", None)
    with pytest.raises(
        ValueError, match=r"none of 1 sets has one; the sets are named like 'slides/a', the table's like 'a'"
    ):
        match_labels(table, ["slides/a"])
    with pytest.raises(ValueError, match="wanted error, keep or drop"):
        match_labels(table, ["a"], "skip")
