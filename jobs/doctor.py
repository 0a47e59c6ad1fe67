"""Look before hours are spent: ``python -m jobs.doctor`` with the overrides that ``jobs.train`` will get.

Checks software, data, labels, splits, settings, the run folder, disk, memory, and the cluster, in seconds; nothing is
trained or written. Prints what is ok, what to look at (warn) and what would end the run or spoil it (fail), with advice, and
exits 1 where something would. ``json=true`` prints a list of findings instead.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from distset.doctor.examine import examine
from distset.doctor.findings import table, worst
from jobs._common import absolute_paths, job


@job("doctor")
def main(config: dict[str, Any]) -> None:
    as_json, seconds = config.pop("json"), config.pop("checksum_seconds")
    absolute_paths(config["data"])
    findings = examine(config, seconds=seconds)
    print(json.dumps([finding._asdict() for finding in findings], indent=2) if as_json else table(findings))
    if worst(findings) == "fail":
        sys.exit(1)


if __name__ == "__main__":
    main()
