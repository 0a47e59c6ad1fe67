"""How weights are moved: any torch optimiser, weight decay where it belongs, warm-up, a schedule, gradient clipping.

The rate is a pure function of the step, so a resumed run needs no scheduler's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Optimisation"]


class Optimisation:
    r"""An optimiser with its schedule.

    The rate rises linearly over the first ``warmup`` share of the steps and then follows a cosine to 0, or stays:

    .. math:: \eta_t = \eta \min(1, (t + 1) / w) \cdot \tfrac12 (1 + \cos \pi \tfrac{t - w}{T - w})

    Weight decay is for matrices and filters: parameters of fewer than two dimensions (biases, norms) have none.

    Args:
        optimiser: ``optimiser(groups, lr=...)`` gives a `torch.optim.Optimizer`: a class, or a `functools.partial` of one.
        lr: the peak rate.
        weight_decay: of parameters of two or more dimensions.
        warmup: the share of all steps that the rate rises over, 0 to below 1.
        schedule: ``"cosine"`` or ``"constant"``.
        clip: the largest norm of the whole gradient; None for none.

    Raises:
        ValueError: for a rate, a share or a norm out of range, an unknown schedule.

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
    ) -> None:
        if not lr > 0 or not math.isfinite(lr):
            raise ValueError(f"lr: got {lr}, wanted a positive rate")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay: got {weight_decay}, wanted 0 or more")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup: got {warmup}, wanted a share of the steps, 0 to below 1 (0.1 is the first tenth)")
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule: got {schedule!r}, wanted 'cosine' or 'constant'")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: got {clip}, wanted a positive norm, or None for no clipping")
        self.optimiser, self.lr, self.weight_decay = optimiser, lr, weight_decay
        self.warmup, self.schedule, self.clip = warmup, schedule, clip

    def settings(self) -> dict[str, float | str | None]:
        """The figures above, to compare two runs by."""
        return {key: getattr(self, key) for key in ("lr", "weight_decay", "warmup", "schedule", "clip")}

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
        rising = self.warmup * total
        if step + 1 < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        done = max(0.0, (step - rising) / max(1.0, total - rising))
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def step(self, optimiser: torch.optim.Optimizer, rate: float) -> Tensor:
        """Clip and move at ``rate``; returns the norm of the gradient before clipping. A non-finite one moves nothing."""
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if self.clip is None else self.clip)
        if bool(norm.isfinite()):
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
        return norm
