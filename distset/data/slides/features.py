"""Features of patches by any encoder, as the patches are cut: no image is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distset.data.bag import Bag
from distset.data.schema import DTYPES
from distset.data.slides.source import Slides
from distset.data.splits import Split
from distset.seeds import seed_for, seeded

__all__ = ["Features"]


class Features:
    """A `Source` of vectors, one a patch.

    Args:
        slides: where the patches come from.
        encoder: a function of the patch's shape ``(3, size, size)`` that gives a module from bytes ``(M, 3, size, size)`` to
            features ``(M, D)``: any of `distset.tasks.backbones`, or your own. It is called once in each process that works.
        batch: patches encoded at once.
        precision: of the features, a floating-point name in `distset.data.schema.DTYPES`.
        device: "auto" for the GPU where there is one, else as torch calls it.

    Raises:
        ValueError: for a batch below 1, an unknown precision.
    """

    apart = True
    heavy = True  # what it holds is worth keeping from one set to the next

    def __init__(
        self,
        slides: Slides,
        encoder: Callable[..., nn.Module],
        *,
        batch: int = 64,
        precision: str = "float32",
        device: str = "auto",
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: got {batch}, wanted at least 1 patch at once")
        if precision not in DTYPES or not DTYPES[precision].is_floating_point:
            raise ValueError(f"precision: got {precision!r}, wanted float16, bfloat16, float32 or float64")
        self.slides, self.encoder, self.batch, self.precision, self.device = slides, encoder, batch, precision, device
        self._module: nn.Module | None = None

    @property
    def ids(self) -> list[str]:
        return self.slides.ids

    @property
    def splits(self) -> list[Split]:
        return self.slides.splits

    def size(self, set_id: str) -> int:
        return self.slides.size(set_id)

    def read(self, set_id: str) -> Bag:
        """The features of the slide's patches.

        Raises:
            ValueError: as `Slides.read`.
            RuntimeError: for an encoder that gives no vectors: no fault of the slide's.
        """
        with self.slides.open(set_id) as patches:
            rows = torch.cat(list(self._encoded(patches.pixels())))
        return self.slides.bag(set_id, rows, patches)

    def _encoded(self, pixels: Iterator[np.ndarray]) -> Iterator[Tensor]:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)
        if self._module is None:
            size = self.slides.plan.patch_size
            with seeded(seed_for("encoder"), torch.device("cpu")):  # weights that are drawn are those of every process
                self._module = self.encoder(shape=(3, size, size)).eval().to(device)
        while batch := list(islice(pixels, self.batch)):
            images = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous().to(device)
            with torch.inference_mode():
                found = self._module(images)
            if found.dim() != 2 or len(found) != len(batch):
                raise RuntimeError(f"encoder: gave {tuple(found.shape)} for {len(batch)} patches, wanted ({len(batch)}, D)")
            yield found.to("cpu", DTYPES[self.precision])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_module": None}
