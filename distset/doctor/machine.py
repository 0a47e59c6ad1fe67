"""This machine: its software, and room for the run in memory and on disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from distset.cluster.config import Cluster
from distset.doctor.findings import Finding, fail, ok, warn

__all__ = ["available_memory", "check_cores", "check_disk", "check_memory", "check_software", "process_memory"]

SPARE = 2**30
"""Bytes that a disk should have left over."""
CGROUP = Path("/sys/fs/cgroup")
NEEDED = ("data", "jobs")
"""Extras without which no job runs; packages of the others are looked at where they are installed."""


def check_software() -> Iterator[Finding]:
    """Python and packages in the ranges that distset names in its own metadata."""
    from packaging.requirements import Requirement  # Ray brings it

    wanted = importlib.metadata.metadata("distset")
    if not _allows(wanted["Requires-Python"], platform.python_version()):
        yield fail(f"Python is {platform.python_version()}, wanted {wanted['Requires-Python']}", "make a new environment")
    bad = []
    for requirement in map(Requirement, importlib.metadata.requires("distset") or []):
        needed = requirement.marker is None or any(f'"{extra}"' in str(requirement.marker) for extra in NEEDED)
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        if found == "not installed" and not needed:
            continue
        if found == "not installed" or not requirement.specifier.contains(found, prereleases=True):
            bad.append(f"{requirement.name} is {found}, wanted {requirement.specifier}")
    if bad:
        yield fail("; ".join(bad), "pip install -c constraints.txt 'distset[jobs]'")
        return
    versions = {name: importlib.metadata.version(name) for name in ("torch", "ray", "pyarrow")}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield ok(f"Python {platform.python_version()}, {shown}: all within the supported ranges")


def check_cores(cluster: Cluster) -> Iterator[Finding]:
    """Cores and GPUs of this machine, for workers that run on it."""
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    workers, actors = max(cluster.workers, 1), max(cluster.workers, 1) * cluster.actors
    wanted_cores = workers * cluster.cpus + actors * cluster.actor_cpus
    wanted_gpus = workers * cluster.gpu + actors * cluster.actor_gpus
    beside = f" and {actors} actors of {cluster.actor_cpus:g}" if actors else ""
    if wanted_cores > cores:
        yield warn(
            f"{workers} workers of {cluster.cpus} cores each{beside} on a machine of {cores}",
            "they take turns; lower cluster.workers or cluster.cpus" + (", or cluster.actors" if actors else ""),
        )
    if gpus < wanted_gpus:
        beside = f" and {actors} actors {cluster.actor_gpus:g}" if cluster.actor_gpus else ""
        yield fail(
            f"{workers} workers want {float(cluster.gpu):g} GPU each{beside}, torch finds {gpus} here",
            "set cluster.gpu=false, lower cluster.workers, install the driver and a CUDA build of torch, or name a cluster",
        )
    elif gpus and not wanted_gpus:
        yield warn(f"torch finds {gpus} GPU here, the run will not use it", "choose cluster=gpu")
    if wanted_cores <= cores and gpus >= wanted_gpus:
        beside = f" and {actors} actor{'s' * (actors > 1)}" if actors else ""
        yield ok(f"{workers} worker{'s' * (workers > 1)}{beside} on this machine: {cores} cores, {gpus} GPU")


def check_memory(need: int, processes: int, available: int, where: str = "this machine") -> Iterator[Finding]:
    """Room for ``processes`` (workers and actors, both hold chunks) of ``need`` bytes each in ``available`` bytes."""
    told = f"a worker takes about {_size(need)}; {where} has {_size(available)} for {processes}"
    advice = "lower data.chunk_size, use grad=exact or grad=sampled, a smaller model, or fewer workers on each machine"
    if need * processes > available:
        yield fail(told, advice)
    elif need * processes > 0.8 * available:
        yield warn(told + ", which is close", advice)
    else:
        yield ok(told)


def check_disk(folder: Path, need: int, what: str) -> Iterator[Finding]:
    """Room for ``need`` bytes where ``folder`` is, or will be; and whether it can be written."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK) or not there.is_dir():
        yield fail(f"{there} cannot be written", "choose another run.dir")
        return
    free = shutil.disk_usage(there).free
    told = f"{what} take about {_size(need)}, {_size(free)} are free at {there}"
    if free < need:
        yield fail(told, "make room, or choose another run.dir")
    elif free < need + SPARE:
        yield warn(told, "make room: a full disk ends the run (it can go on later)")
    else:
        yield ok(told)


def available_memory() -> int:
    """Bytes that processes here may still take: the machine's, or what the container's limit leaves."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def process_memory() -> tuple[int, int]:
    """Bytes that this process holds of its own, and of files (libraries, and whatever else is mapped)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return own, files


def _allows(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version)


def _size(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.0f} MiB"
