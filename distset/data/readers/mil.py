"""The classic benchmarks of multiple instance learning (MUSK, Elephant, Fox, ...), one npz a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distset.data.bag import Bag
from distset.data.readers.files import naming
from distset.data.splits import Split, hold_out
from distset.seeds import seed_for

__all__ = ["Classic", "classic"]


def classic(path: str | Path, *, val: float = 0.15, seed: int = 0) -> Classic:
    """Bags of one file: ``X (elements, D)``, ``ptr`` (bag i is ``X[ptr[i]:ptr[i+1]]``), ``y (bags)`` and, if shipped,
    ``folds_train (repetitions, folds, bags)``: the training masks of repeated cross-validation, which become the splits.

    Args:
        path: the npz file.
        val: share of a fold's training bags to choose on; the file only says train and test.
        seed: of their choice.
    """
    return Classic(Path(path), val, seed)


class Classic:
    """See `classic`; a `Source`."""

    def __init__(self, path: Path, val: float, seed: int) -> None:
        self._path = path
        with naming(path), np.load(path, allow_pickle=False) as archive:
            if missing := {"X", "ptr", "y"} - set(archive.files):
                raise ValueError(f"holds {', '.join(archive.files)}, lacks {', '.join(sorted(missing))}")
            self._x, self._ptr, self._y = archive["X"], archive["ptr"], archive["y"]
            folds = archive["folds_train"] if "folds_train" in archive.files else None
            if len(self._ptr) != len(self._y) + 1 or self._ptr[-1] != len(self._x):
                raise ValueError(f"ptr has {len(self._ptr)} borders for {len(self._y)} bags and {len(self._x)} elements")
            if folds is not None and folds.shape[-1] != len(self._y):
                raise ValueError(f"folds_train has shape {folds.shape}, wanted {len(self._y)} bags in the last dimension")
        self.splits = [] if folds is None else self._splits(folds.reshape(-1, folds.shape[-1]).astype(bool), val, seed)

    @property
    def ids(self) -> list[str]:
        return [f"bag-{number:04d}" for number in range(len(self._y))]

    def read(self, set_id: str) -> Bag:
        number = int(set_id.removeprefix("bag-"))
        rows = slice(int(self._ptr[number]), int(self._ptr[number + 1]))
        return Bag(set_id, self._x[rows], label=str(int(self._y[number])), extra={"source": self._path.name})

    def _splits(self, masks: np.ndarray, val: float, seed: int) -> list[Split]:
        """A fold a mask; the sets to choose on are taken out of train, stratified."""
        found = []
        for number, mask in enumerate(masks):
            train = {set_id: str(int(y)) for set_id, y, kept in zip(self.ids, self._y, mask) if kept}
            held = [set_id for set_id, kept in zip(self.ids, mask) if not kept]
            found.append(Split(*hold_out(train, share=val, seed=seed_for(seed, "val", number)), held))
        return found
