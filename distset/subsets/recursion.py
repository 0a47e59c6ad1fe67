r"""Exact sampling from many small sets: one element after another, by a table of prefix count pmfs.

With :math:`T_i(c)` the probability that c of the first i elements are in (tilted, independent), the last of i elements of
which c are in is itself in with probability :math:`p_i T_{i-1}(c - 1) / T_i(c)`. A table costs O(n k), a sample O(n) steps
of a few operations, each over all samples and rows at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distset.subsets.keyed import keyed_uniform

__all__ = ["CountTable"]

# Draws made at once: 2^18 numbers of 8 bytes.
DRAWS = 2**18


class CountTable:
    """The conditional inclusion probabilities of ``logits (B, N)`` under ``tilt (B,)``, for counts up to ``max(k)``."""

    def __init__(self, logits: Tensor, tilt: Tensor, k: Tensor) -> None:
        a = logits + tilt.unsqueeze(-1)
        p, q = torch.sigmoid(a).T.unsqueeze(-1), torch.sigmoid(-a).T.unsqueeze(-1)  # (N, B, 1)
        self.n, rows, width = len(p), len(k), int(k.max()) + 1
        self.k, self.width = k, width
        table = logits.new_zeros(self.n, rows, width)
        prefix = logits.new_zeros(rows, width)
        prefix[:, 0] = 1
        for i in range(self.n):
            taken = p[i] * prefix[:, :-1]
            prefix = q[i] * prefix
            prefix[:, 1:] += taken
            # Where the prefix is 0 no sample ever arrives.
            torch.div(taken, prefix[:, 1:].clamp_min(torch.finfo(taken.dtype).tiny), out=table[i, :, 1:])
        self.table = table.view(self.n, -1)

    def sample(self, samples: Tensor, seed: int) -> Tensor:
        """The samples numbered ``samples (S,)``: bool ``(S, B, N)``."""
        rows = torch.arange(len(self.k), device=self.k.device)
        stream = samples.repeat_interleave(len(rows)), rows.repeat(len(samples))
        place = rows * self.width
        place = (place + self.k).repeat(len(samples))
        chosen = torch.empty(self.n, len(place), dtype=torch.bool, device=place.device)
        block = max(1, DRAWS // len(place))
        for start in range(self.n - 1, -1, -block):
            elements = torch.arange(max(0, start - block + 1), start + 1, device=place.device)
            uniform = keyed_uniform(seed, *stream, elements.unsqueeze(-1))
            for i in range(len(elements) - 1, -1, -1):
                element = int(start - len(elements) + 1 + i)
                torch.lt(uniform[i], self.table[element].index_select(0, place), out=chosen[element])
                place = place - chosen[element].long()
        return chosen.T.reshape(len(samples), len(rows), self.n)
