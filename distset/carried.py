"""What a model learns without gradients, kept alike on all processes: slopes, strengths and other buffers written to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distset.world import World

__all__ = ["Carried"]


class Carried:
    r"""The saved buffers of a model's modules, some of which are written to while sets are worked on.

    A process writes to its own copy, by the sets that fell to it. After a step each buffer becomes

    .. math:: \frac{1}{|W|} \sum_{w \in W} b_w,

    the mean over the teams W that wrote to its module: all go on from the same, which is what a checkpoint holds. What
    nobody wrote to keeps its bits and does not travel.

    Args:
        model: with all its modules; what a step writes to is found by the versions of its tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(module, sorted(set(module._buffers) - module._non_persistent_buffers_set)) for module in model.modules()]
        self.owners = [(module, names) for module, names in named if names]
        self.watch()

    def watch(self) -> None:
        """What is written from here on counts."""
        self.before = [[(buffer, buffer._version) for buffer in buffers] for buffers in self._buffers()]

    def written(self) -> list[bool]:
        """For each module, whether a buffer of it was written to, or replaced."""
        # A module's buffers count together: kernels such as BatchNorm's write to some without a new version.
        return [
            any(now is not then or now._version != version for now, (then, version) in zip(buffers, before))
            for buffers, before in zip(self._buffers(), self.before)
        ]

    def agree(self, world: World, writers: Sequence[float]) -> None:
        """Make the buffers alike, given how many teams wrote to those of each module; a collective where any did."""
        if world.size == 1 or not any(writers):
            return
        of_modules = zip(self._buffers(), self.written(), writers)
        found = [(buffer, mine, count) for buffers, mine, count in of_modules if count for buffer in buffers]
        totals = [buffer.double() if mine else torch.zeros_like(buffer, dtype=torch.float64) for buffer, mine, _ in found]
        world.add_up(totals)
        for (buffer, _, count), total in zip(found, totals):
            buffer.copy_(total / count)

    def _buffers(self) -> list[list[Tensor]]:
        found = [[module._buffers[name] for name in names] for module, names in self.owners]
        return [[buffer for buffer in buffers if buffer is not None] for buffers in found]
