"""BeerAdvocate reviews with ratings by aspect and annotated words (McAuley et al. 2012, in the files of Lei et al. 2016).

A line of ``reviews.aspect1.train.txt`` (or ``.heldout.txt``, packed by gzip or not) is five ratings in [0, 1], a tab and
the words of a review; a line of ``annotations.json`` is ``{"x": [words], "y": [ratings], "0": [[first, end], ...], ...}``
with the ranges of words that speak of an aspect.

References:
    McAuley, Leskovec, Jurafsky 2012, "Learning Attitudes and Attributes from Multi-Aspect Reviews",
    https://arxiv.org/abs/1210.3926.
    Lei, Barzilay, Jaakkola 2016, "Rationalizing Neural Predictions", https://arxiv.org/abs/1606.04155.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ASPECTS", "RatedReview", "aspect_number", "read_annotations", "read_ratings"]

ASPECTS = ("look", "smell", "palate", "taste", "overall")


class RatedReview(NamedTuple):
    """A review.

    Attributes:
        words: in reading order.
        rating: of one aspect, in [0, 1].
        marked: bool, True for the words that people found to speak of the aspect; None where nobody looked.
    """

    words: list[str]
    rating: float
    marked: NDArray[np.bool_] | None = None


def read_ratings(path: str | Path, aspect: str) -> list[RatedReview]:
    """The reviews of a ``.txt`` or ``.txt.gz`` file with their ratings of an aspect.

    Raises:
        ValueError: for an unknown aspect, a file that is missing or broken, a line of another form, a rating out of [0, 1].
    """
    column, found = aspect_number(aspect), []
    for number, line in _lines(Path(path)):
        ratings, tab, text = line.partition("\t")
        try:
            rating = float(ratings.split()[column])
        except (IndexError, ValueError) as error:
            raise ValueError(f"path: line {number} of {path} is {line[:60]!r}, wanted ratings, a tab and words") from error
        words = text.split()
        if not tab or not words:
            raise ValueError(f"path: line {number} of {path} has no words after its ratings")
        found.append(RatedReview(words, _checked_rating(rating, aspect, number, path)))
    return found


def read_annotations(path: str | Path, aspect: str) -> list[RatedReview]:
    """The reviews of ``annotations.json`` whose words were annotated for an aspect; those without a range are left out.

    Raises:
        ValueError: for an unknown aspect, a file that is missing or broken, a line of another form, a rating out of [0, 1].
    """
    column, found = aspect_number(aspect), []
    for number, line in _lines(Path(path)):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"path: line {number} of {path} is {line[:60]!r}, wanted JSON ({error})") from error
        if missing := {"x", "y", str(column)} - set(item if isinstance(item, dict) else ()):
            raise ValueError(f"path: line {number} of {path} has no {', '.join(sorted(missing))}, wanted an annotation")
        marked = np.zeros(len(item["x"]), bool)
        try:
            rating = float(item["y"][column])
            for first, end in item[str(column)]:
                marked[first:end] = True
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"path: line {number} of {path} has y = {item['y']} and ranges {item[str(column)]} for {aspect}, wanted "
                f"{len(ASPECTS)} ratings and pairs of word numbers"
            ) from error
        if marked.any():
            found.append(RatedReview(list(item["x"]), _checked_rating(rating, aspect, number, path), marked))
    return found


def aspect_number(aspect: str) -> int:
    """Its place among the ratings, and in the names of files.

    Raises:
        ValueError: for an unknown aspect.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect: got {aspect!r}, wanted one of {', '.join(ASPECTS)}")
    return ASPECTS.index(aspect)


def _checked_rating(rating: float, aspect: str, number: int, path: str | Path) -> float:
    if not 0 <= rating <= 1:
        raise ValueError(f"path: line {number} of {path} rates the {aspect} {rating}, wanted a rating in [0, 1]")
    return rating


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}, wanted one of the BeerAdvocate files")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            yield from ((number, line.rstrip("\n")) for number, line in enumerate(file, 1) if line.strip())
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"path: {path} cannot be read as text ({error}); fetch it again") from error
