"""Search spaces in plain configuration, and settings drawn from them.

A setting is named by its dotted key in the configuration, and has one of

==================  =========================================================
``loguniform``      ``[low, high]``: the logarithm is uniform
``uniform``         ``[low, high]``
``randint``         ``[low, high]``: whole numbers, both ends included
``choice``          a list, each value as likely as the others
``grid``            a list, every value with every combination of the rest
==================  =========================================================

Example:
    >>> from distset.search import draw, read_space
    >>> space = read_space({"optim": {"lr": {"loguniform": [1e-4, 1e-2]}}, "model.slots": {"grid": [4, 8]}})
    >>> [settings["model.slots"] for settings in draw(space, draws=2, seed=0)]
    [4, 8, 4, 8]
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distset.build import nearest
from distset.seeds import generator_for

__all__ = ["Choice", "Range", "Space", "apply", "check_keys", "draw", "read_space"]

NOT_SEARCHED = {
    "run": "it says where a run is, not what it learns",
    "cluster": "it says where a run is, not what it learns",
    "search": "it is the search itself",
    "seed": "a seed is not chosen for its luck; seeds=[0,1,2] makes a trial's figure a mean over seeds",
    "seeds": "each setting has the same seeds",
    "folds": "each setting has the same folds",
    "published": "it is what a paper says",
}


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``.

    Attributes:
        log: whether their logarithm is uniform.
        whole: whether they are whole numbers, both ends included.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, share: float) -> float | int:
        """The number at ``share`` (from 0 to below 1) of the way."""
        if self.whole:
            return int(self.low) + int(share * (int(self.high) - int(self.low) + 1))
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)

    def clip(self, value: float) -> float | int:
        """The nearest number of the range."""
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else value


class Choice(NamedTuple):
    """One of ``values``; of a ``grid``, each of them."""

    values: Sequence[Any]
    grid: bool = False

    def at(self, share: float) -> Any:
        return self.values[int(share * len(self.values))]


Space = dict[str, Range | Choice]
KINDS = ("loguniform", "uniform", "randint", "choice", "grid")


def read_space(tree: Mapping[str, Any]) -> Space:
    """The space that a configuration describes: nested sections or dotted keys, one kind at each leaf; null leaves one out.

    Raises:
        ValueError: for what is no space, none or several kinds at a leaf, ends in the wrong order, an empty list.
    """
    space = dict(_leaves(tree))
    if not space:
        raise ValueError("search.space: got no setting, wanted at least one, such as optim.lr: {loguniform: [1e-4, 1e-2]}")
    return space


def draw(space: Space, draws: int | None, seed: int) -> list[dict[str, Any]]:
    """Settings by dotted key: ``draws`` times every combination of the grids. More draws begin with the same ones.

    Args:
        draws: of what is random; None where all is a grid.
        seed: of the draws.

    Raises:
        ValueError: for draws of a space of grids alone, or none of one that is not.
    """
    grids = {key: part.values for key, part in space.items() if isinstance(part, Choice) and part.grid}
    combinations = list(itertools.product(*grids.values()))
    if len(grids) == len(space):
        if draws is not None:
            raise ValueError(
                f"search.trials: got {draws}, but search.space holds grids alone, of {len(combinations)} combinations; "
                f"leave it null"
            )
        draws = 1
    if draws is None or draws < 1:
        raise ValueError(f"search.trials: got {draws}, wanted how often to draw what is random in search.space, 1 or more")
    drawn = []
    for number in range(draws):
        random = {key: part.at(_share(seed, number, key)) for key, part in space.items() if key not in grids}
        for values in combinations:
            own = {**random, **dict(zip(grids, values))}
            drawn.append({key: own[key] for key in space})
    return drawn


def apply(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the configuration with the settings, by dotted key, in place."""
    changed = copy.deepcopy(dict(config))
    for key, value in settings.items():
        *path, last = key.split(".")
        section = changed
        for part in path:
            section = section[part]
        section[last] = value
    return changed


def check_keys(space: Space, config: Mapping[str, Any]) -> None:
    """Raise for settings that the configuration does not have, or that no search may choose.

    Raises:
        ValueError: names the nearest key that there is.
    """
    known = list(_keys(config))
    for key in space:
        top = key.split(".")[0]
        if top in NOT_SEARCHED:
            raise ValueError(f"search.space.{key}: {top} is not for a search, {NOT_SEARCHED[top]}")
        if key not in known:
            hint = nearest(key, [name for name in known if name.split(".")[0] not in NOT_SEARCHED])
            raise ValueError(
                f"search.space.{key}: is not in the configuration; {hint.partition('it takes')[0] or 'see --cfg job'}"
            )


def _share(seed: int, number: int, key: str) -> float:
    return torch.rand((), generator=generator_for(seed, "search", number, key), dtype=torch.float64).item()


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Range | Choice]]:
    for name, value in tree.items():
        key = f"{path}.{name}" if path else str(name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(
                f"search.space.{key}: got {value!r}, wanted one of {', '.join(KINDS)}, such as {{choice: [4, 8]}}"
            )
        kinds = [kind for kind in KINDS if value.get(kind) is not None]
        if not kinds and not any(kind in value for kind in KINDS):
            yield from _leaves(value, key)
        elif len(kinds) == 1 and set(value) <= set(KINDS):
            yield key, _leaf(key, kinds[0], value[kinds[0]])
        elif kinds:
            found = ", ".join(map(str, value))
            raise ValueError(f"search.space.{key}: got {found}, wanted one of {', '.join(KINDS)}; set the others to null")


def _leaf(key: str, kind: str, value: Any) -> Range | Choice:
    where = f"search.space.{key}.{kind}"
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where}: got {value!r}, wanted a list")
    if kind in ("choice", "grid"):
        return Choice(tuple(value), grid=kind == "grid")
    if len(value) != 2 or not all(isinstance(end, int | float) and math.isfinite(end) for end in value):
        raise ValueError(f"{where}: got {value!r}, wanted two numbers, low and high")
    low, high = value
    if not low < high or (kind == "loguniform" and low <= 0):
        raise ValueError(f"{where}: got {value!r}, wanted low below high{' and above 0' * (kind == 'loguniform')}")
    if kind == "randint" and not all(float(end).is_integer() for end in value):
        raise ValueError(f"{where}: got {value!r}, wanted whole numbers")
    return Range(low, high, log=kind == "loguniform", whole=kind == "randint")


def _keys(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in tree.items():
        key = f"{path}.{name}" if path else str(name)
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value, key)
