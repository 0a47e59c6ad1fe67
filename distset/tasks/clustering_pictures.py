"""Pictures of amortized clustering: sets with the mixtures found, and what is found while a set streams in."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from distset.encoders import ChunkEncoder
from distset.report.set_figures import Curve, MixturePanel, plot_lines, plot_mixtures
from distset.sets import InMemory
from distset.tasks.clustering import Truth, negative_log_likelihood, to_mixture
from distset.tasks.set_models import SetModel
from distset.tasks.streams import STREAMS, encodings, stream
from distset.train import Example

__all__ = ["draw_clusterings", "draw_streams"]


@torch.no_grad()
def draw_clusterings(model: SetModel, example: Example, path: Path, *, sets: int = 8) -> None:
    """The first sets of a group with the predicted mixtures."""
    truth: Truth = example.target
    few = Truth(truth.points[:sets], truth.labels[:sets])
    raw = model(InMemory(few.points, bounds=_bounds(example)), seed=0)
    losses = negative_log_likelihood(to_mixture(raw), few.points)
    titles = [f"NLL {loss:.2f}" for loss in losses.tolist()]
    plot_mixtures([_panel(*of) for of in zip(raw, few.points, few.labels, titles)], path)


@torch.no_grad()
def draw_streams(model: SetModel, example: Example, folder: Path, *, place: int = 0) -> None:
    """One set in the four streaming settings: what is found after a part of the pieces, and the NLL of the whole set after
    every piece (figures 2 and 8)."""
    points, labels = example.target.points[place], example.target.labels[place]
    encoder = cast(ChunkEncoder, model.encoder)  # of one sweep
    panels: dict[tuple[int, str], MixturePanel] = {}
    curves = []
    for name in STREAMS:
        pieces = stream(name, labels)
        stops = [max(1, len(pieces) // 16), max(1, len(pieces) // 2), len(pieces)]
        losses, seen, share = [], torch.zeros(len(points), dtype=torch.bool), []
        for count, encoding in enumerate(encodings(encoder, points, pieces), 1):
            raw = model.head(encoding.unsqueeze(0))[0]
            losses.append(float(negative_log_likelihood(to_mixture(raw), points)))
            seen[pieces[count - 1]] = True
            share.append(float(seen.double().mean()))
            for row, stop in enumerate(stops):
                if count == stop:
                    title = f"{name}: {int(seen.sum())} points, NLL {losses[-1]:.2f}"
                    panels[row, name] = _panel(raw, points, labels, title)._replace(seen=seen.numpy().copy())
        curves.append(Curve(name, share, losses))
    plot_mixtures([panels[row, name] for row in range(3) for name in STREAMS], folder / "streams.png")
    top = curves[0].y[-1] + 3  # the first points alone say little, at any height
    x, y = "share of the set that has come", "NLL per point of the whole set"
    plot_lines(curves, folder / "streams_nll.png", x=x, y=y, top=top)


def _panel(raw: Tensor, points: Tensor, labels: Tensor, title: str) -> MixturePanel:
    mixture = to_mixture(raw)
    return MixturePanel(points, labels, mixture.weight, mixture.mean, mixture.variance, title)


def _bounds(example: Example) -> list[int]:
    assert isinstance(example.set, InMemory)
    return example.set.bounds
