"""Reviews as sequences of words, of which a few are to be kept: movie reviews by class, BeerAdvocate by rating.

Unlike `distset.problems.texts`, documents stay in reading order, and targets are `Review`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distset.data.beer import RatedReview, aspect_number, read_annotations, read_ratings
from distset.data.documents import Vocabulary, read_movie_reviews
from distset.seeds import generator_for
from distset.sets import InMemory
from distset.task import LazyExamples
from distset.tasks.explain_words import LinearJudge, Review
from distset.train import Example, Parts

__all__ = ["ReviewExamples", "beer_reviews", "movie_reviews"]


class ReviewExamples(LazyExamples):
    """Documents as sets of word numbers ``(N, 1)``, in reading order; an empty document is one unknown word."""

    def __init__(self, words: Sequence[Sequence[str]], targets: Sequence[Review], vocabulary: Vocabulary, part: str) -> None:
        self.ids = [torch.from_numpy(vocabulary.ids(document or ["<unknown>"])).unsqueeze(-1) for document in words]
        self.targets, self.part = targets, part

    def __len__(self) -> int:
        return len(self.ids)

    def example(self, index: int) -> Example:
        return Example(InMemory(self.ids[index], name=f"{self.part}-{index}"), self.targets[index])


def movie_reviews(path: str, *, fold: int = 0, vocabulary: int = 20_000, limit: int | None = None) -> Parts:
    """Movie reviews and their class, in ten folds: ``fold`` is tested, the next one validates, the others train.

    The facts hold a judge, a linear model of the share of each word, trained on the training reviews: what is to be
    explained where no label is. Baselines are its accuracy on whole test reviews, and on as many as ten random words.

    Args:
        path: of ``movie_reviews.zip``, or of its folder.
        fold: 0 to 9.
        vocabulary: words known, the most frequent of the training reviews.
        limit: reviews of each part, evenly spaced; None for all.

    Raises:
        ValueError: for a fold that does not exist, a path without the archive, an archive without a part, a limit below 1.
    """
    if fold not in range(10):
        raise ValueError(f"fold: got {fold}, wanted 0 to 9")
    _check_count("limit", limit)
    reviews, folds = read_movie_reviews(path)
    val = (fold + 1) % 10
    own = [np.flatnonzero(part) for part in ((folds != fold) & (folds != val), folds == val, folds == fold)]
    for name, rows in zip(("train", "validate", "test"), own):
        if not len(rows):
            raise ValueError(f"path: {path} has no reviews to {name} on with fold {fold}, wanted the archive with ten folds")
    taken = [reviews.take(_spread(rows, limit).tolist()) for rows in own]
    known = Vocabulary(taken[0].words, size=vocabulary, least=2)
    train, validation, test = (
        ReviewExamples(part.words, [Review(labels[0]) for labels in part.labels], known, name)
        for name, part in zip(("train", "val", "test"), taken)
    )
    weights, bias = fit_judge(train, len(known), len(reviews.classes))
    facts: dict[str, Any] = {"words": known.words, "classes": reviews.classes, "judge": {"weights": weights, "bias": bias}}
    return Parts(train, validation, test, facts, _judged(test, LinearJudge(weights, bias)))


def beer_reviews(path: str, *, aspect: str = "smell", vocabulary: int = 20_000, train: int | None = None) -> Parts:
    """BeerAdvocate reviews and their rating of an aspect; annotated reviews are tested.

    Args:
        path: the folder with ``reviews.aspect{number}.train.txt(.gz)``, ``...heldout.txt(.gz)`` and ``annotations.json``;
            the number is the aspect's place among `distset.data.beer.ASPECTS`: 0 for look, 1 for smell, and so on.
        aspect: one of `distset.data.beer.ASPECTS`.
        vocabulary: words known, the most frequent of the training reviews.
        train: the first so many training reviews; None for all.

    Raises:
        ValueError: for a folder without the files, an unknown aspect or one that nobody annotated, ``train`` below 1.
    """
    _check_count("train", train)
    number = aspect_number(aspect)
    read = [
        read_ratings(_either(Path(path), f"reviews.aspect{number}.train.txt"), aspect)[:train],
        read_ratings(_either(Path(path), f"reviews.aspect{number}.heldout.txt"), aspect),
        read_annotations(_either(Path(path), "annotations.json"), aspect),
    ]
    for name, part in zip(("training review", "heldout review", "annotated review with words marked"), read):
        if not part:
            raise ValueError(f"aspect: {path} has no {name} for {aspect!r}, wanted one that has")
    known = Vocabulary([review.words for review in read[0]], size=vocabulary)
    training, validation, testing = (
        ReviewExamples([r.words for r in part], [_review(r) for r in part], known, name)
        for name, part in zip(("train", "val", "test"), read)
    )
    mean = float(np.mean([review.rating for review in read[0]]))
    spread = float(np.mean([(review.rating - mean) ** 2 for review in read[2]]))
    marked = float(np.mean([review.marked.mean() for review in read[2] if review.marked is not None]))
    facts: dict[str, Any] = {"words": known.words, "classes": None, "judge": None}
    return Parts(training, validation, testing, facts, {"mean_rating_error": spread, "random_words_precision": marked})


def fit_judge(examples: ReviewExamples, words: int, classes: int) -> tuple[Tensor, Tensor]:
    """Weights ``(words, classes)`` and bias ``(classes,)`` of a logistic regression on the share of each word.

    Raises:
        ValueError: for examples of one class.
    """
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    lengths = [len(ids) for ids in examples.ids]
    rows = np.repeat(np.arange(len(lengths)), lengths)
    columns = torch.cat(examples.ids).squeeze(-1).numpy()
    shares = np.repeat(1 / np.array(lengths), lengths)
    table = csr_matrix((shares, (rows, columns)), shape=(len(lengths), words))
    labels = np.array([target.value for target in examples.targets], int)
    if len(set(labels.tolist())) < 2:
        raise ValueError(f"examples: all {len(labels)} training reviews are of one class; take more, or a larger limit")
    fitted = LogisticRegression(C=3e3, max_iter=200).fit(table, labels)
    coefficients, intercepts = fitted.coef_, fitted.intercept_
    if classes == 2:
        coefficients, intercepts = np.stack([0 * coefficients[0], coefficients[0]]), np.array([0.0, intercepts[0]])
    return torch.from_numpy(coefficients.T.copy()).float(), torch.from_numpy(intercepts.copy()).float()


def _judged(examples: ReviewExamples, judge: LinearJudge, k: int = 10) -> dict[str, float]:
    whole, few = [], []
    generator = generator_for(0, "random words")
    for ids, target in zip(examples.ids, examples.targets):
        words = ids.T.numpy()
        kept = torch.randperm(len(ids), generator=generator).argsort().lt(k).numpy()
        whole.append(int(judge(words, np.ones_like(words, float)[None])[0, 0].argmax()) == target.value)
        few.append(int(judge(words, kept[None, None].astype(float))[0, 0].argmax()) == target.value)
    return {"judge_accuracy": float(np.mean(whole)), f"judge_on_{k}_random_words": float(np.mean(few))}


def _spread(rows: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """As many of ``rows`` as the limit says, evenly spaced."""
    count = len(rows) if limit is None else min(limit, len(rows))
    return rows[np.arange(count) * len(rows) // count]


def _check_count(name: str, count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError(f"{name}: got {count}, wanted at least 1 review, or None for all")


def _review(review: RatedReview) -> Review:
    return Review(review.rating, None if review.marked is None else torch.from_numpy(review.marked))


def _either(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() else folder / name
