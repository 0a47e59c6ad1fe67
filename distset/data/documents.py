"""Long documents as bags of words: movie reviews, EURLEX57K, the vocabulary that numbers words, and vectors of words.

References:
    Pang, Lee: A Sentimental Education. ACL 2004 (polarity data set 2.0).
    Chalkidis et al.: Large-Scale Multi-Label Text Classification on EU Legislation. ACL 2019.
    Park, Vyas, Shah: Efficient Classification of Long Documents Using Transformers. ACL 2022 (inverted EURLEX).
    Deerwester et al.: Indexing by Latent Semantic Analysis. JASIS 41 (1990).
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distset.data.schema import need

__all__ = ["Documents", "Vocabulary", "read_eurlex", "read_movie_reviews", "word_vectors"]

PARTS = ("train", "dev", "test")
REVIEW = re.compile(r"(neg|pos)/cv(\d)\d\d_[^/]*\.txt$")
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[^\sa-z0-9]")


class Documents(NamedTuple):
    """Documents as lists of words, in reading order.

    Attributes:
        words: of each document.
        labels: of each document the positions in ``classes`` that it has: one, or any number.
        names: of the documents.
        classes: names of the classes.
    """

    words: list[list[str]]
    labels: list[list[int]]
    names: list[str]
    classes: list[str]

    def take(self, positions: Iterable[int]) -> Documents:
        """Some of the documents."""
        chosen = list(positions)
        return Documents(
            [self.words[i] for i in chosen], [self.labels[i] for i in chosen], [self.names[i] for i in chosen], self.classes
        )

    def targets(self) -> NDArray[np.float32]:
        """``(documents, classes)``, 1 where a document has the class."""
        targets = np.zeros((len(self.words), len(self.classes)), np.float32)
        for row, labels in enumerate(self.labels):
            targets[row, labels] = 1
        return targets


class Vocabulary:
    """Words as numbers: 0 is every word that it does not hold, the most frequent one is 1.

    Args:
        documents: of the training part.
        size: most words that it holds.
        least: occurrences that a word needs.

    Example:
        >>> vocabulary = Vocabulary([["a", "b", "a"], ["b", "a"]], size=1)
        >>> len(vocabulary), vocabulary.ids(["b", "a", "x"]).tolist()
        (2, [0, 1, 0])
    """

    def __init__(self, documents: Iterable[Sequence[str]], *, size: int = 20_000, least: int = 1) -> None:
        counts = Counter(word for words in documents for word in words)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))  # ties by name: the same on every machine
        self.words = ["<unknown>", *(word for word, count in ordered[:size] if count >= least)]
        self._number = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, words: Sequence[str]) -> NDArray[np.int64]:
        """The numbers of words, int64 ``(N)``."""
        return np.array([self._number.get(word, 0) for word in words], np.int64)


def word_vectors(documents: Sequence[NDArray[np.int64]], words: int, width: int) -> NDArray[np.float32]:
    """Vectors of words by latent semantic analysis: close where words are found in the same documents; no label is seen.

    The rows of ``V S`` of the truncated singular value decomposition of the documents' tf-idf (1 + log of the counts,
    documents of length 1), each of length 1; a word that no document holds is 0.

    Args:
        documents: numbers of words, below ``words``.
        words: in the vocabulary.
        width: of a vector, below the number of documents and of words.

    Returns:
        ``(words, width)``, the same on every call.

    Raises:
        ValueError: for a width that does not fit.
    """
    if not 0 < width < min(len(documents), words):
        raise ValueError(
            f"vectors: got a width of {width} from {len(documents)} documents of {words} words, wanted 1 to "
            f"{min(len(documents), words) - 1}"
        )
    csr_matrix = need("scipy.sparse").csr_matrix
    ends = np.cumsum([0, *map(len, documents)])
    counts = csr_matrix((np.ones(ends[-1]), np.concatenate(documents), ends), shape=(len(documents), words))
    counts.sum_duplicates()
    tfidf = need("sklearn.feature_extraction.text").TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    analysis = need("sklearn.decomposition").TruncatedSVD(width, random_state=0).fit(tfidf)
    vectors = analysis.components_.T * analysis.singular_values_
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 1e-9, length, np.inf)).astype(np.float32)


def read_movie_reviews(path: str | Path) -> tuple[Documents, NDArray[np.int64]]:
    """The 2,000 reviews, and the fold 0..9 of each by its number (cv000 to cv099 is fold 0), which is the usual division.

    Args:
        path: ``movie_reviews.zip``, or the folder that holds it.

    Raises:
        ValueError: for a path without the archive, one that is no archive or a broken one, an archive without reviews.
    """
    path = Path(path)
    archive = path / "movie_reviews.zip" if path.is_dir() else path
    if not archive.is_file():
        raise ValueError(f"path: {path} has no movie_reviews.zip, wanted the archive of the polarity data set 2.0")
    words, labels, names, folds = [], [], [], []
    for name, (kind, fold), text in _reviews(archive):
        words.append(text.split())
        labels.append([int(kind == "pos")])
        names.append(Path(name).stem)
        folds.append(int(fold))
    if not words:
        raise ValueError(f"path: {archive} holds no neg/cv*.txt or pos/cv*.txt, wanted movie reviews")
    return Documents(words, labels, names, ["negative", "positive"]), np.array(folds)


def _reviews(archive: Path) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Name, kind and fold, text of each review of an archive."""
    try:
        with zipfile.ZipFile(archive) as file:
            for name in sorted(file.namelist()):
                if found := REVIEW.search(name):
                    yield name, found.groups(), file.read(name).decode("latin-1")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"path: {archive} cannot be read as a zip file ({error}), wanted movie_reviews.zip; fetch it again"
        ) from error


