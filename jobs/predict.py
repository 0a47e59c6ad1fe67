"""Use a trained classifier: ``python -m jobs.predict run=RUN [data.path=STORE | bag=FILE] [elements=true] [KEY=VALUE ...]``.

Writes class probabilities of each set as CSV and Parquet. ``elements=true`` adds a folder a set: attention and contribution
of each element as Parquet, heat-maps, the elements that say most; ``explain.geojson=true`` also patches for QuPath.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from distset.bags.explain import ExplainPlan, explain_bag, folder_name, target_class
from distset.bags.predict import Work, store_of_file, with_progress
from distset.build import build
from distset.data import Store
from distset.data.slides.source import ENDINGS as SLIDE_ENDINGS
from distset.report import write_table
from jobs._common import job


@job("predict")
def main(config: dict[str, Any]) -> None:
    if config["bag"] is None:
        predict(config)
        return
    with tempfile.TemporaryDirectory() as scratch:
        bag = Path(config["bag"]).resolve()
        if bag.suffix.lower() in SLIDE_ENDINGS and bag.is_file():
            from distset.bags.slide_files import store_of_slide

            predict(config, store_of_slide(bag, config["run"], Path(scratch)))
        else:
            predict(config, store_of_file(bag, Path(scratch)))


def predict(config: dict[str, Any], store: Store | None = None) -> None:
    plan: ExplainPlan = build(config["explain"], "explain")
    work = Work.of(config, "predict", store)
    if plan.target is not None:
        target_class(work.trained.task, plan.target, [])  # unknown ones end here, before any work is done
    p = work.probabilities()
    work.out.mkdir(parents=True, exist_ok=True)
    table = work.table(p)
    write_table(table, work.out / "predictions")
    if config["elements"]:
        explain(work, plan, p)
    print(table.head(10).to_string(index=False, float_format="{:.4f}".format))
    if len(table) > 10:
        print(f"... and {len(table) - 10:,} more")
    print(f"everything is in {work.out}")


def explain(work: Work, plan: ExplainPlan, p: np.ndarray) -> None:
    task = work.trained.task
    sweeps = len(getattr(task.model.encoder, "stages", [0])) + 1 + plan.alone
    for bag, row in zip(with_progress(work.store, work.ids, work.chunk_size, "explaining", sweeps), p):
        explain_bag(task, bag, work.out / "elements" / folder_name(bag.name), plan, row.tolist())


if __name__ == "__main__":
    main()
