"""Amazon Baby Registry: what customers chose, as offers of N with a rest by a rule that every result must name.

The id files hold one registry a line (ids 1..M, blanks or commas between). What was *offered* is not recorded: the paper
says the rest of an offer is random; the authors' loader takes the items *least* similar to the chosen ones, which makes
the choice easy to see. Both are here; they are different tasks.

References:
    Gillenwater, Kulesza, Fox, Taskar: Expectation-Maximization for Learning Determinantal Point Processes. NeurIPS 2014.
    Ou et al.: Learning Neural Set Functions Under the Optimal Subset Oracle. NeurIPS 2022. arXiv:2203.01693
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distset.data.schema import need
from distset.offers import Offers
from distset.seeds import seed_for

__all__ = [
    "RegistryParts",
    "convert_features",
    "cooccurrence",
    "factors",
    "read_features",
    "read_registries",
    "registry_offers",
]

RULES = ("random", "least-similar")


class RegistryParts(NamedTuple):
    """Training, validation and test offers.

    ``popular (B, N)`` is how often training customers chose each item of the test offers: the baseline's score.
    """

    train: Offers
    val: Offers
    test: Offers
    popular: Tensor


def read_registries(path: str | Path, *, smallest: int = 3, largest: int = 29) -> list[list[int]]:
    """The registries of ``smallest`` to ``largest`` items as positions from 0; the defaults are the published filter.

    Raises:
        ValueError: for a pickle, a line that holds something else than ids from 1, a file without such a registry.
    """
    path = Path(path)
    _refuse_pickle(path)
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = [word for word in re.split(r"[\s,]+", line.strip()) if word]
        if not all(word.isdecimal() and int(word) >= 1 for word in words):
            raise ValueError(
                f"path: line {number} of {path} is {line[:60]!r}, wanted ids from 1 with blanks or commas between"
            )
        ids = sorted({int(word) - 1 for word in words})
        if smallest <= len(ids) <= largest:
            found.append(ids)
    if not found:
        raise ValueError(f"path: {path} has no registry of {smallest} to {largest} items")
    return found


def cooccurrence(registries: Sequence[Sequence[int]], items: int) -> Tensor:
    """Features of items from what *these* registries hold together: positive pointwise mutual information, ``(M, M)``.

    Give the training part alone. An item that it lacks has a row of zeros.
    """
    together = np.zeros((items, items))
    for ids in registries:
        together[np.ix_(ids, ids)] += 1
    np.fill_diagonal(together, 0)
    share = together.sum(1)
    expected = np.outer(share, share) / max(share.sum(), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(together / expected)
    return torch.tensor(np.where(together > 0, pmi.clip(0), 0.0), dtype=torch.float32)


def factors(registries: Sequence[Sequence[int]], items: int, rank: int = 16) -> Tensor:
    r"""Features of items from what *these* registries hold together: how popular each is, and factors of the pairs' lift.

    Of n registries :math:`n_i` have item i and :math:`n_{ij}` have both i and j. Features are :math:`\log(1 + n_i)`,
    standardised, and ``rank`` eigenvectors of :math:`L_{ij} = \log((n_{ij} + 1) / (n_i n_j / n + 1))`, each times the root
    of its absolute eigenvalue: ``(M, 1 + rank)``, few enough to learn from some thousand registries what goes together.
    """
    together, count = np.zeros((items, items)), np.zeros(items)
    for ids in registries:
        together[np.ix_(ids, ids)] += 1
        count[ids] += 1
    lift = np.log((together + 1) / (np.outer(count, count) / len(registries) + 1))
    np.fill_diagonal(lift, 0)
    values, vectors = np.linalg.eigh(lift)
    largest = np.argsort(-np.abs(values))[:rank]
    popular = np.log1p(count)
    popular = (popular - popular.mean()) / max(popular.std(), 1e-9)
    scaled = vectors[:, largest] * np.sqrt(np.abs(values[largest]))
    return torch.tensor(np.column_stack([popular, scaled]), dtype=torch.float32)


def registry_offers(
    registries: Sequence[Sequence[int]],
    *,
    rest: str,
    size: int = 30,
    features: Tensor | str = "factors",
    fold: int = 0,
    seed: int = 0,
) -> RegistryParts:
    """Offers of ``size`` items around each registry, in three thirds.

    Args:
        registries: of `read_registries`.
        rest: how the items beside S* are found: ``"random"`` (the paper's text) or ``"least-similar"`` (the authors'
            code: lowest cosine to the mean of the chosen items' features; for "factors", of their co-occurrence).
        size: N, 30 as published.
        features: of the items ``(M, D)``, also of items that no registry names, which are offered beside them; `factors`
            or `cooccurrence` of the training third by name; ``"ids"`` for one-hot vectors.
        fold: 0, 1 or 2; the thirds change places. The order of the registries is shuffled by ``seed`` first (the
            published split follows the file).
        seed: of the order and the offers.

    Raises:
        ValueError: for an unknown rule or fold, too few items to fill an offer, features that do not fit.
    """
    if rest not in RULES or fold not in (0, 1, 2):
        raise ValueError(f"rest, fold: got {rest!r}, {fold}, wanted one of {', '.join(RULES)} and a fold of 0, 1, 2")
    named = 1 + max(max(ids) for ids in registries)
    items = max(named, len(features)) if isinstance(features, Tensor) else named
    if items < size or max(map(len, registries)) >= size or len(registries) < 3:
        raise ValueError(f"size: got {size} of {items} items, wanted more than any registry and no more than the items")
    order = np.random.default_rng(seed_for(seed, "registry order")).permutation(len(registries))
    thirds = np.array_split(order, 3)
    parts = [[list(registries[i]) for i in thirds[(fold + k) % 3]] for k in range(3)]
    codes = _features(features, parts[0], named)
    likeness = cooccurrence(parts[0], items) if isinstance(features, str) and features == "factors" else codes
    offers = [_offers(ids, codes, likeness, rest, size, seed_for(seed, "offer", fold, k)) for k, ids in enumerate(parts)]
    counts = torch.bincount(torch.tensor([i for ids in parts[0] for i in ids]), minlength=items).float()
    train, val, test = (own._replace(rule=f"registry, rest {rest}") for own, _ in offers)
    return RegistryParts(train, val, test, counts[offers[2][1]])


def convert_features(pickled: str | Path, target: str | Path) -> Path:
    """The published feature pickle (a dict from id to numbers) as Parquet, read without running anything it names.

    The pickle may hold numbers, lists, tuples and dicts; whatever would import a name is refused.

    Raises:
        ValueError: for a pickle that asks for more, is damaged, or does not map ids 1..M to vectors of one length of
            finite numbers.
    """
    found = _numbers(Path(pickled))
    try:
        table = np.array([found[i + 1] for i in range(len(found))], dtype=np.float32)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"pickled: {pickled} does not map ids 1..M to vectors of one length") from error
    if table.ndim != 2:
        raise ValueError(
            f"pickled: {pickled} does not map ids 1..M to vectors of one length, but to shape {table.shape[1:]}"
        )
    _check_finite("pickled", pickled, table)
    pa, parquet = need("pyarrow"), need("pyarrow.parquet")
    column = pa.FixedSizeListArray.from_arrays(pa.array(table.reshape(-1)), table.shape[1])
    parquet.write_table(pa.table({"id": np.arange(1, len(table) + 1), "feature": column}), str(target))
    return Path(target)


def read_features(path: str | Path) -> Tensor:
    """Item features ``(M, D)`` that `convert_features` wrote.

    Raises:
        ValueError: for a pickle, features that are not finite.
    """
    _refuse_pickle(Path(path))
    table = need("pyarrow.parquet").read_table(str(path)).sort_by("id")
    features = np.stack(table["feature"].to_numpy(zero_copy_only=False))
    _check_finite("path", path, features)
    return torch.tensor(features, dtype=torch.float32)


def _check_finite(name: str, path: str | Path, table: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(table).all(1))
    if len(bad):
        raise ValueError(
            f"{name}: {path} has features that are NaN or infinite for {len(bad)} of {len(table)} items, id {bad[0] + 1} "
            f"the first, wanted finite numbers; fill them in, or give these items zeros"
        )


def _numbers(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _NumbersOnly(file).load()
    except (OSError, _RefusedError):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"pickled: {path} cannot be read ({type(error).__name__}: {error}), wanted a whole pickle of a dict from ids to "
            f"numbers; is it damaged, cut off, or no pickle?"
        ) from error


class _RefusedError(ValueError):
    """What a pickle asks for is not given."""


class _NumbersOnly(pickle.Unpickler):
    """Plain containers and numbers: those need no names, and every name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise _RefusedError(
            f"pickled: asks to import {module}.{name}, which could run anything; only plain dicts, lists and numbers are "
            f"read. Load it in a place you trust and save lists instead"
        )


def _offers(
    parts: list[list[int]], codes: Tensor, likeness: Tensor, rest: str, size: int, seed: int
) -> tuple[Offers, Tensor]:
    """Offers of ``codes``, their rest by ``likeness``; and which items they are."""
    normed = torch.nn.functional.normalize(likeness, dim=-1)
    offered, chosen = torch.empty(len(parts), size, dtype=torch.int64), torch.zeros(len(parts), size, dtype=torch.bool)
    for b, ids in enumerate(parts):
        rng = np.random.default_rng(seed_for(seed, b))
        others = np.setdiff1d(np.arange(len(likeness)), ids)
        if rest == "random":
            others = rng.choice(others, size - len(ids), replace=False)
        else:
            mean = torch.nn.functional.normalize(likeness[ids].mean(0), dim=-1)
            others = others[np.argsort((normed[others] @ mean).numpy(), kind="stable")[: size - len(ids)]]
        places = rng.permutation(size)
        row = torch.tensor(np.concatenate([ids, others]))
        offered[b, places] = row
        chosen[b, places[: len(ids)]] = True
    return Offers(codes[offered], chosen), offered


def _features(features: Tensor | str, train: list[list[int]], items: int) -> Tensor:
    if isinstance(features, Tensor):
        if len(features) < items:
            raise ValueError(f"features: got {len(features)} rows for {items} items, wanted one each")
        return features
    if features not in ("factors", "cooccurrence", "ids"):
        raise ValueError(f"features: got {features!r}, wanted a tensor (M, D), 'factors', 'cooccurrence' or 'ids'")
    made = {"factors": factors, "cooccurrence": cooccurrence}
    return made[features](train, items) if features in made else torch.eye(items)


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(2)
    if path.suffix in (".pkl", ".pickle") or head[:1] == b"\x80":
        raise ValueError(
            f"path: {path} is a pickle, which can run anything when it is read; convert it once by "
            f"distset.data.registry.convert_features(pickled, target), which reads plain numbers only"
        )
