"""Serve a trained set encoder: ``python -m jobs.serve run=runs/digits folder=states``.

Runs of bags, documents, clustering and completion. Clients push chunks of sets over HTTP, in any order, and ask for
predictions at any time (docs/streaming.md). It listens on loopback unless ``host`` says otherwise, and goes on until it is
interrupted; states outlive it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from distset.build import build
from distset.runs import RunFolder
from distset.served import load_served
from jobs._common import job


@job("serve")
def main(config: dict[str, Any]) -> None:
    from distset.cluster.serve import serve_sets
    from distset.cluster.train import start_ray

    run = RunFolder(config["run"])
    load_served(run)  # says what is wrong with it before anything starts
    start_ray(build(config["cluster"], "cluster"))
    address = serve_sets(
        str(run.path.resolve()),
        str(Path(config["folder"]).resolve()),
        idle_seconds=config["idle_seconds"],
        replicas=config["replicas"],
        cpus=config["cpus"],
        host=config["host"],
        port=config["port"],
    )
    print(f"serving {run.path} at {address}: POST /sets/ID/chunks/NUMBER, GET /sets/ID; Ctrl-C ends it", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
