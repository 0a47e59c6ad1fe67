"""What a search is: how many trials, what they are judged by, and when one is stopped or replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from distset.build import build
from distset.optim import CHANGEABLE
from distset.search.space import Space, check_keys, read_space

__all__ = ["ASHA", "PBT", "Search", "read_search"]


class ASHA(NamedTuple):
    """Asynchronous successive halving: a trial goes on past a rung where it is among the best of those that reached it.

    Li et al. (2020), *A System for Massively Parallel Hyperparameter Tuning*, https://arxiv.org/abs/1810.05934

    Attributes:
        grace: per cent of its work that every trial may do: the first rung.
        factor: the best ``1 / factor`` go on; a rung is at ``factor`` times the work of the one before.
    """

    grace: float = 10.0
    factor: float = 3.0

    def check(self) -> None:
        if not 0 < self.grace < 100:
            raise ValueError(f"search.scheduler.grace: got {self.grace}, wanted per cent of a trial's work, 0 to 100")
        if not self.factor > 1:
            raise ValueError(f"search.scheduler.factor: got {self.factor}, wanted more than 1")


class PBT(NamedTuple):
    """Population-based training: now and then the worst take over the state of the best, and other figures from there on.

    Jaderberg et al. (2017), *Population Based Training of Neural Networks*, https://arxiv.org/abs/1711.09846

    Attributes:
        every: per cent of a trial's work between two comparisons.
        quantile: the share of the population that is replaced, and that is copied; at most one half.
        resample: how likely a figure is drawn anew; else it is multiplied by one of ``factors``.
        factors: see ``resample``.
    """

    every: float = 20.0
    quantile: float = 0.25
    resample: float = 0.25
    factors: tuple[float, float] = (0.8, 1.25)

    def check(self) -> None:
        if not 0 < self.every < 100:
            raise ValueError(f"search.scheduler.every: got {self.every}, wanted per cent of a trial's work, 0 to 100")
        if not 0 < self.quantile <= 0.5:
            raise ValueError(f"search.scheduler.quantile: got {self.quantile}, wanted a share above 0, at most 0.5")
        if not 0 <= self.resample <= 1:
            raise ValueError(f"search.scheduler.resample: got {self.resample}, wanted a probability")


class Search(NamedTuple):
    """A search over settings.

    Attributes:
        trials: draws of what is random in the space, times the combinations of its grids; None where all is a grid. For
            `PBT` the size of the population.
        metric: the validation metric that settings are chosen by; None for the one that picks a run's weights.
        mode: ``"min"`` or ``"max"``; None for ``"min"`` where the metric's name ends in ``loss`` or ``error``.
        scheduler: `ASHA`, `PBT`, or None: every trial is trained to its end.
        concurrency: trials at a time; None for as many as find room.
        seed: of the draws.
    """

    trials: int | None = 16
    metric: str | None = None
    mode: str | None = None
    scheduler: ASHA | PBT | None = None
    concurrency: int | None = None
    seed: int = 0

    @property
    def minimise(self) -> bool:
        return self.mode == "min"


def read_search(config: Mapping[str, Any]) -> tuple[Search, Space, dict[str, Any]]:
    """The search, its space and the configuration of its trials, from a resolved configuration of ``jobs.tune``.

    Raises:
        ValueError: for a metric that is not of the validation sets, settings that the configuration lacks, a scheduler
            that cannot work with them.
    """
    base = {key: value for key, value in config.items() if key != "search"}
    section = {key: value for key, value in config["search"].items() if key != "space"}
    space = read_space(config["search"].get("space") or {})
    check_keys(space, base)
    search: Search = build(section, "search")
    metric = _metric(search.metric, base["plan"]["monitor"])
    search = search._replace(metric=metric, mode=_mode(search.mode, metric))
    _check(search, space, base)
    return search, space, base


def _metric(metric: str | None, monitor: str | None) -> str:
    metric = metric or monitor or "loss"
    part, slash, _ = metric.partition("/")
    if slash and part in ("test", "train"):
        why = (
            "the test sets are for the chosen setting alone"
            if part == "test"
            else "it says how well a setting learns by heart"
        )
        raise ValueError(
            f"search.metric: got {metric!r}, and settings are not chosen by the {part} sets: {why}; wanted a validation "
            f"metric, such as val/loss"
        )
    return metric if part == "val" and slash else f"val/{metric}"


def _mode(mode: str | None, metric: str) -> str:
    if mode not in (None, "min", "max"):
        raise ValueError(f"search.mode: got {mode!r}, wanted min, max, or null to go by the metric's name")
    return mode or ("min" if metric.endswith(("loss", "error")) else "max")


def _check(search: Search, space: Space, base: Mapping[str, Any]) -> None:
    if search.concurrency is not None and search.concurrency < 1:
        raise ValueError(f"search.concurrency: got {search.concurrency}, wanted at least one trial at a time, or null")
    if base["cluster"]["workers"] == 0 and base["cluster"]["gpu"]:
        raise ValueError(
            "cluster.gpu: trials without workers of their own train on CPUs; set cluster.workers=1, and a share of a GPU by "
            "cluster.gpu=0.5"
        )
    if search.scheduler is None:
        return
    search.scheduler.check()
    if isinstance(search.scheduler, PBT):
        _check_population(search, space, base)


def _check_population(search: Search, space: Space, base: Mapping[str, Any]) -> None:
    if not any(key in space for key in mutable()):
        raise ValueError(
            f"search.space: got {', '.join(space)}; population-based training changes figures while a run is under way, "
            f"wanted one of {', '.join(mutable())} among them"
        )
    if base["folds"] is not None or base["seeds"] is not None:
        raise ValueError(
            "search.scheduler: a population is made of single runs, got folds or seeds; leave both null, and train the best "
            "trial's configuration with them"
        )
    if search.concurrency is not None and base["cluster"]["workers"] == 0:
        raise ValueError(
            "search.concurrency: the trials of a population take turns where they do not find room at once; leave it null, "
            "and say by cluster.cpus how much of the machine each takes"
        )
    if search.trials is not None and search.trials < 2:
        raise ValueError(f"search.trials: got {search.trials}, wanted a population of at least 2")


def mutable() -> list[str]:
    """The dotted keys of what population-based training may change."""
    return [f"optim.{name}" for name in CHANGEABLE]
