"""Why a bag got its score, written down: a table of its elements, heat-maps, GeoJSON, the elements that say most.

Everything comes from one stream over the set's explanation, so a set may be of any size.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from distset.explain import explain_set, score_alone
from distset.report import ElementTable, Extremes, GeoJson, Heatmap, contact_sheet, load_image, pick_elements, write_table
from distset.sets import Chunk
from distset.tasks.bags import BagTask

__all__ = ["ExplainPlan", "Geometry", "element_scores", "explain_bag", "folder_name"]

log = logging.getLogger("distset")
RED, BLUE = (203, 24, 29), (33, 102, 172)


class ExplainPlan(NamedTuple):
    """What to write about the elements of a set.

    Attributes:
        target: the class whose score is explained in pictures; the second of two classes, the likeliest of more, if None.
        alone: also the probability of each element as a bag of its own.
        png: heat-maps of attention and contribution, where elements have coordinates.
        geojson: patches for QuPath, where elements have coordinates in pixels.
        top: how many elements of highest and of lowest contribution to list (and to show, where elements are images).
        images: folder of the images that the coordinates belong to; what the store says of a set's ``image`` is looked up
            in it.
        patch_size: side of a patch in level-0 pixels; what the store says if None, else the size of the elements that are
            images, else the spacing of the coordinates.
    """

    target: str | None = None
    alone: bool = False
    png: bool = True
    geojson: bool = False
    top: int = 16
    images: str | None = None
    patch_size: float | None = None


class Geometry(NamedTuple):
    """Where the elements lie.

    Attributes:
        corners: upper left corners ``(N, 2)``.
        patch: ``(width, height)`` of a patch.
        pixels: whether both are in pixels of the full-resolution image (level 0).
    """

    corners: NDArray
    patch: tuple[float, float]
    pixels: bool

    @classmethod
    def of(cls, bag: Any, patch_size: float | None = None) -> Geometry | None:
        """The geometry of a set in a store; None without coordinates. See `ExplainPlan.patch_size`."""
        coords = bag.coords()
        if coords is None:
            return None
        corners, extra = coords.numpy(), bag.record.extra
        size = extra.get("patch_size") if patch_size is None else patch_size
        if size is None and len(bag.element_shape) == 3:
            size = [bag.element_shape[2], bag.element_shape[1]]
        patch = (spacing(corners),) * 2 if size is None else tuple(np.broadcast_to(np.asarray(size, float), 2).tolist())
        if extra.get("anchor", "corner") != "corner":
            corners = corners - (np.asarray(patch) - 1) / 2  # the coordinates are those of the middle pixel
        return cls(corners, patch, extra.get("coords_unit", "px") == "px")


class Elements(NamedTuple):
    """What is said about the elements of one chunk: ``(N)`` attention (mean over slots), ``(N, C)`` the rest."""

    start: int
    attention: NDArray
    contribution: NDArray
    alone: NDArray | None

    def towards(self, target: int) -> NDArray:
        """Contributions ``(N)`` to a class; two classes share one column, of the second."""
        if self.contribution.shape[1] == 1:
            return self.contribution[:, 0] if target == 1 else -self.contribution[:, 0]
        return self.contribution[:, target]


def element_scores(task: BagTask, bag: Any, *, alone: bool = False) -> Iterator[Elements]:
    """Attention and contribution of every element of a bag (and its probabilities as a bag of its own), chunk by chunk.

    Contributions are those to the task's logits: one column for two classes, else one a class.
    """

    def logits(encoding: Any) -> Tensor:
        found = task.model.head(encoding)
        return (found[0] if isinstance(found, tuple) else found).float()

    def probabilities(encoding: Any) -> Tensor:
        z = logits(encoding)
        return torch.stack([-z, z], -1).squeeze(-2).mul(0.5).softmax(-1) if z.shape[-1] == 1 else z.softmax(-1)

    singles = score_alone(task.model.encoder, bag, probabilities) if alone else None
    for part in explain_set(task.model.encoder, bag, logits, seed=0):
        alone_part = None if singles is None else next(singles).double().cpu().numpy()
        yield Elements(
            part.start,
            part.attention.double().mean(-1).cpu().numpy(),
            part.contribution.double().cpu().numpy(),
            alone_part,
        )


def explain_bag(task: BagTask, bag: Any, folder: Path, plan: ExplainPlan, probabilities: Sequence[float]) -> Path:
    """Write what `ExplainPlan` asks for about one bag (a `ParquetSet`) into ``folder``.

    Args:
        probabilities: of the bag, for the titles.

    Returns:
        The path of ``elements.parquet``.

    Raises:
        ValueError: for a target that is not a class.
    """
    target = target_class(task, plan.target, probabilities)
    name = task.classes[target]
    folder.mkdir(parents=True, exist_ok=True)
    geometry = Geometry.of(bag, plan.patch_size)
    extremes = Extremes(max(plan.top, 1))
    picture = None if geometry is None or not plan.png else _Picture(bag, geometry, plan)
    describe = _Describer(bag, geometry, task.classes)
    with ExitStack() as stack:
        table = stack.enter_context(ElementTable(folder / "elements.parquet"))
        geojson = _geojson(stack, bag, folder, plan, geometry, name)
        for part in element_scores(task, bag, alone=plan.alone):
            signed = part.towards(target)
            table.add(describe(part))
            extremes.add(part.start, signed)
            if geometry is None:
                continue
            corners = geometry.corners[part.start : part.start + len(signed)]
            if picture is not None:
                picture.add(corners, signed, part.attention)
            if geojson is not None:
                kinds = [name if value > 0 else _other_than(name) for value in signed]
                geojson.add(corners, {"attention": part.attention, "contribution": signed}, kinds)
    if picture is not None:
        picture.draw(folder, bag.name, name, probabilities[target])
    if plan.top > 0:
        _write_extremes(folder, bag, extremes, geometry, name)
    return folder / "elements.parquet"


class _Describer:
    """The columns of the table of elements."""

    def __init__(self, bag: Any, geometry: Geometry | None, classes: Sequence[str]) -> None:
        self.geometry, self.classes = geometry, list(classes)
        self.rows, self.labels = bag.rows().numpy(), bag.instance_labels()

    def __call__(self, part: Elements) -> dict[str, NDArray]:
        here = slice(part.start, part.start + len(part.attention))
        columns = {"element": np.arange(here.start, here.stop), "row": self.rows[here]}
        if self.geometry is not None:
            columns |= {"x": self.geometry.corners[here, 0], "y": self.geometry.corners[here, 1]}
        if self.labels is not None:
            columns["label"] = self.labels[here].numpy()
        columns["attention"] = part.attention
        explained = self.classes[1:] if len(self.classes) == 2 else self.classes
        columns |= {f"contribution_{name}": part.contribution[:, c] for c, name in enumerate(explained)}
        if part.alone is not None:
            columns |= {f"alone_{name}": part.alone[:, c] for c, name in enumerate(self.classes)}
        return columns


class _Picture:
    """Heat-maps of contribution and attention over the image, or over the patches themselves where it is not at hand."""

    def __init__(self, bag: Any, geometry: Geometry, plan: ExplainPlan) -> None:
        self.image = _image_of(bag, plan)
        if self.image is not None:
            self.maps = [Heatmap(self.image[1], geometry.patch) for _ in range(2)]
        else:
            self.maps = [Heatmap.around(geometry.corners, geometry.patch) for _ in range(2)]
        self.patches = iter(bag.map(_elements)) if self.image is None and _are_images(bag) else None

    def add(self, corners: NDArray, contribution: NDArray, attention: NDArray) -> None:
        self.maps[0].add(corners, contribution)
        self.maps[1].add(corners, attention)
        if self.patches is not None:
            self.maps[0].paste(corners, next(self.patches))

    def draw(self, folder: Path, name: str, target: str, probability: float) -> None:
        behind = self.maps[0].background if self.image is None else self.image[0]
        label, note = f"contribution to the logit of class {target}", f"P({target}) = {probability:.3f}"
        contribution, attention = self.maps
        contribution.draw(folder / "contribution.png", title=name, note=note, label=label, signed=True, image=behind)
        label = "attention, percentile"
        attention.draw(folder / "attention.png", title=name, note=note, label=label, signed=False, image=behind)


def target_class(task: BagTask, name: str | None, probabilities: Sequence[float]) -> int:
    """The number of the class that is explained; see `ExplainPlan.target`."""
    if name is None:
        return 1 if len(task.classes) == 2 else int(np.argmax(probabilities))
    name = str(name)  # a command line makes a number of the class "1"
    if name not in task.classes:
        raise ValueError(f"target: got {name!r}, wanted one of the classes {', '.join(task.classes)}")
    return task.classes.index(name)


def spacing(corners: NDArray) -> float:
    """The smallest distance between neighbouring columns or rows of patches on a grid; 1 for a single patch."""
    gaps = [np.diff(np.unique(corners[:, axis])) for axis in (0, 1)]
    found = np.concatenate(gaps)
    return float(found.min()) if len(found) else 1.0


def folder_name(set_id: str) -> str:
    """A set's id as the name of a folder; ids that need changes keep apart by a digest."""
    safe = re.sub(r"[^\w.-]+", "_", set_id).lstrip(".")
    return safe if safe == set_id else f"{safe}-{hashlib.blake2b(set_id.encode(), digest_size=4).hexdigest()}"


