"""Label tables as users have them: one line a slide (CLAM), or a clinical table and a slide table (STAMP)."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow.parquet as pq

from distset.data.schema import need

__all__ = ["Labelled", "bare_name", "label_table", "match_labels", "read_table"]

ENDINGS = {
    *(".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz", ".csv", ".png", ".jpg", ".jpeg"),
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu", ".dcm"),
}
MISSING = {"", "nan", "na", "n/a", "none", "null"}


class Labelled(NamedTuple):
    """What a table says of a set."""

    case_id: str
    label: str | None


def label_table(
    path: str | Path,
    *,
    label: str = "label",
    set_id: str = "slide_id",
    case_id: str | None = "case_id",
    slides: str | Path | None = None,
) -> dict[str, Labelled]:
    """Read labels from CSV, TSV, Parquet or Excel; every value is text, so that ``007`` stays ``007``.

    Args:
        path: the table with the column ``label``: one line a set; or one line a case, where ``slides`` is given.
        label, set_id, case_id: names of the columns. Without a column ``case_id`` (None) each set is a case of its own.
        slides: a second table of ``case_id`` and ``set_id``, one line a set: STAMP's slide table, beside its clinical one
            (``label_table("clini.csv", label="isMSIH", case_id="PATIENT", set_id="FILENAME", slides="slide.csv")``).

    Returns:
        ``{set_id: Labelled(case_id, label)}``; the label is None where the field is empty, NA, NaN or None.

    Raises:
        ValueError: for a missing file or column, a set or case on two lines, a slide of an unknown case.
    """
    if slides is None:
        wanted = [set_id, label] + ([case_id] if case_id else [])
        found = {}
        for line, row in _unique(Path(path), set_id, wanted):
            case = row[case_id] if case_id else row[set_id]
            if not case:
                raise ValueError(f"{path}, line {line}: {case_id} is empty; fill it in, or pass case_id=null")
            found[row[set_id]] = Labelled(case, _label(row[label]))
        return found
    if case_id is None:
        raise ValueError("case_id: got None with a slide table, wanted the column both tables share (STAMP: PATIENT)")
    cases = {row[case_id]: _label(row[label]) for _, row in _unique(Path(path), case_id, [case_id, label])}
    found = {}
    for line, row in _unique(Path(slides), set_id, [set_id, case_id]):
        if row[case_id] not in cases:
            raise ValueError(f"{slides}, line {line}: {case_id} {row[case_id]!r} is not in {path}; add it, or drop the line")
        found[row[set_id]] = Labelled(row[case_id], cases[row[case_id]])
    return found


def match_labels(table: Mapping[str, Labelled], ids: Sequence[str], missing: str = "error") -> dict[str, Labelled]:
    """The labels of ``ids``; a table may name a set with its file's ending (``slide-1.svs``).

    Args:
        missing: where a set has no label: "error", "keep" it without one, or "drop" it.

    Returns:
        ``{set_id: Labelled}`` for the sets to keep.

    Raises:
        ValueError: for another ``missing``, sets without a label ("error"), or no set with one.
    """
    if missing not in ("error", "keep", "drop"):
        raise ValueError(f"missing: got {missing!r}, wanted error, keep or drop")
    bare = {bare_name(name): name for name in table}
    keys = {set_id: set_id if set_id in table else bare.get(set_id) for set_id in ids}
    found = {set_id: table[key] for set_id, key in keys.items() if key is not None}
    unlabelled = [set_id for set_id in ids if set_id not in found or found[set_id].label is None]
    if len(unlabelled) == len(ids):
        raise ValueError(
            f"labels: none of {len(ids)} sets has one; the sets are named like {ids[0]!r}, the table's like "
            f"{next(iter(table), '')!r}; make them match"
        )
    if unlabelled and missing == "error":
        first = ", ".join(unlabelled[:5]) + (", ..." if len(unlabelled) > 5 else "")
        raise ValueError(
            f"labels: {len(unlabelled)} of {len(ids)} sets have none ({first}); complete the table, or pass "
            f"missing=drop or keep"
        )
    if missing == "drop":
        return {set_id: labelled for set_id, labelled in found.items() if labelled.label is not None}
    return {set_id: found.get(set_id, Labelled(set_id, None)) for set_id in ids}


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a table of text.

    Raises:
        ValueError: for a file that is missing, of an unknown kind, or not a table; for text with a column twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, wanted a table (.csv, .tsv, .parquet, .xlsx)")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv", ".txt"):
        yield from _text_table(path, "," if kind == ".csv" else "\t")
    elif kind in (".parquet", ".xlsx"):
        try:
            yield from enumerate(_frame(path, kind), start=2)
        except Exception as error:  # a foreign file makes its parser raise anything
            raise ValueError(f"{path}: is not a table ({error})") from error
    else:
        raise ValueError(f"{path}: got a {kind or 'nameless'} file, wanted a table (.csv, .tsv, .parquet, .xlsx)")


def _frame(path: Path, kind: str) -> list[dict[str, str]]:
    if kind == ".xlsx":
        rows = need("pandas").read_excel(path, dtype=str, keep_default_na=False, engine="openpyxl").to_dict("records")
    else:
        rows = pq.read_table(path).to_pylist()
    return [{name: "" if value is None else str(value).strip() for name, value in row.items()} for row in rows]


def _text_table(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, delimiter=delimiter, restval="")
            names = [name for name in reader.fieldnames or () if name]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{path}: has the column {twice!r} twice; rename or drop one")
            for row in reader:
                if None in row:
                    raise ValueError(f"{path}, line {reader.line_num}: has more fields than the header; quote its commas")
                yield reader.line_num, {name: value.strip() for name, value in row.items()}
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: is not a table of text ({error}); save it as CSV in UTF-8") from error


def _unique(path: Path, key: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows, with the columns there and the key on one line only."""
    seen: dict[str, int] = {}
    for line, row in read_table(path):
        for column in columns:
            if column not in row:
                near = difflib.get_close_matches(column, row, 1, 0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{path}: has no column {column!r}, its columns are {', '.join(row)}{hint}")
        if not row[key]:
            raise ValueError(f"{path}, line {line}: {key} is empty; fill it in, or drop the line")
        if row[key] in seen:
            raise ValueError(f"{path}, line {line}: {key} {row[key]!r} was on line {seen[row[key]]} before; keep one")
        seen[row[key]] = line
        yield line, row
    if not seen:
        raise ValueError(f"{path}: holds no lines, wanted one for each {key}")


def _label(text: str) -> str | None:
    return None if text.lower() in MISSING else text


def bare_name(name: str) -> str:
    """A set's name without the ending of its file."""
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("")) if path.suffix.lower() in ENDINGS else name
