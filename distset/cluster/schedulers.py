"""Ray Tune's schedulers with a memory: what trials told an earlier start of the search counts in this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler

from distset.search.plan import ASHA, PBT, Search, mutable
from distset.search.space import Choice, Range, Space
from distset.search.trial import Report, TrialFolder

__all__ = ["scheduler_for"]


def scheduler_for(
    search: Search, space: Space, done: Sequence[TrialFolder], left: Sequence[TrialFolder]
) -> TrialScheduler | None:
    """Ray Tune's scheduler for a search; None for first in, first out.

    Args:
        search, space: what the scheduler works with.
        done, left: trials that have ended, and those to train.
    """
    if isinstance(search.scheduler, ASHA):
        return _Halving(
            search.scheduler, search.mode, [trial.reports for trial in done], {t.number: t.reports for t in left}
        )
    if isinstance(search.scheduler, PBT):
        return _population(search.scheduler, search.mode, space)
    return None


class _Halving(ASHAScheduler):
    """Ray Tune's `ASHAScheduler`, whose rungs know the trials of earlier starts."""

    def __init__(
        self, plan: ASHA, mode: str | None, done: Sequence[Sequence[Report]], left: Mapping[int, Sequence[Report]]
    ) -> None:
        super().__init__(
            time_attr="progress",
            metric="value",
            mode=mode,
            max_t=100,
            grace_period=plan.grace,  # type: ignore[arg-type]  # any number: it is compared with progress
            reduction_factor=plan.factor,
        )
        self._told = dict(left)
        for number, reports in enumerate(done):
            trial = SimpleNamespace(trial_id=f"done-{number}")
            super().on_trial_add(None, trial)  # type: ignore[arg-type]  # it is asked for its id alone
            for report in reports:
                super().on_trial_result(None, trial, report)  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for report in self._told.pop(trial.config["trial"]["number"], ()):
            super().on_trial_result(tune_controller, trial, dict(report))


def _population(plan: PBT, mode: str | None, space: Space) -> PopulationBasedTraining:
    changed = {key: space[key] for key in mutable() if key in space}

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        """Back into the space, which a factor may have left."""
        settings = config["trial"]["settings"]
        for key, part in changed.items():
            if isinstance(part, Range):
                settings[key] = part.clip(settings[key])
        return config

    return PopulationBasedTraining(
        time_attr="progress",
        metric="now",
        mode=mode,
        perturbation_interval=plan.every,
        hyperparam_mutations={"trial": {"settings": {key: _domain(part) for key, part in changed.items()}}},
        quantile_fraction=plan.quantile,
        resample_probability=plan.resample,
        perturbation_factors=(plan.factors[0], plan.factors[1]),
        custom_explore_fn=explore,
        log_config=False,
        require_attrs=False,
    )


def _domain(part: Range | Choice) -> Any:
    if isinstance(part, Choice):
        return list(part.values)
    if part.whole:
        return tune.randint(int(part.low), int(part.high) + 1)
    return tune.loguniform(part.low, part.high) if part.log else tune.uniform(part.low, part.high)
