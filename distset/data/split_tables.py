"""The user's own splits: tables with the columns train, val, test, or one column that says which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from distset.data.labels import bare_name, read_table
from distset.data.splits import PARTS, Split

__all__ = ["read_split_tables"]

TRUE, FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no", ""}


def read_split_tables(files: Sequence[str | Path], ids: Sequence[str]) -> list[Split]:
    """One fold a table, in any of three forms.

    - Columns ``train``, ``val``, ``test`` that list ids, empty where one is shorter (CLAM's ``splits_0.csv``).
    - The same columns with True and False, ids in the first column (CLAM's ``splits_0_bool.csv``).
    - A column ``split`` (or ``fold_split``, ``set``) that says train, val or test, ids in the first column.

    Args:
        files: tables; a folder stands for its ``splits_0.csv``, ``splits_1.csv``, ...
        ids: of the store's sets; a table may name them with their file's ending.

    Raises:
        ValueError: for a missing file or column, an id that the store does not hold, a part without sets.
    """
    names = {**{bare_name(set_id): set_id for set_id in ids}, **{set_id: set_id for set_id in ids}}
    return [_read(file, names) for path in files for file in _tables(Path(path))]


def _tables(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [file for file in path.iterdir() if re.fullmatch(r"splits_\d+\.csv", file.name)]
    if not found:
        raise ValueError(f"{path}: holds no splits_0.csv, splits_1.csv, ...; name the split tables one by one")
    return sorted(found, key=lambda file: int(re.findall(r"\d+", file.name)[0]))


def _read(path: Path, names: dict[str, str]) -> Split:
    rows = [row for _, row in read_table(path)]
    columns = list(rows[0]) if rows else []
    said = next((name for name in ("split", "fold_split", "set") if name in columns), None)
    flags = all(row.get(part, "").lower() in TRUE | FALSE for row in rows for part in PARTS)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for row in rows:
        for part, name in _entries(path, row, columns, said, flags):
            if name not in names and bare_name(name) not in names:
                raise ValueError(f"{path}: {part} names {name!r}, which the source does not hold; check the ids")
            parts[part].append(names[name if name in names else bare_name(name)])
    if empty := [part for part in PARTS if not parts[part]]:
        raise ValueError(f"{path}: no sets for {', '.join(empty)}; wanted sets to train on, to choose on and to test on")
    return Split(**parts)


def _entries(path: Path, row: dict[str, str], columns: list[str], said: str | None, flags: bool) -> list[tuple[str, str]]:
    """(part, id) pairs of one line; ``flags`` says that the columns of the parts hold True and False."""
    if said is not None:
        part = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}.get(
            row[said].lower(), row[said].lower()
        )
        if part not in (*PARTS, ""):
            raise ValueError(f"{path}: got {row[said]!r} in the column {said}, wanted one of {', '.join(PARTS)}")
        return [(part, row[columns[0]])] if part else []
    if missing := [part for part in PARTS if part not in columns]:
        raise ValueError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(columns)}")
    if flags and columns[0] not in PARTS:
        return [(part, row[columns[0]]) for part in PARTS if row[part].lower() in TRUE]
    return [(part, row[part]) for part in PARTS if row[part] and row[part].lower() != "nan"]
