"""Training, validation and test offers of the oracle's data sets, as the parts of a problem.

Every function gives `distset.train.Parts`: training offers one by one (a step stacks its own), validation and test
offers in groups, the facts that the task's factory wants, how the offers came about, and the Jaccard index of simple rules
on the test offers, all at the known size of S*.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from distset.choose import by_size, overlap
from distset.data.affinities import affinity_offers, read_affinities, read_davis
from distset.data.celeba import celeba_offers
from distset.data.idx_images import read_idx_folder
from distset.data.published_offers import published_gaussian_offers, published_moons_offers
from distset.data.registry import read_features, read_registries, registry_offers
from distset.data.synthetic_offers import anomaly_offers, gaussian_offers, gaussian_ratio, moons_offers, moons_ratio
from distset.offers import Offers, check_offer
from distset.seeds import generator_for, seed_for
from distset.sets import InMemory
from distset.train import Example, Parts

__all__ = [
    "cells", "compounds", "examples", "faces", "gaussian", "images", "moons", "published_gaussian", "published_moons",
    "registry",
]  # fmt: skip

GROUP = 100
"""Validation and test offers solved at once."""
ELEMENTS, NUMBERS = 50_000, 10_000_000
"""Training elements that the classifier is fitted on, and numbers in them, at most."""


def gaussian(sets: int = 1000, size: int = 100, chosen: int = 10, seed: int = 0) -> Parts:
    """`gaussian_offers`, ``sets`` of each part."""
    made = [gaussian_offers(sets, size=size, chosen=chosen, seed=seed_for(seed, part)) for part in range(3)]
    return _with_truth(_parts(made, {"dim": 2}), gaussian_ratio, made[-1])


def moons(sets: int = 1000, size: int = 100, chosen: int = 10, seed: int = 0) -> Parts:
    """`moons_offers`, ``sets`` of each part."""
    made = [moons_offers(sets, size=size, chosen=chosen, seed=seed_for(seed, part)) for part in range(3)]
    return _with_truth(_parts(made, {"dim": 2}), moons_ratio, made[-1])


def published_gaussian(sets: int = 1000) -> Parts:
    """The offers that the published figures are of, see `distset.data.published_offers`."""
    made = published_gaussian_offers(sets)
    return _with_truth(_parts(made, {"dim": 2}), gaussian_ratio, made[-1])


def published_moons(sets: int = 1000) -> Parts:
    """The offers that the published figures are of, see `distset.data.published_offers`."""
    made = published_moons_offers(sets)
    return _with_truth(_parts(made, {"dim": 2}), moons_ratio, made[-1])


def registry(path: str, rest: str, *, features: str = "factors", size: int = 30, fold: int = 0, seed: int = 0) -> Parts:
    """A baby registry's thirds; ``rest`` is the rule for what else was offered, see `distset.data.registry`.

    ``features``: ``"factors"``, ``"cooccurrence"``, ``"ids"``, or the path of a Parquet file that `convert_features` wrote.
    """
    codes: Tensor | str = read_features(features) if features.endswith(".parquet") else features
    thirds = registry_offers(read_registries(path), rest=rest, size=size, features=codes, fold=fold, seed=seed)
    made = _parts([thirds.train, thirds.val, thirds.test], {"dim": thirds.test.elements.shape[-1]})
    return made._replace(
        baselines={**made.baselines, "most_popular": _jaccard(thirds.popular, thirds.test)},
        rules={**made.rules, "baseline/most_popular": "items most often chosen in the training third"},
    )


def cells(
    path: str,
    *,
    elements: str = "X_pca",
    labels: str = "label",
    sets: int = 1000,
    size: int = 20,
    chosen: tuple[int, int] = (2, 4),
    seed: int = 0,
) -> Parts:
    """Odd ones out among vectors, such as cells by type: an ``npz`` with ``elements (M, D)`` and classes ``labels (M)``.

    The elements are divided over training, validation and test (6 : 2 : 2), so that none is met twice. Classes may be
    numbers or names.

    Raises:
        ValueError: for a file that is no ``npz``, holds Python objects, or lacks an array; for vectors that are not finite.
    """
    pool, kinds = _read_cells(path, elements, labels)
    made = [
        anomaly_offers(pool[own], kinds[own], sets=sets, size=size, chosen=chosen, seed=seed_for(seed, "offers", part))
        for part, own in enumerate(_divide(len(pool), seed))
    ]
    return _parts(made, {"dim": pool.shape[1]})


def _read_cells(path: str, elements: str, labels: str) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := {elements, labels} - set(file.files):
                raise KeyError(f"has no array {sorted(missing)}, it has {', '.join(file.files)}")
            vectors, names = file[elements], file[labels]
    except KeyError as error:
        raise ValueError(f"path: {path} {error.args[0]}") from None
    except (ValueError, AttributeError, TypeError, BadZipFile, EOFError) as error:
        raise ValueError(
            f"path: {path} cannot be read ({error}), wanted an npz of plain arrays: what is pickled could run anything. "
            f"Load it once in a place you trust, and save numpy.savez(target, {elements}=vectors.astype('float32'), "
            f"{labels}=classes.astype('str'))"
        ) from error
    if vectors.ndim != 2 or names.shape != vectors.shape[:1] or vectors.dtype.kind not in "fiub":
        raise ValueError(
            f"path: {path} has {elements} {vectors.dtype} {vectors.shape} and {labels} {names.shape}, wanted numbers (M, D) "
            f"and classes (M)"
        )
    if bad := int((~np.isfinite(vectors).all(1)).sum()):
        raise ValueError(
            f"path: {path} has {bad} of {len(vectors)} rows of {elements} that are NaN or infinite; clean or drop them"
        )
    return torch.tensor(vectors, dtype=torch.float32), torch.tensor(np.unique(names, return_inverse=True)[1])


def images(
    path: str,
    *,
    sets: tuple[int, int, int] = (10_000, 1_000, 1_000),
    size: int = 8,
    chosen: tuple[int, int] = (2, 3),
    seed: int = 0,
) -> Parts:
    """Odd ones out among images of a folder of idx files, as flat pixels; the validation offers have images of their own.

    Sizes are those that the papers use for CelebA: offers of 8 with 2 or 3 odd ones.
    """
    train, test = read_idx_folder(path, "train"), read_idx_folder(path, "test")
    pixels, cut = train.pixels(), len(train.labels) * 9 // 10
    own = [
        (pixels[:cut], train.labels[:cut]),
        (pixels[cut:], train.labels[cut:]),
        (test.pixels(), test.labels),
    ]
    made = [
        anomaly_offers(pool, kinds, sets=count, size=size, chosen=chosen, seed=seed_for(seed, "offers", part))
        for part, ((pool, kinds), count) in enumerate(zip(own, sets))
    ]
    return _parts(made, {"dim": pixels.shape[1]})


def faces(
    path: str, *, sets: tuple[int, int, int] = (10_000, 1_000, 1_000), size: int = 8, chosen: tuple[int, int] = (2, 3),
    side: int = 64, seed: int = 0,
) -> Parts:  # fmt: skip
    """Odd ones out among the faces of CelebA: the majority shares two attributes that the odd ones lack.

    See `distset.data.celeba` for the files wanted in ``path``. Images are scaled to ``side`` pixels, as flat values.
    """
    made = [
        celeba_offers(path, part, sets=count, size=size, chosen=chosen, side=side, seed=seed)
        for part, count in zip(("train", "val", "test"), sets)
    ]
    return _parts(made, {"dim": made[0].elements.shape[-1]})


def compounds(
    path: str, *, sets: tuple[int, int, int] = (1000, 100, 100), size: int = 300, chosen: int = 15,
    features: str = "groups", width: int = 64, seed: int = 0,
) -> Parts:  # fmt: skip
    """The strongest of ``size`` offered drug-protein pairs; the pairs are divided 6 : 2 : 2 over the parts.

    ``path`` is a table (see `read_affinities`), or the folder of the Davis set (see `read_davis`). ``features``:
    ``"groups"``, or ``"sequences"`` for `distset.tasks.offer_encoders.DeepDTA` (the simple classifier has the groups still).
    """
    found = read_davis(path) if Path(path).is_dir() else read_affinities(path)
    parts = _divide(len(found.strength), seed)

    def drawn(features: str) -> list[Offers]:
        return [
            affinity_offers(
                found, own, sets=count, size=size, chosen=chosen, features=features, width=width, seed=seed_for(seed, part)
            )
            for part, (own, count) in enumerate(zip(parts, sets))
        ]

    made = drawn(features)
    return _parts(made, {"dim": made[0].elements.shape[-1]}, drawn("groups") if features == "sequences" else None)


def examples(offers: Offers, group: int = 16) -> list[Example]:
    """Offers as training examples, ``group`` of one shape in each: a step over a few groups is one over many offers.

    Within an epoch the groups are shuffled, not the offers among them.
    """
    if group < 1:
        raise ValueError(f"group: got {group}, wanted at least 1 offer an example")
    found = []
    for start in range(0, len(offers.chosen), group):
        part = slice(start, start + group)
        mask = None if offers.mask is None else offers.mask[part]
        elements = offers.elements[part]
        set = InMemory(elements, mask=mask, element_ndim=elements.dim() - 2, name=f"offers-{start}")
        found.append(Example(set, offers.chosen[part]))
    return found


def _divide(count: int, seed: int) -> list[Tensor]:
    """Positions of the three parts, 6 : 2 : 2."""
    order = torch.randperm(count, generator=generator_for(seed, "parts"))
    return list(order.tensor_split([int(0.6 * count), int(0.8 * count)]))


def _with_truth(parts: Parts, ratio: Callable[[Tensor], Tensor], test: Offers) -> Parts:
    """With what the true densities reach on the test offers: nobody does better but by chance."""
    scores = torch.cat([ratio(elements) for elements in test.elements.split(GROUP)])
    return parts._replace(
        baselines={**parts.baselines, "true_densities": _jaccard(scores, test)},
        rules={**parts.rules, "baseline/true_densities": "likelihood ratio of the densities the offers were drawn from"},
    )


def _parts(made: list[Offers], facts: dict[str, Any], vectors: list[Offers] | None = None) -> Parts:
    """The parts; ``vectors`` are the same offers for the classifier, where their elements are no vectors."""
    for name, offers in zip(("training", "validation", "test"), made, strict=True):
        _check(name, offers)
    train, val, test = made
    seen, _, asked = vectors or made
    scores = torch.rand(test.chosen.shape, generator=generator_for(0, "random choice"))
    return Parts(
        examples(train, 1), examples(val, GROUP), examples(test, GROUP), facts,
        {"random": _jaccard(scores, test), "classifier": _jaccard(_classify(seen, asked), test)},
        {"offers": test.rule, "baseline/classifier": "logistic regression of elements on their own, which sees no offer"},
    )  # fmt: skip


def _check(part: str, offers: Offers) -> None:
    for start in range(0, len(offers.chosen), GROUP):
        own = slice(start, start + GROUP)
        elements, mask = offers.elements[own], None if offers.mask is None else offers.mask[own]
        try:
            check_offer(elements, offers.chosen[own], mask, element_ndim=elements.dim() - 2)
        except ValueError as error:
            raise ValueError(f"{error} (of the {part} offers from {start} on)") from None


def _classify(train: Offers, test: Offers) -> Tensor:
    """The log-odds ``(B, N)`` of test elements by a logistic regression of training elements, each on its own."""
    from sklearn.linear_model import LogisticRegression

    offered = torch.ones_like(train.chosen) if train.mask is None else train.mask
    places = offered.flatten().nonzero().squeeze(-1)
    width = train.elements[0, 0].numel()
    order = torch.randperm(len(places), generator=generator_for(0, "classifier"))
    some = places[order[: min(ELEMENTS, max(1, NUMBERS // width))]]
    x, y = train.elements.reshape(-1, width)[some], train.chosen.flatten()[some]
    model = LogisticRegression(max_iter=200, tol=1e-3)
    centre, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    if y.all() or not y.any():
        return torch.zeros(test.chosen.shape)
    model.fit(((x - centre) / spread).numpy(), y.numpy())
    weight = torch.tensor(model.coef_[0], dtype=x.dtype) / spread
    return test.elements.flatten(2) @ weight


def _jaccard(scores: Tensor, offers: Offers) -> float:
    """Of the best |S*| by a score."""
    found = by_size(scores.float(), offers.chosen.sum(-1), offers.mask).chosen
    return float(overlap(found, offers.chosen)["jaccard"].mean())
