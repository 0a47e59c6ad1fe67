"""Sources of one file a bag."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distset.data.bag import Bag, NothingToStore
from distset.data.splits import Split
from distset.files import DiskFull

__all__ = ["FileSource", "bag_files", "files_below", "naming"]


class FileSource:
    """A `Source` of one file (or folder) a bag.

    Args:
        files: ``{set_id: file}``.
        read_file: makes a bag of (set_id, file); what it raises about a broken file is raised again with the file's name.
    """

    def __init__(self, files: dict[str, Path], read_file: Callable[[str, Path], Bag]) -> None:
        self.files, self._read_file = files, read_file
        self.splits: list[Split] = []

    @property
    def ids(self) -> list[str]:
        return list(self.files)

    def read(self, set_id: str) -> Bag:
        file = self.files[set_id]
        with naming(file):
            return self._read_file(set_id, file)


def bag_files(path: str | Path, endings: Sequence[str], inner: str | None = None) -> dict[str, Path]:
    """The files under a folder by set id: the path below the folder without its ending, in the order of their names;
    or one file, by its own name.

    Args:
        path: the folder, or the file.
        endings: of the files to take, ``(".h5",)``.
        inner: a folder inside ``path`` that holds them where there is one (CLAM's ``h5_files``).

    Raises:
        ValueError: for a path that is no folder, no files, two files of one id.
    """
    folder = Path(path)
    if folder.suffix.lower() in endings and folder.is_file():
        return {folder.stem: folder}
    if not folder.is_dir():
        raise ValueError(f"path: {folder} is not a folder, wanted one that holds {', '.join(endings)} files")
    if inner is not None and (folder / inner).is_dir():
        folder = folder / inner
    found = sorted(file for file in files_below(folder) if file.suffix.lower() in endings and file.is_file())
    if not found:
        raise ValueError(f"path: {folder} holds no {', '.join(endings)} files; check the path")
    files: dict[str, Path] = {}
    for file in found:
        set_id = file.relative_to(folder).with_suffix("").as_posix()
        if set_id in files:
            raise ValueError(f"path: {files[set_id]} and {file} would both be the set {set_id!r}; keep one of them")
        files[set_id] = file
    return files


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, also behind links to other folders, which `Path.rglob` passes by; each folder once."""
    seen: set[str] = set()
    waiting = [folder]  # links come after the folders themselves, so that these keep their names
    for start in waiting:
        for here, folders, names in os.walk(start):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            waiting += [Path(here, name) for name in sorted(folders) if os.path.islink(os.path.join(here, name))]
            yield from (Path(here, name) for name in names)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Raise what is wrong with a file as a ValueError that names it."""
    try:
        yield
    except (ImportError, MemoryError, DiskFull):
        raise
    except NothingToStore as error:
        raise NothingToStore(f"{file}: {error}") from error
    except Exception as error:  # a foreign file makes its parser raise anything
        if str(file) in str(error):
            raise ValueError(str(error)) from error
        raise ValueError(f"{file}: does not read as a bag: {error}") from error
