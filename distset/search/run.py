"""A search from its plain configuration to its results: what ``jobs.tune`` calls."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distset.bags.runs import balance, check_run
from distset.files import write_atomically
from distset.problems.runs import check_problem
from distset.runs import MAY_CHANGE, check_same
from distset.search.plan import read_search
from distset.search.results import write_results
from distset.search.space import apply, draw
from distset.training import is_bags, members

__all__ = ["run_search"]


def run_search(config: Mapping[str, Any], folder: Path) -> str:
    """Search, or go on where a killed search stopped, or say what came out of a finished one.

    Args:
        config: the resolved configuration of ``jobs.tune``.
        folder: of the search.

    Returns:
        Lines to read: how many trials ended how, the best one, and what trains it again.

    Raises:
        ValueError: for everything that a check can find before training starts; where the folder holds another search;
            where no trial finished.
    """
    search, space, base = read_search(config)
    drawn = draw(space, search.trials, search.seed)
    with _alone(folder):
        _prepare(folder, config)
        _check(apply(base, drawn[0]))
        from distset.cluster.tune import search_on_ray

        search_on_ray(base, search, space, drawn, folder)
        return write_results(folder, search, space, base)


def _prepare(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``search.yaml``, or compare with what is there."""
    import yaml

    path = folder / "search.yaml"
    if path.is_file():
        then = yaml.safe_load(path.read_text())
        check_same(then, config, folder, may_change=[*MAY_CHANGE, "search.concurrency"], what="search")
    write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False))


def _check(config: dict[str, Any]) -> None:
    """What would make every trial fail is said once, before Ray starts."""
    _, first = next(members(config))
    if is_bags(first):
        check_run(balance(first))
    else:
        check_problem(first)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"run.dir: another process searches in {folder}; wait for it, or stop it") from error
        yield
