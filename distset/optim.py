"""How weights are moved: any torch optimiser, weight decay where it belongs, warm-up, a schedule, gradient clipping.

The rate is a pure function of the step, so a resumed run needs no scheduler's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CHANGEABLE", "Optimisation"]

CHANGEABLE = ("lr", "weight_decay", "clip")
"""What may change while a run is under way."""


class Optimisation:
    r"""An optimiser with its schedule.

    The rate rises linearly over the first ``warmup`` share of the steps and then follows a cosine to ``floor`` of its peak,
    or stays:

    .. math:: \eta_t = \eta \min(1, (t + 1) / w) \cdot (f + (1 - f) \tfrac12 (1 + \cos \pi \tfrac{t - w}{T - w}))

    Weight decay is for matrices and filters: parameters of fewer than two dimensions (biases, norms) have none.

    ``changes`` are other figures from a step on, as population-based training finds them; a run that goes on from a
    checkpoint must have the same ones up to there, and may have new ones after.

    Args:
        optimiser: ``optimiser(groups, lr=...)`` gives a `torch.optim.Optimizer`: a class, or a `functools.partial` of one.
        lr: the peak rate.
        weight_decay: of parameters of two or more dimensions.
        warmup: the share of all steps that the rate rises over, 0 to below 1.
        schedule: ``"cosine"`` or ``"constant"``.
        clip: the largest norm of the whole gradient; None for none.
        floor: the share of the peak rate that the cosine ends at, 0 to 1.
        changes: in the order of their steps, ``{"step": s, "lr": ..., "weight_decay": ..., "clip": ...}``: from step ``s``
            (from 0) on, those that it names are other ones; the schedule stays.

    Raises:
        ValueError: for a rate, a share or a norm out of range, an unknown schedule, a change of something else.

    Example:
        >>> recipe = Optimisation(torch.optim.AdamW, lr=0.1, warmup=0.2)
        >>> [round(recipe.rate(step, 10), 3) for step in (0, 1, 2, 6, 9)]
        [0.05, 0.1, 0.1, 0.05, 0.004]
    """

    def __init__(
        self,
        optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        schedule: str = "cosine",
        clip: float | None = None,
        floor: float = 0.0,
        changes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup: got {warmup}, wanted a share of the steps, 0 to below 1 (0.1 is the first tenth)")
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule: got {schedule!r}, wanted 'cosine' or 'constant'")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: got {floor}, wanted a share of the peak rate, 0 to 1")
        self.optimiser, self.lr, self.weight_decay = optimiser, lr, weight_decay
        self.warmup, self.schedule, self.clip, self.floor = warmup, schedule, clip, floor
        self.changes = [dict(change) for change in changes]
        _check_figures({key: getattr(self, key) for key in CHANGEABLE}, "")
        _check_changes(self.changes)

    def settings(self) -> dict[str, Any]:
        """The figures above, to compare two runs by."""
        return {key: getattr(self, key) for key in ("lr", "weight_decay", "warmup", "schedule", "clip", "floor", "changes")}

    def figure(self, name: str, step: int) -> Any:
        """``lr``, ``weight_decay`` or ``clip`` as it stands at step ``step`` (from 0)."""
        stated = [change[name] for change in self.changes if change["step"] <= step and name in change]
        return stated[-1] if stated else getattr(self, name)

    def create(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of the model's trainable parameters."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("model: got no parameter that requires a gradient, wanted something to train")
        decayed = [p for p in trained if p.dim() > 1]
        plain = [p for p in trained if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return self.optimiser([group for group in groups if group["params"]], lr=self.lr)

    def rate(self, step: int, total: int) -> float:
        """The rate of step ``step`` (from 0) of ``total``."""
        peak, rising = self.figure("lr", step), self.warmup * total
        if step + 1 < rising:
            return peak * (step + 1) / rising
        if self.schedule == "constant":
            return peak
        done = max(0.0, (step - rising) / max(1.0, total - rising))
        return peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))

    def step(self, optimiser: torch.optim.Optimizer, step: int, total: int) -> Tensor:
        """Clip and move, as step ``step`` (from 0) of ``total``.

        Returns:
            The norm of the gradient before clipping. A non-finite one moves nothing.
        """
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        clip = self.figure("clip", step)
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        if bool(norm.isfinite()):
            for group in optimiser.param_groups:
                group["lr"] = self.rate(step, total)
                if group["params"][0].dim() > 1:
                    group["weight_decay"] = self.figure("weight_decay", step)
            optimiser.step()
        return norm


def _check_figures(figures: Mapping[str, Any], where: str) -> None:
    lr, weight_decay, clip = (
        figures.get(name, default) for name, default in (("lr", 1.0), ("weight_decay", 0.0), ("clip", None))
    )
    if not lr > 0 or not math.isfinite(lr):
        raise ValueError(f"{where}lr: got {lr}, wanted a positive rate")
    if not weight_decay >= 0:
        raise ValueError(f"{where}weight_decay: got {weight_decay}, wanted 0 or more")
    if clip is not None and not clip > 0:
        raise ValueError(f"{where}clip: got {clip}, wanted a positive norm, or None for no clipping")


def _check_changes(changes: Sequence[Mapping[str, Any]]) -> None:
    for place, change in enumerate(changes):
        where = f"changes[{place}]"
        if other := set(change) - {"step", *CHANGEABLE}:
            raise ValueError(f"{where}: got {', '.join(sorted(other))}, wanted a step and any of {', '.join(CHANGEABLE)}")
        if not isinstance(change.get("step"), int) or change["step"] < 0:
            raise ValueError(f"{where}.step: got {change.get('step')!r}, wanted the step (from 0) that it begins at")
        if place and change["step"] < changes[place - 1]["step"]:
            raise ValueError(f"{where}.step: got {change['step']} after {changes[place - 1]['step']}, wanted rising steps")
        _check_figures(change, f"{where}.")
