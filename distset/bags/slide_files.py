"""A slide for a trained classifier, cut as the slides that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distset.build import build
from distset.data import Store, write_store
from distset.data.slides import Features, SlidePlan, Slides
from distset.runs import RunFolder

__all__ = ["store_of_slide"]


def store_of_slide(path: Path, run: str | Path, scratch: Path) -> Store:
    """One slide as a store under ``scratch``: patches, or features, by the settings that the run's own store was made with.

    Raises:
        ValueError: for a run whose store is gone or does not come from slides, a slide that does not read or has no tissue.
    """
    told = _source_of(Path(run))
    cut = told.get("slides", told)
    plan = SlidePlan(**{name: cut[name] for name in SlidePlan._fields if name in cut})
    source: Any = Slides({path.stem: path}, plan)
    if "slides" in told:
        encoder = build(told["encoder"], "source.encoder")
        source = Features(source, encoder, batch=told["batch"], precision=told["precision"])
    return write_store(scratch / path.stem, [source.read(path.stem)])


def _source_of(run: Path) -> dict[str, Any]:
    """What the run's store was told it is made from."""
    advice = "bring the slide into a store with jobs.ingest and name it as data.path"
    if not run.is_dir():
        raise ValueError(
            f"bag: a slide is cut as those of the run were, and {run} is a checkpoint without its run; {advice}"
        )
    path = RunFolder(run).config["data"]["path"]
    try:
        told = Store(path).info.source
    except ValueError as error:
        raise ValueError(f"bag: a slide is cut as those of the run's store were ({error}); {advice}") from error
    if not str(told.get("_target_", "")).startswith("distset.data.slides."):
        raise ValueError(f"bag: the run was trained on {path}, which was not made from slides; {advice}")
    return told
