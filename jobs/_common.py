"""What the jobs share: Hydra in front, plain dicts behind it, errors as messages.

A job is ``@job("train") def main(config: dict)``: its configuration is composed by Hydra from ``conf/train.yaml`` and the
command line, checked for unknown keys, resolved, and handed over as plain dicts. A ``ValueError`` ends it with one line and
exit code 1; ``HYDRA_FULL_ERROR=1`` shows the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from distset.build import build
from distset.data import ingest

__all__ = ["check_overrides", "ensure_store", "job"]

CONF = Path(conf.__file__).parent


def job(name: str) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[], None]]:
    """Make a function of a plain dict the main function of the job ``conf/<name>.yaml``."""

    def decorate(main: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        def with_plain_dicts(config: DictConfig) -> None:
            _or_exit(lambda: main(OmegaConf.to_container(config, resolve=True, throw_on_missing=True)))  # type: ignore[arg-type]

        def run() -> None:
            _or_exit(lambda: check_overrides(name, [arg for arg in sys.argv[1:] if not arg.startswith("-")]))
            hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)(with_plain_dicts)()

        return run

    return decorate


def ensure_store(data: Mapping[str, Any]) -> None:
    """Where ``data.make`` names a source, store its sets at ``data.path``; a finished store is left as it is."""
    if data["make"] is not None:
        ingest(build(data["make"], "data.make"), data["path"], told=data["make"])


def check_overrides(name: str, overrides: list[str]) -> None:
    """Refuse overrides of groups, choices and keys that are not there, naming the nearest one.

    New keys (``+key=value``) are for sections with a ``_target_``, which checks its arguments itself.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = {
        path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir() and not path.name.startswith("_")
    }
    choices = []
    for override in parsed:
        choice = override.value()
        if override.key_or_group in groups and isinstance(choice, str) and not override.is_sweep_override():
            _check_choice(override.key_or_group, choice)
            choices.append(override.input_line or "")
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose(name, overrides=choices), resolve=False)
    known = dict(_keys(config))
    for override in parsed:
        key = override.key_or_group
        if key in groups or key in known or key.startswith("hydra"):
            continue
        parents = [key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1)]
        if not (override.is_add() and any(known.get(parent) for parent in parents)):
            close = get_close_matches(key, [*known, *groups], n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"sections are {', '.join(sorted(config))}"  # type: ignore[arg-type]
            raise ValueError(f"{key}: is not in the configuration of jobs.{name}; {hint}")


def _check_choice(group: str, choice: str) -> None:
    known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if choice not in known:
        close = get_close_matches(choice, known, n=1, cutoff=0.5)
        hint = f"did you mean {group}={close[0]}? " if close else ""
        raise ValueError(f"{group}={choice}: there is no such choice; {hint}There are {', '.join(known)}")


def _keys(tree: Any, path: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted key, and whether it is a section with a target."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        yield here, isinstance(value, Mapping) and "_target_" in value
        if isinstance(value, Mapping):
            yield from _keys(value, here)


def _or_exit(call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, HydraException, OmegaConfBaseException, RuntimeError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
