"""One small Ray for all tests that need it."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine starves the workers
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # ten times as often as by default
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        ignore_reinit_error=True,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},  # classes of tests travel by name
    )
    yield ray
    ray.shutdown()
