"""What every gradient through a k-subset is: an `Estimator`, a checked function, a gradient attached to a mean."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distset.subsets import KSubset

__all__ = ["Estimator", "Function", "attach_gradient", "check_samples", "describe"]

NO_GRADIENT = (
    "f: its values carry no gradient in z, which this estimator needs; return a differentiable function of z in "
    "torch, or use ScoreFunction(), which needs nothing from f"
)


class Estimator(ABC):
    """A way to get the gradient of ``E f(z)`` in the logits; what it is and needs is said by its attributes.

    Attributes:
        exact_samples: ``f`` sees samples of the distribution itself.
        unbiased: the mean of the gradient is the gradient of the mean.
        needs_differentiable_f: ``f`` must be differentiable in z (and defined where it is called).
    """

    exact_samples: bool
    unbiased: bool
    needs_differentiable_f: bool

    @abstractmethod
    def __call__(self, f: Function, subset: KSubset, num_samples: int, seed: int | None) -> Tensor:
        """The mean of f, ``(*)``, carrying the gradient."""

    def learned(self) -> nn.ModuleList:
        """What it carries from step to step; a model that holds this saves it with its weights."""
        return nn.ModuleList()


class Function:
    """``f`` with its values checked: ``z (S, *, n) -> (S, *)``, without the last ``joint`` dimensions of ``*``."""

    def __init__(self, f: Callable[[Tensor], Any], joint: int = 0) -> None:
        self.f, self.joint = f, joint

    def __call__(self, z: Tensor) -> Tensor:
        # A black box may write on what it is given; the gradient is made of the samples as they were.
        found = self.f(z if z.requires_grad else z.clone())
        values = _as_values(found, z)
        wanted = z.shape[: -1 - self.joint]
        if values.shape != wanted:
            raise ValueError(
                f"f: returned shape {tuple(values.shape)} for subsets of shape {tuple(z.shape)}, wanted a value for each "
                f"draw: {tuple(wanted)}"
            )
        if not values.is_floating_point():
            values = values.to(z.dtype)
        bad = ~values.isfinite()
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            row = f", row {tuple(where[1:])}" if len(where) > 1 else ""
            raise ValueError(f"f: returned {float(values[tuple(where)])} for sample {where[0]}{row}; wanted finite values")
        return values

    def differentiable(self, z: Tensor) -> Tensor:
        """As a call, where z carries a gradient that f must pass on."""
        values = self(z)
        if z.requires_grad and not values.requires_grad:
            raise ValueError(NO_GRADIENT)
        return values

    def slopes(self, values: Tensor, z: Tensor) -> Tensor:
        """The gradients ``(S, *, n)`` of ``values``, which a call of `differentiable` gave at the leaf ``z``."""
        (slopes,) = torch.autograd.grad(values.sum(), z, retain_graph=True, allow_unused=True)
        if slopes is None:  # a gradient they carry is that of parameters alone
            raise ValueError(NO_GRADIENT)
        return slopes


def _as_values(found: Any, z: Tensor) -> Tensor:
    try:
        values = found if isinstance(found, Tensor) else torch.as_tensor(found, device=z.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"f: returned {type(found).__name__} ({error}), wanted a value for each draw") from error
    if values.is_complex():
        raise ValueError(f"f: returned {values.dtype}, wanted real numbers")
    return values


def check_samples(num_samples: int, least: int, why: str) -> int:
    """The number of samples; raises ValueError where there are fewer than ``least``."""
    try:
        count = -1 if isinstance(num_samples, bool) else operator.index(num_samples)
    except TypeError:
        count = -1
    if count < least:
        raise ValueError(f"num_samples: got {num_samples!r}, wanted at least {least}: {why}")
    return count


def describe(estimators: Sequence[Estimator]) -> list[dict[str, str]]:
    """What estimators are and need, a row each.

    Example:
        >>> from distset.expect import ScoreFunction, Simple, describe
        >>> for row in describe([ScoreFunction(), Simple()]):
        ...     print(row["estimator"], row["exact samples"], row["unbiased"], row["differentiable f"])
        ScoreFunction(Ridge(folds=8)) yes yes not needed
        Simple() yes no needed
    """
    return [
        {
            "estimator": repr(estimator),
            "exact samples": "yes" if estimator.exact_samples else "no",
            "unbiased": "yes" if estimator.unbiased else "no",
            "differentiable f": "needed" if estimator.needs_differentiable_f else "not needed",
        }
        for estimator in estimators
    ]


def attach_gradient(value: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    """``value (*)`` whose derivative in ``logits`` is ``gradient (*, ..., n)``, beside what it already depends on."""
    return _Attached.apply(value, logits, gradient)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.like = logits.shape, logits.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.like
        (gradient,) = ctx.saved_tensors
        aligned = grad.reshape(grad.shape + (1,) * (gradient.dim() - grad.dim()))
        return grad, (aligned * gradient).sum_to_size(shape).to(dtype), None
