"""Train on sets: ``python -m jobs.train [GROUP=CHOICE ...] [KEY=VALUE ...]``.

The run folder (``run.dir``) explains itself; the same command goes on where a killed run stopped, and says so when it is
finished. ``folds=all`` and ``seeds=[0,1,2]`` train one run a fold and seed, and summarise them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distset.runs import RunFolder
from distset.training import describe, members, summarise, train_run
from jobs._common import ensure_store, job


@job("train")
def main(config: dict[str, Any]) -> None:
    folder = Path(config["run"]["dir"]).resolve()
    ensure_store(config["data"])
    finished: dict[str, dict[str, Any]] = {}
    for name, own in (found := list(members(config))):
        if name:
            print(f"{name} ({len(finished) + 1} of {len(found)})")
        finished[name] = train(own, folder / name)
    if len(found) > 1:
        print(summarise(folder, finished))


def train(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run, with its figures and where they are in words."""
    if (folder / "config.yaml").is_file() and RunFolder(folder).metrics is not None:
        print("this run is finished; for another one choose another run.dir")
    metrics = train_run(config, folder)
    print(f"{describe(config, metrics)}\neverything is in {folder} (see README.md there)")
    return metrics


if __name__ == "__main__":
    main()
