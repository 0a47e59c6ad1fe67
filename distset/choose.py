"""From the mean field to a subset: by threshold, by size (known or predicted), by greedy ascent of F; and how good it is.

Which rule a figure used decides what it means: every published Jaccard index took the *true* size of S*. A `Choice` names
its rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distset.gains import gains_at
from distset.metrics import jaccard
from distset.offers import check_elements
from distset.set_functions import SetFunction

__all__ = ["Choice", "by_greedy", "by_size", "by_threshold", "overlap"]


class Choice(NamedTuple):
    """Predicted subsets, bool ``(*, N)``, and the rule they were chosen by."""

    chosen: Tensor
    rule: str


def by_threshold(logits: Tensor, threshold: float = 0.5, mask: Tensor | None = None) -> Choice:
    """The elements whose psi is at least ``threshold``.

    Raises:
        ValueError: for a threshold outside (0, 1), logits that are NaN.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: got {threshold}, wanted a probability between 0 and 1")
    _check_logits(logits, mask)
    chosen = torch.sigmoid(logits) >= threshold
    return Choice(chosen if mask is None else chosen & mask, f"psi >= {threshold:g}")


def by_size(logits: Tensor, size: Tensor | int | None = None, mask: Tensor | None = None) -> Choice:
    """The ``size`` elements of largest psi; ties go to the earlier element.

    Args:
        logits: ``(*, N)``.
        size: of each subset, ``(*)`` or one number; None for the expected size, the rounded sum of psi (at least 1).
        mask: bool ``(*, N)``, False at padding.

    Raises:
        ValueError: for sizes below 0 or above the number of elements, logits that are NaN.

    Example:
        >>> import torch
        >>> from distset.choose import by_size
        >>> logits = torch.tensor([[2.0, -1.0, 0.5, -3.0]])
        >>> by_size(logits, 2)
        Choice(chosen=tensor([[ True, False,  True, False]]), rule='top psi, size known')
        >>> by_size(logits, 2, mask=torch.tensor([[True, True, False, True]])).chosen
        tensor([[ True,  True, False, False]])
        >>> by_size(logits)  # psi is .88, .27, .62, .05
        Choice(chosen=tensor([[ True, False,  True, False]]), rule='top psi, size predicted')
    """
    _check_logits(logits, mask)
    offered = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    if size is None:
        psi = torch.sigmoid(logits).masked_fill(~offered, 0.0)
        wanted, rule = psi.sum(-1, dtype=torch.float64).round().clamp_min(1).long(), "top psi, size predicted"
    else:
        wanted, rule = torch.as_tensor(size, device=logits.device).expand(logits.shape[:-1]), "top psi, size known"
    _check_size(wanted, offered)
    order = logits.masked_fill(~offered, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    # Padding goes last, behind elements whose logit is -inf as well.
    order = order.gather(-1, offered.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(logits.shape[-1], device=order.device).expand_as(order))
    return Choice(rank < wanted.unsqueeze(-1), rule)


def by_greedy(
    utility: SetFunction, elements: Tensor, size: Tensor | int | None = None, mask: Tensor | None = None
) -> Choice:
    """Greedy ascent of F from the empty set: the best element goes in, while it gains anything or up to ``size``.

    Args:
        utility: F.
        elements: ``(*, N, *element)``.
        size: of each subset ``(*)`` or one number; None to stop where no element gains.
        mask: bool ``(*, N)``, False at padding.

    Raises:
        ValueError: for features that are not finite, gains that are NaN, sizes below 0 or above the number of elements.

    Example:
        >>> import torch
        >>> from distset.choose import by_greedy
        >>> from distset.set_functions import UserUtility
        >>> covered = UserUtility(lambda elements, subsets: (subsets @ elements).clamp(max=1).sum(-1))
        >>> offer = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> by_greedy(covered, offer)  # the first element adds nothing to the others
        Choice(chosen=tensor([False,  True,  True]), rule='greedy ascent of F')
        >>> by_greedy(covered, offer, size=1).chosen
        tensor([False,  True, False])
    """
    check_elements(elements, mask, getattr(utility, "element_ndim", 1))
    shape = elements.shape[: elements.dim() - getattr(utility, "element_ndim", 1)]
    offered = torch.ones(shape, dtype=torch.bool, device=elements.device) if mask is None else mask
    chosen = torch.zeros_like(offered)
    wanted = None if size is None else torch.as_tensor(size, device=elements.device).expand(shape[:-1])
    if wanted is not None:
        _check_size(wanted, offered)
    with torch.no_grad():
        gains_of = gains_at(utility, elements, mask)
        for count in range(shape[-1]):
            gains = gains_of(chosen.unsqueeze(-2)).squeeze(-2)
            best = gains.masked_fill(chosen | ~offered, -torch.inf).max(-1)
            if bool(best.values.isnan().any()):
                raise ValueError(
                    f"utility: {type(utility).__name__} has gains that are NaN with {count} elements chosen, wanted numbers "
                    f"to compare; look at its parameters, and for infinite values of F"
                )
            grow = best.values > (0.0 if wanted is None else -torch.inf)
            if wanted is not None:
                grow = grow & (count < wanted)
            if not bool(grow.any()):
                break
            chosen = chosen | (torch.nn.functional.one_hot(best.indices, shape[-1]).bool() & grow.unsqueeze(-1))
    return Choice(chosen, "greedy ascent of F" + ("" if size is None else ", size known"))


def _check_logits(logits: Tensor, mask: Tensor | None) -> None:
    if bad := int((logits.isnan() if mask is None else logits.isnan() & mask).sum()):
        raise ValueError(f"logits: {bad} of {logits.numel()} are NaN, wanted numbers; look at what they were computed from")


def _check_size(wanted: Tensor, offered: Tensor) -> None:
    if bool((wanted < 0).any()) or bool((wanted > offered.sum(-1)).any()):
        raise ValueError(f"size: got {int(wanted.min())} to {int(wanted.max())}, wanted 0 to the elements of each offer")


def overlap(chosen: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Jaccard index, precision, recall and F1 of each subset, bool ``(*, N)`` against S*: ``(*)`` each.

    A precision of nothing chosen is 0.
    """
    both = (chosen & truth).sum(-1)
    precision = both / chosen.sum(-1).clamp_min(1)
    recall = both / truth.sum(-1).clamp_min(1)
    f1 = 2 * both / (chosen.sum(-1) + truth.sum(-1)).clamp_min(1)
    return {"jaccard": jaccard(chosen, truth), "precision": precision, "recall": recall, "f1": f1}
