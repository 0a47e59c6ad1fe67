"""Globe tours as published: combinations of k flags, and the shortest round trip through their capitals.

References:
    Vlastelica et al. 2020, https://arxiv.org/abs/1912.02175 (section 4.2: 100 countries, 10,000 and 1,000 combinations).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distset.seeds import generator_for
from distset.sets import InMemory
from distset.solve import solve
from distset.solvers.base import Solver
from distset.solvers.tour import Tour
from distset.task import LazyExamples
from distset.tasks.globe_tsp import chords
from distset.train import Example, Parts

__all__ = ["Combinations", "Globe", "globe"]


class Globe(NamedTuple):
    """Flags ``(C, 3, H, W)`` in 0..1, and where the capitals lie: on the unit sphere ``(C, 3)``, in degrees ``(C, 2)``."""

    flags: Tensor
    points: Tensor
    lonlat: Tensor

    @staticmethod
    def read(path: str | Path, countries: int | None = 100, seed: int = 0) -> Globe:
        """From an ``npz`` with ``flags`` uint8 ``(N, H, W, 3)`` and ``lonlat`` in degrees ``(N, 2)``; ``countries`` of
        them, drawn by ``seed``. Of countries with one flag (such as a country and its territories), which no network can
        tell apart, the first one is taken.

        Raises:
            ValueError: for a file without these arrays, arrays of other shapes, places that are not finite, fewer than 3
                ``countries`` or more than there are flags.
        """
        with np.load(path) as file:
            missing = {"flags", "lonlat"} - set(file.files)
            if missing:
                raise ValueError(f"path: {path} has no array {sorted(missing)}, wanted flags (N, H, W, 3) and lonlat (N, 2)")
            flags, lonlat = torch.from_numpy(file["flags"]), torch.from_numpy(file["lonlat"]).double()
        _check_arrays(path, flags, lonlat)
        own = _first_of_each(flags)
        flags, lonlat = flags[own], lonlat[own]
        if countries is not None and not 3 <= countries <= len(flags):
            raise ValueError(
                f"countries: got {countries}, wanted at least 3 and at most {len(flags)}, the different flags in {path}; "
                "None takes them all"
            )
        picked = torch.randperm(len(flags), generator=generator_for(seed, "countries"))[:countries]
        longitude, latitude = lonlat[picked].deg2rad().T
        points = [latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()]
        return Globe(
            flags[picked].permute(0, 3, 1, 2).float() / 255, torch.stack(points, -1).float(), lonlat[picked].float()
        )

    def combinations(self, count: int, k: int, seed: int) -> Tensor:
        """``count`` draws of ``k`` different countries, ``(count, k)``.

        Raises:
            ValueError: for fewer than 3 cities a tour, or more than there are countries.
        """
        if not isinstance(k, (int, np.integer)) or not 3 <= k <= len(self.flags):
            raise ValueError(
                f"k: got {k}, wanted a whole number of at least 3 and at most {len(self.flags)}, the number of countries; "
                "make the tours shorter or take more countries"
            )
        keys = torch.rand(count, len(self.flags), generator=generator_for(seed, "combinations", k))
        return keys.argsort(-1)[:, :k]

    def tours(self, countries: Tensor, solver: Solver | None = None) -> Tensor:
        """The true tours ``(B, k, k)`` of combinations ``(B, k)``."""
        return solve(chords(self.points[countries]), Tour() if solver is None else solver)


class Combinations(LazyExamples):
    """Combinations of countries as examples, ``group`` in each: flags ``(group, k, 3, H, W)``, their numbers and tours."""

    def __init__(self, globe: Globe, countries: Tensor, tours: Tensor, group: int = 1) -> None:
        self.globe, self.countries, self.tours, self.group = globe, countries, tours, group

    def __len__(self) -> int:
        return -(-len(self.countries) // self.group)

    def example(self, index: int) -> Example:
        own = slice(index * self.group, (index + 1) * self.group)
        flags = self.globe.flags[self.countries[own]]
        return Example(InMemory(flags, element_ndim=3, name=f"combination-{index}"), (self.countries[own], self.tours[own]))


def globe(
    path: str, *, k: int = 5, combinations: tuple[int, int, int] = (10_000, 1000, 1000), countries: int | None = 100,
    corrupted: float = 0.0, seed: int = 0,
) -> Parts:  # fmt: skip
    """Parts of the globe problem from an ``npz`` of flags, see `Globe.read`.

    Args:
        path: of the file.
        k: countries of a tour, at least 3.
        combinations: to train, validate and test on; other combinations of the same countries.
        countries: drawn from the file; None for all.
        corrupted: the share of training tours that are those of another order of the cities (the robustness study).
        seed: of everything.

    Raises:
        ValueError: as in `Globe.read`; for ``k`` out of range, ``corrupted`` that is no share.
    """
    if not 0 <= corrupted <= 1:
        raise ValueError(f"corrupted: got {corrupted}, wanted a share of the training tours, from 0 to 1")
    world = Globe.read(path, countries, seed)
    parts = []
    for part, count in enumerate(combinations):
        drawn = world.combinations(count, k, 3 * seed + part)
        tours = world.tours(drawn)
        if part == 0 and corrupted:
            tours = _corrupt(tours, corrupted, seed)
        parts.append(Combinations(world, drawn, tours, group=1 if part == 0 else 100))
    train, val, test = parts
    return Parts(train, val, test, {"size": tuple(world.flags.shape[2:])})


def _check_arrays(path: str | Path, flags: Tensor, lonlat: Tensor) -> None:
    if flags.ndim != 4 or flags.shape[-1] != 3 or lonlat.shape != (len(flags), 2):
        shapes = f"{tuple(flags.shape)} and lonlat of shape {tuple(lonlat.shape)}"
        raise ValueError(f"path: {path} has flags of shape {shapes}, wanted (N, H, W, 3) and (N, 2), a place for each flag")
    if flags.dtype != torch.uint8:
        raise ValueError(f"path: {path} has flags of {flags.dtype}, wanted torch.uint8, from 0 to 255")
    if not lonlat.isfinite().all():
        bad = int((~lonlat.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"path: {path} has lonlat {lonlat[bad].tolist()} in row {bad}, wanted degrees; leave that flag out")


def _first_of_each(flags: Tensor) -> Tensor:
    """The numbers of the flags ``(N, H, W, 3)`` that differ (RMS) from all before them by .01 of the range or more."""
    flat = flags.flatten(1).float() / 255
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    return (~(apart < 0.01).tril(-1).any(-1)).nonzero().squeeze(-1)


def _corrupt(tours: Tensor, share: float, seed: int) -> Tensor:
    """A share of the tours with their cities in another order."""
    generator = generator_for(seed, "corrupted")
    wrong = torch.rand(len(tours), generator=generator) < share
    order = torch.rand(tours.shape[:2], generator=generator).argsort(-1)
    moved = tours.gather(1, order.unsqueeze(-1).expand_as(tours)).gather(2, order.unsqueeze(1).expand_as(tours))
    return torch.where(wrong[:, None, None], moved, tours)
