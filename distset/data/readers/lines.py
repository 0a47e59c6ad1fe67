"""One set a line: baskets of items, as frequent-item-set mining has them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from distset.data.bag import Bag
from distset.data.readers.files import naming
from distset.data.splits import Split

__all__ = ["Baskets", "baskets"]

LARGEST = 2**24  # float32 keeps whole numbers so far


def baskets(path: str | Path) -> Baskets:
    """Sets of item numbers, a line a set, blanks between them (``retail.dat``, also gzipped); lines without items are left
    out. Elements are the numbers, ``(n, 1)`` float32.

    Args:
        path: the file.

    Raises:
        ValueError: for a file that is not there, or a line that holds something else than numbers up to 2^24.

    References:
        Brijs, Swinnen, Vanhoof, Wets: Using association rules for product assortment decisions. KDD 1999.
    """
    return Baskets(Path(path))


class Baskets:
    """See `baskets`; a `Source`.

    Attributes:
        items, borders: set ``i`` is ``items[borders[i]:borders[i + 1]]``.
    """

    def __init__(self, path: Path) -> None:
        self.splits: list[Split] = []
        with naming(path):
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
                lines = file.read().splitlines()
            found = [line.split() for line in lines]
            for number, items in enumerate(found, 1):
                if not all(item.isdecimal() and int(item) <= LARGEST for item in items):
                    raise ValueError(
                        f"line {number} is {lines[number - 1][:60]!r}, wanted numbers of 0 to {LARGEST} with blanks between"
                    )
            self.borders = np.cumsum([0, *(len(items) for items in found if items)])
            self.items = np.array([int(item) for items in found for item in items], np.int64)
        self.ids = [f"basket-{number:07d}" for number, items in enumerate(found) if items]
        self._places = {set_id: place for place, set_id in enumerate(self.ids)}

    def read(self, set_id: str) -> Bag:
        place = self._places[set_id]
        items = self.items[self.borders[place] : self.borders[place + 1]]
        return Bag(set_id, items.astype(np.float32)[:, None])
