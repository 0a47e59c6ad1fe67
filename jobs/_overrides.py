"""What was typed on the command line, checked against what there is, before Hydra sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import conf

__all__ = ["CONF", "check_overrides"]

CONF = Path(conf.__file__).parent


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
    folder = CONF / group
    known = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    if choice not in known:
        close = get_close_matches(choice, known, n=1, cutoff=0.5)
        hint = f"did you mean {group}={close[0]}? There are" if close else "there are"
        raise ValueError(f"{group}={choice}: there is no such choice; {hint} {', '.join(known)}")


def _keys(tree: Any, path: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted key, and whether it is a section with a target."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        yield here, isinstance(value, Mapping) and "_target_" in value
        if isinstance(value, Mapping):
            yield from _keys(value, here)