def _are_images(bag: Any) -> bool:
    return len(bag.element_shape) == 3 and bag.dtype == "uint8" and bag.element_shape[0] in (1, 3)


def _elements(chunk: Chunk) -> NDArray:
    return chunk.elements.numpy()


def _image_of(bag: Any, plan: ExplainPlan) -> tuple[NDArray, tuple[int, int]] | None:
    """The image that the coordinates belong to, and its level-0 size; None where there is none at hand."""
    named = bag.record.extra.get("image")
    if named is None:
        return None
    path = Path(named) if plan.images is None else Path(plan.images) / Path(named).name
    if not path.is_file():
        log.warning("set %s: its image %s is not there; set explain.images to the folder that holds it", bag.name, path)
        return None
    return load_image(path)


def _geojson(
    stack: ExitStack, bag: Any, folder: Path, plan: ExplainPlan, geometry: Geometry | None, target: str
) -> GeoJson | None:
    if not plan.geojson or geometry is None:
        return None
    if not geometry.pixels:
        log.warning("set %s: its coordinates are not in pixels of level 0; no GeoJSON is written", bag.name)
        return None
    colors = {target: RED, _other_than(target): BLUE}
    file = GeoJson(folder / "patches.geojson", patch=geometry.patch, name=bag.name, colors=colors)
    return stack.enter_context(file)


def _other_than(target: str) -> str:
    """What the patches are called that speak against a class, which may itself be "other"."""
    return "other" if target != "other" else "not other"


def _write_extremes(folder: Path, bag: Any, extremes: Extremes, geometry: Geometry | None, target: str) -> None:
    """``top.csv`` and ``top.parquet``, and a sheet of the patches where elements are images."""
    frames, groups = [], []
    for kind, ranked in (("top", extremes.top), ("bottom", extremes.bottom)):
        frame = pd.DataFrame({"kind": kind, "element": ranked.positions, "contribution": ranked.values})
        if geometry is not None:
            frame[["x", "y"]] = geometry.corners[ranked.positions]
        frames.append(frame)
        if _are_images(bag):
            what = f"{'highest' if kind == 'top' else 'lowest'} contribution to the logit of class {target}"
            patches = pick_elements(bag, ranked.positions.tolist()).numpy()
            groups.append((what, patches, [f"{value:+.3g}" for value in ranked.values]))
    write_table(pd.concat(frames, ignore_index=True), folder / "top")
    if groups:
        contact_sheet(folder / "top.png", groups, title=bag.name)
