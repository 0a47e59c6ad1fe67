"""Which software a process runs: what has to be the same on the driver and on every worker of a cluster."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping

__all__ = ["PACKAGES", "differences", "installed"]

PACKAGES = ("distset", "torch", "numpy", "pyarrow", "ray")
"""Those whose version changes figures, or whether two processes understand each other."""


def installed() -> dict[str, str]:
    """Versions of Python and of `PACKAGES` here; ``"none"`` for what is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """What is not the same, as ``"torch 2.12.0 instead of 2.13.0"``; of Python, the first two numbers count.

    Example:
        >>> differences({"python": "3.11.2", "torch": "2.13.0"}, {"python": "3.11.9", "torch": "2.12.0"})
        ['torch 2.12.0 instead of 2.13.0']
    """
    return [
        f"{name} {theirs.get(name, 'none')} instead of {version}"
        for name, version in ours.items()
        if _relevant(name, theirs.get(name, "none")) != _relevant(name, version)
    ]


def _relevant(name: str, version: str) -> str:
    return ".".join(version.split(".")[:2]) if name == "python" else version


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