def read_eurlex(path: str | Path, *, inverted: bool = True, limit: int | None = None) -> dict[str, Documents]:
    """EURLEX57K: its parts ``train``, ``dev`` and ``test``, multi-label, with one list of classes.

    Args:
        path: the folder with ``train/*.json`` and so on, as the data set is published.
        inverted: sections from the last to the first (main body, recitals, header), as in the paper: where a text is cut,
            its telling header is what goes.
        limit: the first so many documents of each part; None for all.

    Raises:
        ValueError: for a folder without the parts, a document that is no JSON or whose fields are missing or no text.
    """
    texts: dict[str, list[list[str]]] = {}
    concepts: dict[str, list[list[str]]] = {}
    names: dict[str, list[str]] = {}
    for part in PARTS:
        files = sorted((Path(path) / part).glob("*.json"))[:limit]
        if not files:
            raise ValueError(f"path: {path} has no {part}/*.json, wanted the unpacked folder of EURLEX57K")
        read = [_read_law(file, inverted) for file in files]
        texts[part], concepts[part] = [words for words, _ in read], [own for _, own in read]
        names[part] = [file.stem for file in files]
    classes = sorted({concept for of in concepts.values() for own in of for concept in own})
    number = {concept: place for place, concept in enumerate(classes)}
    return {
        part: Documents(texts[part], [[number[c] for c in own] for own in concepts[part]], names[part], classes)
        for part in PARTS
    }


def _read_law(path: Path, inverted: bool) -> tuple[list[str], list[str]]:
    try:
        law = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"path: {path}, line {error.lineno}: no JSON ({error.msg}), wanted a document of EURLEX57K"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {path} is not UTF-8 ({error}), wanted a document of EURLEX57K") from error
    _check_law(path, law)
    head, body = [law["header"], law["recitals"]], law["main_body"]
    sections = [*body, *head[::-1]] if inverted else [*head, *body]
    return WORD.findall("\n".join(sections).lower()), law["concepts"]


def _check_law(path: Path, law: Any) -> None:
    if not isinstance(law, dict):
        raise ValueError(f"path: {path} holds a {type(law).__name__}, wanted an object, a document of EURLEX57K")
    if missing := {"header", "recitals", "main_body", "concepts"} - set(law):
        raise ValueError(f"path: {path} has no {', '.join(sorted(missing))}, wanted a document of EURLEX57K")
    for field, several in (("header", False), ("recitals", False), ("main_body", True), ("concepts", True)):
        value = law[field]
        texts = value if several and isinstance(value, list) else [value]
        if isinstance(value, list) != several or not all(isinstance(text, str) for text in texts):
            wanted = "a list of texts" if several else 'a text ("" for none)'
            raise ValueError(
                f"path: {path} has {field} = {json.dumps(value)[:60]}, wanted {wanted}; mend or leave out the file"
            )
