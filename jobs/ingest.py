"""Bring bags into a store: ``python -m jobs.ingest source=FORMAT source.path=FOLDER labels.path=TABLE store=STORE``.

A killed ingest goes on with the same command; a finished one says so. With other labels or splits and the same source, only
the index is written again. Slides are cut by ``cluster=local cluster.workers=N`` workers of Ray, or in this process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distset.build import build
from distset.cluster.config import Cluster
from distset.data import Store, ingest, ingest_parts
from distset.data.parts import in_process
from jobs._common import job


class Progress:
    """A bar with sets a second and time left (tqdm's own), and elements a second beside them."""

    def __init__(self, show: bool) -> None:
        self._show = show and sys.stderr.isatty()
        self._bar: Any = None
        self._elements = 0

    def __call__(self, done: int, total: int, elements: int) -> None:
        if self._bar is None:
            if done:
                print(f"{done} of {total} sets are there already", flush=True)
            self._bar = tqdm(total=total, initial=done, unit="set", disable=not self._show, dynamic_ncols=True)
            return
        self._elements += elements
        seconds = max(self._bar.format_dict["elapsed"], 1e-9) if self._show else 1.0
        self._bar.set_postfix_str(f"{self._elements / seconds:,.0f} elements/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@job("ingest")
def main(config: dict[str, Any]) -> None:
    store = stored(config)
    if config["verify"]:
        print(f"{sum(1 for _ in store.verify())} sets are whole")
    print(summary(store))


def stored(config: dict[str, Any]) -> Store:
    """The finished store of a resolved configuration: made, gone on with, or found."""
    progress = Progress(config["bar"])
    labels = config["labels"]
    try:
        return run(
            build(config["source"], "source"),
            config,
            labels=build(labels, "labels") if labels["path"] is not None else None,
            missing=config["missing"],
            classes=None if config["classes"] is None else [str(name) for name in config["classes"]],  # [0,1] is typed so
            splits=build(config["splits"], "splits"),
            seed=config["seed"],
            dtype=config["dtype"],
            told=told(config["source"]),
            progress=progress,
        )
    finally:
        progress.close()


def run(source: Any, config: dict[str, Any], **how: Any) -> Store:
    """Sets that are much work each are written to files of their own, by any number of workers; others one after another."""
    cluster: Cluster = build(config["cluster"], "cluster")
    if not getattr(source, "apart", False):
        if cluster.workers:
            raise ValueError(
                f"cluster.workers: got {cluster.workers}, but these sets are read as fast as they are written; use "
                f"cluster=none (workers are for slides)"
            )
        return ingest(source, Path(config["store"]), **how)
    runner = in_process
    if cluster.workers:
        from distset.cluster.ingestion import RayRunner

        runner = RayRunner(cluster)
    return ingest_parts(
        source, Path(config["store"]), runner=runner, on_error=config["on_error"], retry=config["retry"], **how
    )


def told(source: Any) -> Any:
    """The source's description without what does not change a byte: a start with other threads goes on."""
    if isinstance(source, dict):
        return {key: told(value) for key, value in source.items() if key not in ("threads", "device")}
    return source


def summary(store: Store) -> str:
    """What is in the store, and what to do with it."""
    labels = store.sets["label"].to_pylist()
    counts = ", ".join(f"{labels.count(name)} {name}" for name in store.classes) or "no labels"
    sizes = sorted(store.sets["n"].to_pylist())
    lines = [
        str(store),
        f"labels: {counts}",
        f"elements a set: {sizes[0]:,} to {sizes[-1]:,}, median {sizes[len(sizes) // 2]:,}",
    ]
    if (manifest := store.path / "manifest.csv").exists():
        lines.append(f"what became of each, and why: {manifest}")
    if store.splits:
        folds = store.folds()
        parts = ", ".join(f"{len(ids)} {part}" for part, ids in folds[0]._asdict().items())
        lines.append(f"splits: {len(folds)} ({parts}{' in the first' if len(folds) > 1 else ''})")
    lines.append(f"train on it: python -m jobs.train data=store data.path={store.path}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
