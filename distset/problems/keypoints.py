"""Pairs of point clouds to match: made ones under noise, turning and outliers, and a file of real keypoints."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distset.seeds import generator_for
from distset.sets import InMemory
from distset.train import Example, Parts

__all__ = ["clouds", "draw_clouds", "keypoints"]


def clouds(
    pairs: tuple[int, int, int] = (2000, 500, 500), *, n: int = 10, outliers: int = 5, noise: float = 0.05, seed: int = 0
) -> Parts:
    """Made pairs to train, validate and test on; see `draw_clouds`."""
    made = [draw_clouds(count, n, outliers, noise, 3 * seed + part) for part, count in enumerate(pairs)]
    return _parts(made, {"n": n, "features": 0})


def draw_clouds(count: int, n: int, outliers: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points ``(count, n + m, 2)`` with m = n + outliers, and true matches ``(count, n, m)``.

    The second cloud is the first one turned by any angle, each point moved by ``noise``, outliers added, all shuffled.
    """
    if n < 2 or outliers < 0 or noise < 0:
        raise ValueError(
            f"n, outliers, noise: got {n}, {outliers}, {noise}, wanted n of 2 or more and the others at least 0"
        )
    generator = generator_for(seed, "clouds", n, outliers)
    first = torch.rand(count, n, 2, generator=generator) * 2 - 1
    angle = torch.rand(count, 1, generator=generator) * 2 * torch.pi
    turn = torch.stack([torch.cat([angle.cos(), -angle.sin()], -1), torch.cat([angle.sin(), angle.cos()], -1)], -2)
    moved = first @ turn.transpose(-1, -2) + noise * torch.randn(count, n, 2, generator=generator)
    second = torch.cat([moved, torch.rand(count, outliers, 2, generator=generator) * 2 - 1], 1)
    order = torch.rand(count, n + outliers, generator=generator).argsort(-1)
    second = second.gather(1, order.unsqueeze(-1).expand_as(second))
    match = torch.arange(n)[:, None] == order.unsqueeze(1)
    return torch.cat([first, second], 1), match.float()


def keypoints(path: str, *, shares: tuple[float, float] = (0.6, 0.2), seed: int = 0) -> Parts:
    """Keypoints of images from an ``npz``: ``first (P, n, 2 + F)``, ``second (P, m, 2 + F)``, ``match (P, n)``: which point
    of the second is which of the first.

    Coordinates are scaled to [-1, 1] within each cloud; the features, if any, are taken as they are.

    Raises:
        ValueError: for missing arrays, shapes that do not fit, points that are not finite, matches out of range, several
            points matched to one.
    """
    with np.load(path, allow_pickle=False) as file:
        if missing := {"first", "second", "match"} - set(file.files):
            raise ValueError(f"path: {path} has no array {sorted(missing)}, wanted first, second, match")
        first, second, match = (torch.from_numpy(file[name]) for name in ("first", "second", "match"))
    _check_arrays(path, first, second, match)
    points = torch.cat([_scaled(first.float()), _scaled(second.float())], 1)
    wanted = torch.nn.functional.one_hot(match.long(), second.shape[1]).float()
    order = torch.randperm(len(points), generator=generator_for(seed, "keypoints"))
    cuts = [int(shares[0] * len(order)), int(sum(shares) * len(order))]
    made = [(points[own], wanted[own]) for own in order.tensor_split(cuts)]
    return _parts(made, {"n": first.shape[1], "features": first.shape[2] - 2})


def _check_arrays(path: str, first: Tensor, second: Tensor, match: Tensor) -> None:
    shapes = [tuple(array.shape) for array in (first, second, match)]
    fit = len(shapes[0]) == len(shapes[1]) == 3 and shapes[0][::2] == shapes[1][::2] and match.shape == first.shape[:2]
    if not fit or first.shape[1] > second.shape[1] or first.shape[2] < 2:
        raise ValueError(
            f"path: {path} has shapes {', '.join(map(str, shapes))}, wanted (P, n, 2 + F), (P, m, 2 + F) with m >= n, as "
            "many pairs and as wide, and (P, n)"
        )
    for name, points in (("first", first), ("second", second)):
        if not points.isfinite().all():
            bad = int((~points.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"path: {path} has points of {name} in pair {bad} that are NaN or infinite; leave that pair out"
            )
    if not bool(((match >= 0) & (match < second.shape[1]) & (match == match.long())).all()):
        raise ValueError(
            f"path: {path} matches points from {match.min()} to {match.max()}, wanted 0 to {second.shape[1] - 1}, whole "
            "numbers"
        )
    twice = (match.sort(1).values.diff(dim=1) == 0).any(1)
    if twice.any():
        bad = int(twice.nonzero()[0])
        raise ValueError(f"path: {path} matches {match[bad].tolist()} in pair {bad}, wanted each point of the second once")


def _scaled(points: Tensor) -> Tensor:
    places, rest = points[..., :2], points[..., 2:]
    low, high = places.amin(1, keepdim=True), places.amax(1, keepdim=True)
    width = (high - low).amax(-1, keepdim=True).clamp_min(1e-12)
    return torch.cat([2 * (places - (low + high) / 2) / width, rest], -1)


def _parts(made: list[tuple[Tensor, Tensor]], facts: dict[str, int]) -> Parts:
    train, val, test = (
        [
            Example(InMemory(points[i : i + group], name=f"pairs-{i}"), match[i : i + group])
            for i in range(0, len(points), group)
        ]
        for (points, match), group in zip(made, (1, 100, 100))
    )
    return Parts(train, val, test, facts)
