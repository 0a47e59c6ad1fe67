r"""The verb `expect`: the mean of a function over k-subsets, with a gradient in their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

from distset.expect.estimator import Estimator, Function, attach_gradient, check_samples
from distset.expect.score import ScoreFunction
from distset.subsets import KSubset
from distset.subsets.distribution import drawn_seed

__all__ = ["expect"]


def expect(
    f: Callable[[Tensor], Any],
    subset: KSubset | Independent,
    num_samples: int,
    *,
    grad: Estimator | None = None,
    seed: int | None = None,
) -> Tensor:
    r"""A Monte-Carlo mean :math:`\frac1S \sum_s f(z_s)` over k-subsets, differentiable in their logits.

    Whatever else f depends on (parameters of a network, the logits again) gets its plain pathwise gradient, where f is a
    torch function of it; the estimator adds what the distribution of z contributes.

    Args:
        f: ``z (S, *, n) -> (S, *)``, a value for each subset; torch, numpy or anything that gives numbers. It must treat
            subsets one by one.
        subset: the distribution, ``*`` its batch. ``Independent(KSubset(logits, k), r)`` is several subsets that f sees
            together: the last r dimensions of the KSubset's batch belong to a draw, ``z (S, *, ..., n) -> (S, *)``.
        num_samples: S.
        grad: `ScoreFunction()` (default: exact samples, unbiased, nothing needed from f), `Simple()`, `GumbelSoftmax(tau)`,
            `IMLE(...)`, `NCPSS(tau)`, `StraightThrough()`.
        seed: names the samples; None draws it from torch's default generator.

    Returns:
        ``(*)``, the mean.

    Raises:
        ValueError: for num_samples below 1 (or below what the estimator needs); a ``grad`` that is no estimator; a seed of
            more than 64 bits; values of f of a wrong shape, not finite or no real numbers; an f without a gradient where the
            estimator needs one.

    Example:
        >>> import torch
        >>> from distset.expect import expect
        >>> from distset.subsets import KSubset
        >>> logits = torch.zeros(6, requires_grad=True)
        >>> cost = torch.arange(6.0)
        >>> mean = expect(lambda z: z @ cost, KSubset(logits, k=3), num_samples=4000, seed=0)
        >>> abs(mean.item() - 7.5) < 0.2
        True
        >>> mean.backward()
        >>> logits.grad.argmin().item(), logits.grad.argmax().item()
        (0, 5)
    """
    base: Any = subset.base_dist if isinstance(subset, Independent) else subset
    joint = subset.reinterpreted_batch_ndims if isinstance(subset, Independent) else 0
    if not isinstance(base, KSubset):
        raise ValueError(f"subset: got {type(base).__name__}, wanted a KSubset(logits, k), or Independent of one")
    count = check_samples(num_samples, 1, "a mean needs a sample")
    estimator = ScoreFunction() if grad is None else grad
    if not isinstance(estimator, Estimator):
        raise ValueError(f"grad: got {grad!r}, wanted an estimator (not its class or name), such as ScoreFunction()")
    mean = estimator(Function(f, joint), base, count, None if seed is None else drawn_seed(seed))
    if not (torch.is_grad_enabled() and base.logits.requires_grad) or bool(base.free.any()):
        return mean
    return attach_gradient(mean, base.logits, torch.zeros_like(base.logits))  # nothing to choose: a gradient of 0, not none
