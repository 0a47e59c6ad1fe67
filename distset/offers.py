"""Offers and what was chosen from them: positions as masks, and pairs that teach nothing refused at the edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Offers", "check_elements", "check_offer", "check_places", "check_positions", "membership"]


class Offers(NamedTuple):
    """Many pairs (V, S*) of one size.

    Attributes:
        elements: ``(B, N, *element)``.
        chosen: bool ``(B, N)``, True in S*.
        mask: bool ``(B, N)``, False at padding; None without.
        rule: how the rest of each offer came about, for every result made with it.

    Example:
        >>> import torch
        >>> from distset.offers import Offers, check_offer, membership
        >>> elements = torch.tensor([[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], [[6.0, 7.0], [8.0, 9.0], [0.0, 0.0]]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> offers = Offers(elements, membership([[0, 2], [1]], size=3), mask, rule="seen together")
        >>> offers.chosen
        tensor([[ True, False,  True],
                [False,  True, False]])
        >>> check_offer(offers.elements, offers.chosen, offers.mask)
    """

    elements: Tensor
    chosen: Tensor
    mask: Tensor | None = None
    rule: str = ""


def membership(ids: Sequence[Sequence[int]], size: int) -> Tensor:
    """Chosen positions as bool ``(B, size)``.

    Raises:
        ValueError: for ids outside of the offer or named twice.
    """
    chosen = torch.zeros(len(ids), size, dtype=torch.bool)
    for row, own in enumerate(ids):
        if bad := [i for i in own if not 0 <= i < size]:
            raise ValueError(f"ids: set {row} has chosen {bad[0]}, wanted positions 0 to {size - 1} of the offer")
        if len(set(own)) != len(own):
            raise ValueError(f"ids: set {row} names an element twice; a subset holds each once")
        chosen[row, list(own)] = True
    return chosen


def check_offer(elements: Tensor, chosen: Tensor, mask: Tensor | None = None, *, element_ndim: int = 1) -> None:
    """Refuse pairs (V, S*) that teach nothing or lie: see Raises.

    Raises:
        ValueError: for a chosen tensor that is no bool ``(*, N)``, an offer of one element, an S* that is empty, is all of
            V, or has elements in the padding, features that are not finite.
    """
    check_elements(elements, mask, element_ndim)
    shape = elements.shape[: elements.dim() - element_ndim]
    if chosen.dtype != torch.bool or chosen.shape != shape:
        raise ValueError(f"chosen: got {chosen.dtype} {tuple(chosen.shape)}, wanted torch.bool {tuple(shape)}, True in S*")
    offered = torch.ones_like(chosen) if mask is None else mask
    if bool((chosen & ~offered).any()):
        raise ValueError(f"chosen: set {_first(chosen & ~offered)} has chosen elements that are not offered (padding)")
    if bool((offered.sum(-1) < 2).any()):
        raise ValueError(f"elements: offer {_first(offered.sum(-1) < 2)} has one element, wanted at least 2 to choose from")
    if bool((chosen.sum(-1) == 0).any()):
        raise ValueError(f"chosen: set {_first(chosen.sum(-1) == 0)} has chosen nothing; drop sets with an empty S*")
    if bool(((chosen & offered).sum(-1) == offered.sum(-1)).any()):
        raise ValueError(
            f"chosen: set {_first((chosen & offered).sum(-1) == offered.sum(-1))} has chosen all that is offered; drop sets "
            f"with S* = V, or offer more"
        )


def check_positions(chosen: Tensor, size: int) -> None:
    """Refuse an S* that is no int64 positions ``(K)`` in an offer of ``size`` elements, each once, some and not all."""
    if chosen.dtype == torch.int64 and chosen.dim() == 1 and not 0 < len(chosen) < size:
        raise ValueError(f"chosen: got {len(chosen)} of {size} elements, wanted at least 1 and not all")
    check_places("chosen", chosen, size)


def check_places(name: str, places: Tensor, size: int) -> None:
    """Refuse what is no int64 positions ``(K)`` among ``size`` elements, each once and at least one."""
    if places.dtype != torch.int64 or places.dim() != 1:
        raise ValueError(
            f"{name}: got {places.dtype} {tuple(places.shape)}, wanted positions as one int64 tensor (K); of a bool mask "
            f"they are mask.nonzero().squeeze(-1)"
        )
    if not len(places):
        raise ValueError(f"{name}: got no positions, wanted at least 1 of the {size} elements")
    if int(places.min()) < 0 or int(places.max()) >= size:
        raise ValueError(f"{name}: got positions {int(places.min())} to {int(places.max())}, wanted 0 to {size - 1}")
    if len(places.unique()) != len(places):
        raise ValueError(f"{name}: names an element twice; a subset holds each once")


def check_elements(elements: Tensor, mask: Tensor | None, element_ndim: int = 1) -> None:
    """Refuse features that are not finite and masks that do not fit."""
    shape = elements.shape[: elements.dim() - element_ndim]
    if len(shape) < 1 or elements.numel() == 0:
        raise ValueError(
            f"elements: got shape {tuple(elements.shape)}, wanted (*, N, ...) with {element_ndim} dimensions each"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise ValueError(f"mask: got {mask.dtype} {tuple(mask.shape)}, wanted torch.bool {tuple(shape)}, False at padding")
    finite = elements.isfinite() if element_ndim == 0 else elements.isfinite().flatten(-element_ndim).all(-1)
    if bad := int((~finite).sum()):
        raise ValueError(f"elements: {bad} of {finite.numel()} have features that are NaN or infinite; clean or drop them")


def _first(where: Tensor) -> int:
    flat = where if where.dim() < 2 else where.flatten(1).any(-1)
    return int(flat.reshape(-1).nonzero()[0])
