"""Random numbers that are a function of their key, not of the order in which they are drawn.

A draw at a node of a sampling tree depends on (seed, row, sample, level, position) alone, so whoever holds the node draws
the same number: samples do not depend on how elements are spread over chunks or workers.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

__all__ = ["keyed_uniform"]


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def keyed_uniform(seed: int, *keys: Tensor | int) -> Tensor:
    """Uniform float64 numbers in [0, 1), one for each broadcast tuple of integer keys.

    The keys are absorbed one by one into SplitMix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
    number generators"). The 52 bits leave ``u * total < total`` for every positive total.

    Example:
        >>> import torch
        >>> both = keyed_uniform(1, torch.arange(4), 7)
        >>> bool((both[2:] == keyed_uniform(1, torch.arange(2, 4), 7)).all())
        True
    """
    state = reduce(_absorb, keys, torch.tensor(seed))
    return ((_mix(state) >> 12) & (2**52 - 1)).double() * 2.0**-52


def _absorb(state: Tensor, key: Tensor | int) -> Tensor:
    if isinstance(key, Tensor):
        state = state.to(key.device)
    return _mix(state + GOLDEN) ^ (torch.as_tensor(key) * MIX_2 + GOLDEN)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own carries the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
