"""Margins that fade while a task trains."""

from __future__ import annotations

from typing import Any

from distset.noise import Fading

__all__ = ["FadingMargin"]


class FadingMargin:
    """A part of tasks with a strategy or an estimator ``grad``: what `fit` tells them, they tell a margin that fades."""

    grad: Any

    def progress(self, share: float) -> None:
        """A ``share`` of the planned steps, from 0 to below 1, is done."""
        margin = getattr(getattr(self.grad, "strategy", self.grad), "margin", None)
        if isinstance(margin, Fading):
            margin.progress(share)
