"""Sets made up on the spot: Gaussian bags for tests and speed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distset.data.bag import Bag
from distset.seeds import seed_for

__all__ = ["gaussian_bags"]


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
