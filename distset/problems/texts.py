"""Long documents as sets of words: movie reviews and EURLEX57K as the parts of a problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distset.data.documents import Documents, Vocabulary, read_eurlex, read_movie_reviews, word_vectors
from distset.seeds import generator_for
from distset.sets import InMemory
from distset.task import LazyExamples
from distset.train import Example, Parts

__all__ = ["eurlex", "movie_reviews"]


def movie_reviews(
    path: str, *, fold: int = 0, vocabulary: int = 10_000, chunk_size: int | None = 100, vectors: int | None = None,
    seed: int = 0,
) -> Parts:  # fmt: skip
    """The reviews in their ten folds: ``fold`` is tested, the next one validates, the others train.

    Args:
        path: of ``movie_reviews.zip``, or of its folder.
        fold: 0 to 9.
        vocabulary: words known, the most frequent of the training reviews.
        chunk_size: words a chunk, of which `Sampled` and `Subset` draw; None for whole documents.
        vectors: width of the vectors of words that the training reviews give beforehand, by `word_vectors`, and that the
            model then holds; None where it learns its own.
        seed: of the order of the words, which says nothing to a set but makes every chunk a fair sample.
    """
    if fold not in range(10):
        raise ValueError(f"fold: got {fold}, wanted 0 to 9")
    reviews, folds = read_movie_reviews(path)
    val = (fold + 1) % 10
    parts = [
        reviews.take(np.flatnonzero(own).tolist()) for own in ((folds != fold) & (folds != val), folds == val, folds == fold)
    ]
    return _parts(parts, vocabulary, chunk_size, vectors, seed, multi_label=False)


def eurlex(
    path: str,
    *,
    inverted: bool = True,
    limit: int | None = None,
    vocabulary: int = 30_000,
    chunk_size: int | None = 200,
    vectors: int | None = None,
    seed: int = 0,
) -> Parts:
    """EURLEX57K in its published parts, sections inverted, all concepts as classes; see `read_eurlex`.

    ``vectors`` as in `movie_reviews`.
    """
    read = read_eurlex(path, inverted=inverted, limit=limit)
    parts = [read[part] for part in ("train", "dev", "test")]
    return _parts(parts, vocabulary, chunk_size, vectors, seed, multi_label=True)


class _Words(LazyExamples):
    """Documents as sets of word numbers ``(N, 1)``, shuffled once; an empty document is one unknown word."""

    def __init__(self, documents: Documents, vocabulary: Vocabulary, chunk_size: int | None, seed: int) -> None:
        self.ids = [torch.from_numpy(vocabulary.ids(words or ["<unknown>"])) for words in documents.words]
        self.ids = [
            ids[torch.randperm(len(ids), generator=generator_for(seed, name))]
            for ids, name in zip(self.ids, documents.names)
        ]
        self.targets, self.names, self.chunk_size = torch.from_numpy(documents.targets()), documents.names, chunk_size

    def __len__(self) -> int:
        return len(self.ids)

    def example(self, index: int) -> Example:
        set = InMemory(self.ids[index].unsqueeze(-1), self.chunk_size, name=self.names[index])
        return Example(set, self.targets[index])


def _parts(
    documents: Sequence[Documents], size: int, chunk_size: int | None, vectors: int | None, seed: int, *, multi_label: bool
) -> Parts:
    vocabulary = Vocabulary(documents[0].words, size=size)
    train, val, test = (_Words(part, vocabulary, chunk_size, seed) for part in documents)
    facts: dict[str, Any] = {"words": len(vocabulary), "classes": documents[0].classes, "multi_label": multi_label}
    if vectors is not None:
        facts["vectors"] = torch.from_numpy(word_vectors([ids.numpy() for ids in train.ids], len(vocabulary), vectors))
    baselines = {} if multi_label else {"naive_bayes": _naive_bayes(train, test, len(vocabulary))}
    return Parts(train, val, test, facts, baselines)


def _naive_bayes(train: _Words, test: _Words, words: int) -> float:
    """Accuracy of multinomial naive Bayes on the same words, a pseudo-count each."""
    has = train.targets.numpy().astype(np.float64)
    by_class = np.ones((has.shape[1], words))
    for ids, own in zip(train.ids, has.argmax(1)):
        by_class[own] += np.bincount(ids.numpy(), minlength=words)
    log_p = np.log(by_class / by_class.sum(1, keepdims=True))
    prior = np.log(has.mean(0))
    found = [int((log_p[:, ids.numpy()].sum(1) + prior).argmax()) for ids in test.ids]
    return float(np.mean(np.array(found) == test.targets.numpy().argmax(1)))
