"""Binding strengths of drugs and proteins: which of the offered pairs bind best (compound selection).

A table has a row a measured pair: ``drug`` (SMILES), ``target`` (amino acids), ``affinity`` (higher binds stronger, for
example pKd). Both sequences become counts of their letter groups, hashed to a fixed width, or coded letters for a network
that reads them: no chemistry library is needed, and unseen drugs have features too.

References:
    Davis et al. 2011, "Comprehensive analysis of kinase inhibitor selectivity", Nature Biotechnology 29.
    Ou et al. 2022, arXiv:2203.01693 (BindingDB: offers of 300 pairs, the 15 strongest are chosen).
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from distset.offers import Offers
from distset.seeds import generator_for, seed_for

__all__ = ["Affinities", "affinity_offers", "letter_codes", "letter_groups", "read_affinities", "read_davis"]

DRUG_LETTERS = "#%()+-./0123456789=@BCFHINOPS[\\]aceilnors"
"""Of SMILES, as in the published code for BindingDB."""
TARGET_LETTERS = "ACDEFGHIKLMNPQRSTVWY"
"""The amino acids."""
LENGTHS = (100, 1000)
"""Letters of a drug and of a target that are read, as published."""


class Affinities(NamedTuple):
    """Sequences, measured pairs ``(P, 2)`` of positions in them, and the strength of each pair ``(P)``."""

    drugs: list[str]
    targets: list[str]
    pairs: Tensor
    strength: Tensor


def read_affinities(path: str | Path) -> Affinities:
    """A CSV table with the columns ``drug``, ``target``, ``affinity``; repeated pairs are averaged.

    Raises:
        ValueError: for a file that is no text, missing columns, an affinity that is no finite number.
    """
    found: dict[tuple[str, str], list[float]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for pair, strength in _rows(path, file):
                found.setdefault(pair, []).append(strength)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"path: {path} is no table in text ({error}), wanted CSV with the columns drug, target, affinity; a pickle or "
            f"another binary file is exported by the tool that wrote it, for example pandas' to_csv"
        ) from error
    drugs, targets = (sorted({pair[side] for pair in found}) for side in (0, 1))
    where = [{name: i for i, name in enumerate(names)} for names in (drugs, targets)]
    pairs = torch.tensor([[where[0][drug], where[1][target]] for drug, target in found])
    return Affinities(drugs, targets, pairs, torch.tensor([float(np.mean(own)) for own in found.values()]))


def _rows(path: str | Path, file: TextIO) -> Iterator[tuple[tuple[str, str], float]]:
    rows = csv.DictReader(file)
    if missing := {"drug", "target", "affinity"} - set(rows.fieldnames or ()):
        raise ValueError(f"path: {path} has no column {', '.join(sorted(missing))}, wanted drug, target, affinity")
    for number, row in enumerate(rows, 2):
        try:
            strength = float(row["affinity"])
        except (TypeError, ValueError):
            strength = np.nan
        if not np.isfinite(strength):
            raise ValueError(f"path: line {number} of {path} has affinity {row['affinity']!r}, wanted a finite number")
        yield (row["drug"], row["target"]), strength


def read_davis(folder: str | Path) -> Affinities:
    """The Davis set as pKd = 9 - log10 Kd.

    The folder has ``ligands_can.txt`` and ``proteins.txt.gz`` (JSON, names to sequences) and ``Y.npz`` (Kd in nM).
    """
    folder = Path(folder)
    drugs = list(json.loads((folder / "ligands_can.txt").read_text()).values())
    targets = list(json.loads(gzip.decompress((folder / "proteins.txt.gz").read_bytes())).values())
    with np.load(folder / "Y.npz", allow_pickle=False) as file:
        strength = 9 - np.log10(file[file.files[0]].astype(np.float64))
    if strength.shape != (len(drugs), len(targets)):
        raise ValueError(f"folder: {folder} has strengths of shape {strength.shape} for {len(drugs)} x {len(targets)} names")
    pairs = torch.cartesian_prod(torch.arange(len(drugs)), torch.arange(len(targets)))
    return Affinities(drugs, targets, pairs, torch.tensor(strength).float().reshape(-1))


def letter_groups(sequence: str, length: int, width: int) -> Tensor:
    """Counts of the sequence's letter groups of 1 to ``length``, hashed to ``width`` and scaled to unit norm."""
    counts = np.zeros(width, np.float32)
    for size in range(1, length + 1):
        for start in range(len(sequence) - size + 1):
            counts[zlib.crc32(sequence[start : start + size].encode()) % width] += 1
    return torch.from_numpy(counts / max(float(np.linalg.norm(counts)), 1e-12))


def letter_codes(sequence: str, letters: str, length: int) -> Tensor:
    """The first ``length`` letters of the sequence as uint8: 1 + the place in ``letters``, one more for others, 0 behind.

    Raises:
        ValueError: for a sequence with none of the letters.
    """
    codes = np.zeros(length, np.uint8)
    read = [letters.find(letter) for letter in sequence[:length]]
    if max(read, default=-1) < 0:
        raise ValueError(f"sequence: got {sequence[:40]!r}, wanted one of the letters {letters}")
    codes[: len(read)] = [place + 1 if place >= 0 else len(letters) + 1 for place in read]
    return torch.from_numpy(codes)


def affinity_offers(
    found: Affinities, rows: Tensor, *, sets: int, size: int = 300, chosen: int = 15, features: str = "groups",
    width: int = 128, seed: int = 0,
) -> Offers:  # fmt: skip
    """Offers of ``size`` pairs drawn from ``rows``; the ``chosen`` strongest are S*. Ties go to the pair drawn first.

    Args:
        found: all pairs.
        rows: positions of the pairs to draw from, for example those of the training part.
        sets, size, chosen: B, N and |S*|.
        features: ``"groups"``, `letter_groups` of drug and protein, or ``"sequences"``, `letter_codes` of both: 100 of a
            drug and 1,000 of a protein, as uint8.
        width: letter groups of a drug, and as many of a protein.
        seed: of the draws.

    Raises:
        ValueError: for fewer rows than an offer has, sizes out of range, other features.
    """
    if not 0 < chosen < size <= len(rows):
        raise ValueError(f"size, chosen: got {size}, {chosen} of {len(rows)} pairs, wanted 0 < chosen < size <= pairs")
    if features not in ("groups", "sequences"):
        raise ValueError(f"features: got {features!r}, wanted 'groups' or 'sequences'")
    if features == "groups":
        drugs, targets = (torch.stack([letter_groups(s, 3, width) for s in side]) for side in found[:2])
    else:
        drugs = torch.stack([letter_codes(text, DRUG_LETTERS, LENGTHS[0]) for text in found.drugs])
        targets = torch.stack([letter_codes(text, TARGET_LETTERS, LENGTHS[1]) for text in found.targets])
    generator = generator_for(seed_for(seed, "affinity offers"))
    picked = rows[torch.stack([torch.randperm(len(rows), generator=generator)[:size] for _ in range(sets)])]
    strength = found.strength[picked]
    rank = strength.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    pairs = found.pairs[picked]
    elements = torch.cat([drugs[pairs[..., 0]], targets[pairs[..., 1]]], -1)
    return Offers(elements, rank < chosen, rule=f"the {chosen} strongest of {size} random pairs")
