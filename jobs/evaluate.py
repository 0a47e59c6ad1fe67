"""Measure a trained classifier: ``python -m jobs.evaluate run=RUN [data.path=STORE] [data.part=test] [KEY=VALUE ...]``.

Writes ``metrics.json`` (scores with bootstrap 95 % intervals), predictions as CSV and Parquet, ROC and confusion matrix.
``instances=true`` adds how well heat-maps find labelled elements.
"""

from __future__ import annotations

from typing import Any

from distset.bags.evaluate import evaluate
from distset.bags.predict import Work
from jobs._common import job


@job("evaluate")
def main(config: dict[str, Any]) -> None:
    work = Work.of(config, "evaluate")
    metrics = evaluate(work, resamples=config["resamples"], instances=config["instances"])
    print(f"{metrics['sets']} sets of {metrics['store']}, 95 % intervals:")
    for name, interval in metrics["scores"].items():
        print(f"  {name:18} {interval}")
    if (found := metrics.get("instances")) is not None:
        print(f"AUROC of elements within a bag, mean over {found.bags} bags that hold both kinds:")
        for name in ("attention", "contribution", "alone"):
            print(f"  {name:18} {getattr(found, name)}")
    print(f"everything is in {work.out}")


if __name__ == "__main__":
    main()
