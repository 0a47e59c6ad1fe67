"""Completed images side by side with what was given, and how sure the model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distset.report.set_figures import plot_completions
from distset.train import Example

__all__ = ["draw_completions"]


@torch.no_grad()
def draw_completions(task: Any, examples: Sequence[Example], path: Path, *, images: int = 6) -> None:
    """A row for each of the first images: the image; context, mean and deviation for the smallest and largest context.

    Args:
        task: a `distset.tasks.completion.CompletionTask`, its model in eval mode.
        examples: groups of contexts, of several sizes each on the same images.
        path: of the PNG; not written without examples.
    """
    if not examples:
        return
    sizes = sorted({example.target.context for example in examples})
    shown = [next(e for e in examples if e.target.context == size) for size in sorted({sizes[0], sizes[-1]})]
    count = min(images, len(shown[0].target.values))
    columns, grid = ["image"], [shown[0].target.values[:count]]
    for example in shown:
        mean, deviation = task.predict(example.set).chunk(2, -1)
        columns += [f"{example.target.context} pixels", "mean", "deviation x 2"]
        grid += [_context_image(task.shape, example), mean, (2 * deviation).mean(-1, keepdim=True)]
    rows = [[_image(task.shape, column[row]) for column in grid] for row in range(count)]
    plot_completions(rows, columns, path)


def _image(shape: Sequence[int], pixels: Tensor) -> Tensor:
    """Pixels ``(H W, C)`` as ``(H, W)`` or ``(H, W, C)``."""
    image = pixels.view(*shape[:2], -1)
    return image.squeeze(-1)


def _context_image(shape: Sequence[int], example: Example) -> Tensor:
    """The context's pixels ``(B, H W, C)``, nan where none is given."""
    context = example.set.whole().elements
    scale = torch.tensor([shape[0] - 1, shape[1] - 1]) / 2
    row, column = ((context[..., :2] + 1) * scale).round().long().unbind(-1)
    given = torch.full_like(example.target.values, torch.nan)
    place = (row * shape[1] + column).unsqueeze(-1).expand(*row.shape, given.shape[-1])
    return given.scatter(1, place, context[..., 2:])
