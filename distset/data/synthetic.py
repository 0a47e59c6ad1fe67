"""Sets made up on the spot: bags of handwritten digits (the default of the main job), Gaussian bags for tests and speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distset.data.bag import Bag
from distset.data.schema import need
from distset.data.splits import PARTS, Split
from distset.seeds import seed_for

__all__ = ["DigitBags", "gaussian_bags"]


class DigitBags:
    """Bags of the handwritten digits that scikit-learn ships; a bag is positive where it holds the digit ``target``.

    Elements are the images, uint8 ``(1, 8, 8)``; the instance label is 1 for the digit sought, coordinates lay the digits
    out on a grid. No image is in bags of two parts: the 1,797 are divided first, and each part's bags drawn from its own.
    A `Source` with one split.

    Args:
        bags: how many of them train, val and test hold; half are positive.
        size: the smallest and the largest number of digits in a bag.
        witnesses: share of the digit sought among a positive bag's, at least one.
        target: the digit.
        seed: of everything; a bag does not depend on how many there are.

    Raises:
        ValueError: for a target that is no digit, a part without two bags, a size or share out of range.

    Example:
        >>> from distset.data import DigitBags
        >>> source = DigitBags(bags=(4, 2, 2))
        >>> bag = source.read("train-0001")
        >>> bag.label, bag.elements.shape[1:], bool(bag.instance_labels.any())
        ('1', (1, 8, 8), True)
    """

    def __init__(
        self,
        *,
        bags: Sequence[int] = (300, 100, 100),
        size: Sequence[int] = (20, 60),
        witnesses: float = 0.1,
        target: int = 9,
        seed: int = 0,
    ) -> None:
        if target not in range(10) or len(bags) != 3 or min(bags) < 2:
            raise ValueError(f"target, bags: got {target} and {list(bags)}, wanted a digit and 2 bags or more for each part")
        if not 1 <= size[0] <= size[1] or not 0 < witnesses <= 1:
            raise ValueError(
                f"size, witnesses: got {list(size)} and {witnesses}, wanted 1 <= from <= to and a share in (0, 1]"
            )
        self.size, self.witnesses, self.target, self.seed = size, witnesses, target, seed
        digits = need("sklearn.datasets").load_digits()
        self._pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        self._digit = digits.target
        order = np.random.default_rng(seed_for(seed, "digits")).permutation(len(self._digit))
        self._pools = dict(zip(PARTS, np.split(order, [len(order) * 6 // 10, len(order) * 8 // 10])))
        self.splits = [Split(*map(_names, PARTS, bags))]

    @property
    def ids(self) -> list[str]:
        return [set_id for part in self.splits[0] for set_id in part]

    def read(self, set_id: str) -> Bag:
        part, number = set_id.split("-")
        generator = np.random.default_rng(seed_for(self.seed, "bag", set_id))
        n = int(generator.integers(self.size[0], self.size[1] + 1))
        positive = int(number) % 2
        sought = max(1, round(self.witnesses * n)) if positive else 0
        pool = self._pools[part]
        is_target = self._digit[pool] == self.target
        drawn = [generator.choice(pool[is_target], sought), generator.choice(pool[~is_target], n - sought)]
        images = generator.permutation(np.concatenate(drawn))
        side = int(np.ceil(np.sqrt(n)))
        coords = np.stack([np.arange(n) % side, np.arange(n) // side], -1) * 8.0
        witnesses = (self._digit[images] == self.target).astype(np.int32)
        extra = {"patch_size": 8, "coords_unit": "px", "anchor": "corner"}
        return Bag(set_id, self._pixels[images], coords, witnesses, label=str(positive), extra=extra)


def _names(part: str, count: int) -> list[str]:
    return [f"{part}-{number:04d}" for number in range(count)]


def gaussian_bags(
    *,
    num_sets: int = 100,
    size: int | tuple[int, int] = 1000,
    dim: int = 64,
    dtype: str = "float16",
    witnesses: float = 0.1,
    seed: int = 0,
) -> Iterator[Bag]:
    """Bags of standard normal vectors; in every second one a share of the elements is shifted by 2 in the first 4 features.

    Args:
        num_sets: how many bags.
        size: elements of a bag, or a range from which each bag's is drawn.
        dim: width of an element.
        dtype: of the elements, a floating-point type numpy knows.
        witnesses: share of shifted elements in a positive bag (label "1"); their instance label is 1.
        seed: of everything; bag ``i`` does not depend on the number of bags.
    """
    for number in range(num_sets):
        generator = np.random.default_rng(seed_for(seed, "gaussian", number))
        n = size if isinstance(size, int) else int(generator.integers(size[0], size[1] + 1))
        x = generator.standard_normal((n, dim), dtype=np.float32)
        positive = number % 2
        shifted = np.zeros(n, np.int32)
        shifted[: max(1, round(witnesses * n)) if positive else 0] = 1
        x[:, : min(4, dim)] += 2.0 * shifted[:, None]
        coords = generator.uniform(0, 10_000, (n, 2))
        yield Bag(f"set-{number}", x.astype(dtype), coords, shifted, label=str(positive))
