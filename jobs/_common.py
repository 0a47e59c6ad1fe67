"""What the jobs share: Hydra in front, plain dicts behind it, errors as messages.

A job is ``@job("train") def main(config: dict)``: its configuration is composed by Hydra from ``conf/train.yaml`` and the
command line, checked for unknown keys, resolved, and handed over as plain dicts. A ``ValueError`` ends it with one line and
exit code 1; ``HYDRA_FULL_ERROR=1`` shows the traceback.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distset.build import build
from distset.data import ingest
from jobs._overrides import check_overrides

__all__ = ["absolute_paths", "ensure_store", "job"]


def job(name: str) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[], None]]:
    """Make a function of a plain dict the main function of the job ``conf/<name>.yaml``."""

    def decorate(main: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        @functools.wraps(main)  # Hydra names the job by where the function stands
        def with_plain_dicts(config: DictConfig) -> None:
            _or_exit(lambda: main(OmegaConf.to_container(config, resolve=True, throw_on_missing=True)))  # type: ignore[arg-type]

        def run() -> None:
            if not any(arg.startswith("-") for arg in sys.argv[1:]):  # --help, --cfg, --multirun are Hydra's alone
                _or_exit(lambda: check_overrides(name, sys.argv[1:]))
            hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)(with_plain_dicts)()

        return run

    return decorate


def ensure_store(data: dict[str, Any]) -> None:
    """Where ``data.make`` names a source, store its sets at ``data.path``; a finished store is left as it is."""
    absolute_paths(data)
    if data.get("make") is not None:
        ingest(build(data["make"], "data.make"), data["path"], told=data["make"])


def absolute_paths(data: dict[str, Any]) -> None:
    """Make the paths of the data absolute, in place: workers may have another working directory."""
    for section in (data, data.get("examples", {})):
        if "path" in section:
            section["path"] = str(Path(section["path"]).resolve())


def _or_exit(call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, HydraException, OmegaConfBaseException, RuntimeError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
