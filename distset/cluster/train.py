"""Training on Ray Train: the same process function on 1 to n workers, restarted where one dies.

Every worker calls ``process(watch=..., device=...)``; `distset.train.fit` inside finds the process group, takes its share
of each step and goes on from the last checkpoint. So a killed worker, a killed driver and a lost node are one case: start
again.
"""

from __future__ import annotations

import math
import os
import socket
import tempfile
import traceback
from typing import Any, Protocol

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from distset.cluster.config import Cluster
from distset.cluster.metrics import Metrics
from distset.cluster.progress import MailboxWatch, Postman, open_mailbox
from distset.cluster.resources import require_workers, room_for, shortage
from distset.cluster.world import check_sharing, open_world
from distset.train import Record, Watch, Watches
from distset.versions import differences, installed

__all__ = ["Process", "check_versions", "start_ray", "train_on_ray"]


CONNECT_SECONDS = 10.0
"""For the port of a Ray cluster to answer in."""
PLACING = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Environment variable of Ray Train: seconds that one attempt to place workers waits for room; 60 unless set."""


class Process(Protocol):
    """What each worker runs: a module's function, or a `functools.partial` of one."""

    def __call__(self, *, watch: Watch, device: torch.device) -> Any: ...


def start_ray(cluster: Cluster) -> None:
    """Connect to the cluster's Ray or start one here, without its chatter; nothing where one is connected.

    A Ray of this machine has no dashboard and no job server; its ports ask for the token in ``~/.ray/auth_token``, which Ray
    makes, unless ``RAY_AUTH_MODE=disabled``.

    Raises:
        ValueError: for an address where nothing answers; for GPUs that this machine has not (a cluster may still get them).
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        _connect(address, quiet)
    else:
        # Ray gives way to every other process unless told otherwise; this training is what the user waits for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        each, processes = cluster.cpus + cluster.actors * cluster.actor_cpus, max(cluster.workers, 1)
        cores = max(os.cpu_count() or 1, math.ceil(processes * each))
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)  # not one that happens to run
        found = int(ray.cluster_resources().get("GPU", 0))
        if found < cluster.workers * cluster.gpu + processes * cluster.actors * cluster.actor_gpus:
            ray.shutdown()
            share = "a GPU" if cluster.gpu == 1 else f"{cluster.gpu:g} GPU"
            actors = f" and {cluster.actors} actors with {cluster.actor_gpus:g}" if cluster.actor_gpus else ""
            raise ValueError(
                f"cluster.gpu: got {cluster.workers} workers with {share} each{actors}, this machine has {found}; set "
                f"cluster.gpu to false, lower cluster.workers, or name a cluster (cluster.address)"
            )


def _connect(address: str, quiet: dict[str, Any]) -> None:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdigit():  # Ray itself tries for many minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"cluster.address: nothing answers at {address} ({error}); start Ray there, run this as a job of the cluster "
            f"(docs/cluster.md), or leave the address out for a Ray of this machine"
        ) from error
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ValueError(
            f"cluster.address: no Ray at {address} takes this process ({error}); is it running, and is its token here "
            f"(RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or ~/.ray/auth_token)?"
        ) from error


def train_on_ray(process: Process, cluster: Cluster, *, watch: Watch | None = None, name: str = "run") -> Any:
    """Run ``process`` on the cluster's workers; returns what rank 0 returned.

    Args:
        process: called as ``process(watch=..., device=...)`` on every worker; it returns no tensors, Ray wants none. An
            error that it raises ends the run; only lost workers (and what their loss does to others) are tried again.
        cluster: see `Cluster`; of at least one worker.
        watch: told, in this process, what rank 0 tells its own.
        name: of the run, a label of its metrics (`distset.cluster.metrics`).

    Raises:
        ValueError: where ``process`` raised one; where the cluster has no room for the workers (`require_workers`); where a
            worker runs other versions than the driver; where the room of workers that were lost does not come back.
        RuntimeError: for any other error in it; where workers were lost more often than ``max_failures``.
    """
    check_sharing(cluster)
    start_ray(cluster)
    require_workers(cluster)
    mailbox = open_mailbox()
    job = {"process": process, "mailbox": mailbox, "name": name, "versions": installed(), "cluster": cluster}
    try:
        # Ray Train wants a folder for checkpoints; ours are kept by fit(), see docs/decisions.md.
        with tempfile.TemporaryDirectory() as unused, Postman(mailbox, watch or Watch()):
            result = _trainer(job, cluster, unused).fit().return_value
    except TrainingFailedError as error:
        if ray.get(mailbox.failed.remote()) is None:
            _raise_shortage(error, cluster)
            raise RuntimeError(f"cluster: training failed after {cluster.max_failures} restarts: {_cause(error)}") from error
    except SystemExit as error:  # what Ray Train makes of Ctrl-C
        raise KeyboardInterrupt from error
    if failure := ray.get(mailbox.failed.remote()):
        kind, message = failure
        raise ValueError(message) if kind == "ValueError" else RuntimeError(message)
    return result


def _trainer(job: dict[str, Any], cluster: Cluster, storage: str) -> Any:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(cluster.check_seconds))
    return TorchTrainer(
        _work,  # type: ignore[arg-type]  # may return a value, says the documentation of Result.return_value
        train_loop_config=job,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=bool(cluster.gpu),
            resources_per_worker={"CPU": cluster.cpus, **({"GPU": float(cluster.gpu)} if cluster.gpu else {})},
        ),
        run_config=RunConfig(
            storage_path=storage,
            # Ray shows mypy its old configurations.
            failure_config=FailureConfig(cluster.max_failures, controller_failure_limit=_attempts(cluster)),  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
        ),
    )


def _attempts(cluster: Cluster) -> int:
    """How often Ray Train may try again to place workers, where a node was lost and none has come in its place.

    Ray counts the attempts of the whole run, each as long as `PLACING` says, and would go on for ever without a limit.
    """
    return max(cluster.max_failures, math.ceil(cluster.wait_seconds / _placing_seconds()))


def _placing_seconds() -> float:
    return float(os.environ.get(PLACING, 60.0))


def _raise_shortage(error: TrainingFailedError, cluster: Cluster) -> None:
    """Say what is missing where lost workers found no place again; return where the run failed of something else."""
    cause = getattr(error, "controller_failure", None)
    if type(cause).__name__ != "WorkerGroupStartupTimeoutError":
        return
    waited = (_attempts(cluster) + 1) * _placing_seconds()
    text = shortage(room_for(cluster), cluster._replace(wait_seconds=waited))
    raise ValueError(f"{text}. Workers were lost while they trained; the same command goes on from the last checkpoint")


def _work(job: dict[str, Any]) -> Any:
    """The loop of one worker."""
    mailbox, device, context = job["mailbox"], ray.train.torch.get_device(), ray.train.get_context()
    if ray.get(mailbox.failed.remote()):
        return None
    rank = context.get_world_rank()
    report = _Reporting(mailbox if rank == 0 else None)
    try:
        check_versions(job["versions"])
        with open_world(job["cluster"]):
            result = job["process"](watch=Watches(report, Metrics(job["name"], rank)), device=device)
    except Exception as error:
        if isinstance(error, ValueError):
            ray.get(mailbox.fail.remote("ValueError", str(error)))
        elif context.get_world_size() == 1:  # else it may be what a lost worker leaves the others with
            ray.get(mailbox.fail.remote(type(error).__name__, traceback.format_exc()))
        if context.get_world_size() == 1:
            return None
        raise  # the others may wait in a collective: Ray ends them
    if rank != 0:
        return None
    report.flush()
    return result


def check_versions(drivers: dict[str, str]) -> None:
    """Raise where this worker runs other software than the driver.

    Raises:
        ValueError: names the packages and both versions.
    """
    if other := differences(drivers, installed()):
        raise ValueError(
            f"cluster: a worker on {ray.util.get_node_ip_address()} has {', '.join(other)}, which the driver has; install "
            f"the same versions on every node (one container image for all), or give the job a runtime environment"
        )


class _Reporting(MailboxWatch):
    """Rank 0's letters to the driver, and every rank's validation metrics to Ray Train, whose callbacks want them."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__(mailbox)

    def _post(self, name: str, args: tuple[Any, ...], at_once: bool = False) -> None:
        if self.mailbox is not None:
            super()._post(name, args, at_once)

    def recorded(self, record: Record) -> None:
        super().recorded(record)
        if any(key.startswith("val/") for key in record):
            ray.train.report(record)


def _cause(error: Exception) -> str:
    """The last line of the first worker's error."""
    failures = getattr(error, "worker_failures", None)
    text = str(next(iter(failures.values()))) if failures else str(error)
    return text.strip().splitlines()[-1] if text.strip() else type(error).__name__
