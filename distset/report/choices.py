"""Pictures of what was chosen from an offer, and of how the mean field settles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from distset.report.elements import contact_sheet
from distset.report.plots import COLORS, new_axes, new_figure, save

__all__ = ["plot_chosen_images", "plot_chosen_points", "plot_residuals"]

LEFT_OUT, RIGHT, MISSED, WRONG = "#c8c8c8", "#2f9160", "#d9792b", "#b43a5c"


def plot_chosen_points(points: Tensor, truth: Tensor, found: Tensor, path: Path) -> None:
    """Offers of points in the plane: chosen and found, missed, wrongly found.

    Args:
        points: ``(B, N, 2)``.
        truth, found: bool ``(B, N)``.
        path: of the PNG.
    """
    figure = new_figure(3.4 * len(points), 3.4)
    for index in range(len(points)):
        axes = new_axes(figure, (1, len(points), index + 1))
        kinds = {
            "left out": (~truth & ~found, LEFT_OUT, 12),
            "chosen and found": (truth & found, RIGHT, 30),
            "chosen, missed": (truth & ~found, MISSED, 30),
            "found, not chosen": (~truth & found, WRONG, 30),
        }
        for name, (mask, color, size) in kinds.items():
            own = points[index][mask[index]].numpy()
            axes.scatter(own[:, 0], own[:, 1], s=size, color=color, lw=0, label=name)
        axes.set_aspect("equal", adjustable="datalim")
        if index == 0:
            axes.legend(fontsize=7.5, frameon=False)
    save(figure, path)


def plot_chosen_images(images: Tensor, truth: Tensor, found: Tensor, path: Path) -> None:
    """Offers of images, a group each: what was chosen and what was found.

    Args:
        images: ``(B, N, C, H, W)`` in 0..1.
        truth, found: bool ``(B, N)``.
        path: of the PNG.
    """
    words = {(True, True): "chosen, found", (True, False): "chosen, missed", (False, True): "found, not chosen"}
    rows = []
    for index in range(len(images)):
        patches = (images[index].clamp(0, 1) * 255).byte().numpy()
        pairs = zip(truth[index].tolist(), found[index].tolist(), strict=True)
        rows.append((f"offer {index + 1}", patches, [words.get(pair, "") for pair in pairs]))
    contact_sheet(path, rows, title="the odd ones out: chosen and found", columns=images.shape[1])


def plot_residuals(residuals: Tensor, path: Path) -> None:
    """The residual of the mean field by iteration, each offer and their median.

    Args:
        residuals: ``(iterations, B)``.
        path: of the PNG.
    """
    figure = new_figure(5.6, 3.6)
    axes = new_axes(figure, (1, 1, 1))
    steps, values = np.arange(1, len(residuals) + 1), residuals.clamp_min(1e-16).numpy()
    axes.semilogy(steps, values, color=LEFT_OUT, lw=0.7)
    axes.semilogy(steps, np.median(values, 1), color=COLORS[0], lw=2, label="median offer")
    axes.set_xlabel("iteration")
    axes.set_ylabel("residual (root mean square)")
    axes.legend(frameon=False)
    save(figure, path)
