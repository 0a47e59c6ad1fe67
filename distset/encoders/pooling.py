"""Pooling in the precision of states: products, softmax and maximum of one chunk's elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distset.kernels import HALVES, wide_product
from distset.sets import Chunk
from distset.states import Max, Softmax

__all__ = [
    "accumulable",
    "check_in",
    "check_width",
    "max_state",
    "softmax_state",
    "streamed_fits",
    "streamed_softmax_state",
    "wide",
]


def accumulable(x: Tensor) -> Tensor:
    """States are float32, or float64 where the inputs are."""
    return x if x.dtype == torch.float64 else x.float()


def wide(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the precision of states, whatever autocast would do: logits and sums must not be rounded to halves."""
    if b.is_cuda and b.dtype in HALVES:
        return wide_product(a, b)
    if not torch.is_autocast_enabled(a.device.type):
        return accumulable(a) @ accumulable(b)
    with torch.autocast(a.device.type, enabled=False):
        return accumulable(a) @ accumulable(b)


def softmax_state(log_weights_KN: Tensor, values_ND: Tensor, mask: Tensor | None, normalize: bool) -> Softmax:
    """The softmax state of values under weights given by their logarithms; unnormalised weights keep a shift of 0."""
    if mask is not None:
        log_weights_KN = log_weights_KN.masked_fill(~mask.unsqueeze(-2), -torch.inf)
        values_ND = values_ND.masked_fill(~mask.unsqueeze(-1), 0.0)
    shift = log_weights_KN.detach().amax(-1, keepdim=True)
    shift = shift.clamp_min(torch.finfo(shift.dtype).min) if normalize else torch.zeros_like(shift)
    if torch.is_grad_enabled() or log_weights_KN.dtype != shift.dtype:
        weights_KN = torch.exp(log_weights_KN - shift)
    else:  # a sweep owns its logits: no second and third tensor of their size
        weights_KN = log_weights_KN.sub_(shift).exp_()
    return Softmax(wide(weights_KN, values_ND), weights_KN.sum(-1, keepdim=True), shift)


def streamed_fits(keys_KD: Tensor, x_ND: Tensor) -> bool:
    """Whether `streamed_softmax_state` takes these: matrices on a CPU in the precision of states."""
    precise = x_ND.dtype == keys_KD.dtype and x_ND.dtype in (torch.float32, torch.float64)
    return precise and x_ND.device.type == "cpu" and x_ND.dim() == keys_KD.dim() == 2


def streamed_softmax_state(keys_KD: Tensor, x_ND: Tensor, block: int = 4096) -> Softmax:
    """The softmax state of elements as their own values under ``keys``, without a graph, in blocks that stay in the cache.

    One buffer of logits serves all blocks and sums grow in place. The weights are exp(logit - shift) for *any* shift that
    keeps every slot's mass well inside the range of floats; the state is as exact as with the maximum. So the shift stays
    0, without a look for the maximum, until a slot's mass leaves that range; then it becomes the running maximum.
    """
    logits = x_ND.new_empty(len(keys_KD), min(block, len(x_ND)))
    total, mass = torch.zeros_like(keys_KD), keys_KD.new_zeros(len(keys_KD), 1)
    shift = torch.zeros_like(mass)
    shifted = False
    for x in x_ND.split(block):
        weights = logits if len(x) == logits.shape[1] else torch.empty_like(logits[:, : len(x)])
        torch.mm(keys_KD, x.mT, out=weights)
        if shifted:
            weights.sub_(shift)
        block_mass = weights.exp_().sum(-1, keepdim=True)
        if not _in_range(mass + block_mass):
            torch.mm(keys_KD, x.mT, out=weights)
            top = weights.amax(-1, keepdim=True)
            top = torch.where(mass > 0, torch.maximum(shift, top), top)
            scale = torch.where(mass > 0, torch.exp(shift - top), 0.0)
            total, mass, shift, shifted = total * scale, mass * scale, top, True
            block_mass = weights.sub_(shift).exp_().sum(-1, keepdim=True)
        total.addmm_(weights, x)
        mass.add_(block_mass)
    return Softmax(total, mass, shift)


def _in_range(mass: Tensor) -> bool:
    """Whether masses are far enough from underflow and overflow that neither they nor weighted sums lose anything."""
    low, high = torch.aminmax(mass)
    return bool(low > 1e-18) and bool(high < 1e18)


def max_state(h_ND: Tensor, chunk: Chunk) -> Max:
    if chunk.mask is not None:
        h_ND = h_ND.masked_fill(~chunk.mask.unsqueeze(-1), -torch.inf)
    top = h_ND.amax(-2)
    return Max(top, (h_ND == top.unsqueeze(-2)).sum(-2).to(top.dtype))


def check_in(name: str, value: Any, wanted: tuple[Any, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, wanted))}")


def check_width(elements: Tensor, dim: int) -> None:
    if elements.shape[-1] != dim:
        raise ValueError(
            f"elements: got shape {tuple(elements.shape)}, wanted width {dim}, the encoder's; give features of that "
            f"width, or an encoder of width {elements.shape[-1]}"
        )
