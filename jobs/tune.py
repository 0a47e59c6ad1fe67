"""Search over settings: ``python -m jobs.tune [search=CHOICE] [GROUP=CHOICE ...] [KEY=VALUE ...]``.

Takes all that ``jobs.train`` takes; ``folds`` and ``seeds`` are trained for every setting. The search folder (``run.dir``)
explains itself, and the same command goes on where a killed search stopped. Settings are chosen on the validation sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distset.search.run import run_search
from jobs._common import ensure_store, job


@job("tune")
def main(config: dict[str, Any]) -> None:
    ensure_store(config["data"])
    print(run_search(config, Path(config["run"]["dir"]).resolve()))


if __name__ == "__main__":
    main()
