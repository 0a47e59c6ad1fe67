"""Features of slides in HDF5: CLAM, TRIDENT and STAMP."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from distset.data.bag import Bag
from distset.data.readers.files import FileSource, bag_files
from distset.data.schema import need

__all__ = ["clam", "stamp", "trident"]

ENDINGS = (".h5", ".hdf5")
SPOOL_BYTES = 2**30  # a dataset beyond this is copied to a scratch file first, and its rows are taken from there


def clam(path: str | Path, *, patch_size: int | None = None) -> FileSource:
    """Bags of CLAM: ``features (N, D)`` and ``coords (N, 2)``, upper left corners in pixels of level 0.

    Args:
        path: the folder of h5 files, or the one that holds ``h5_files``.
        patch_size: edge of a patch in pixels of level 0, which CLAM's feature files do not say; heat-maps need it.

    References:
        Lu et al.: Data-efficient and weakly supervised computational pathology on whole-slide images. Nature Biomedical
        Engineering 2021. https://github.com/mahmoodlab/CLAM
    """
    return FileSource(bag_files(path, ENDINGS, "h5_files"), lambda set_id, file: _features(set_id, file, patch_size))


def trident(path: str | Path) -> FileSource:
    """Bags of TRIDENT: as CLAM's, with attributes (patch size, magnifications, encoder), which are kept.

    Args:
        path: a folder of features, such as ``20x_256px_0px_overlap/features_uni_v1``.

    References:
        Zhang et al.: Accelerating data processing and benchmarking of AI models for pathology. 2025. arXiv:2502.06750
    """
    return FileSource(bag_files(path, ENDINGS), lambda set_id, file: _features(set_id, file, None))


def stamp(path: str | Path) -> FileSource:
    """Bags of STAMP: ``feats`` (or ``patch_embeddings``) and ``coords`` in micrometres.

    Files of STAMP 1, which says no unit and counts 224 a tile, are brought to micrometres (256 a tile) as STAMP does.

    References:
        El Nahhas et al.: From whole-slide image to biomarker prediction: end-to-end weakly supervised deep learning in
        computational pathology. Nature Protocols 2024. https://github.com/KatherLab/STAMP
    """
    return FileSource(bag_files(path, ENDINGS), _stamp_bag)


def _features(set_id: str, file: Path, patch_size: int | None) -> Bag:
    with need("h5py").File(file, "r") as h5:
        features = _rows(_dataset(h5, "features"))
        coords, attributes = None, _attributes(h5) | _attributes(_dataset(h5, "features"))
        if "coords" in h5:
            coords = _without_batch(h5["coords"][()]).astype(np.float64)
            attributes |= _attributes(h5["coords"])
    size = attributes.get("patch_size_level0") or patch_size or _clam_level0(attributes)
    extra = {"patch_size": size, "coords_unit": "px", "anchor": "corner", "attributes": attributes}
    return Bag(set_id, features, coords, extra=extra)


def _stamp_bag(set_id: str, file: Path) -> Bag:
    with need("h5py").File(file, "r") as h5:
        attributes = _attributes(h5)
        if attributes.get("feat_type", "tile") != "tile":
            raise ValueError(
                f"holds one vector a {attributes['feat_type']}, wanted features of tiles: there is no bag to pool"
            )
        features = _rows(_dataset(h5, "feats" if "feats" in h5 else "patch_embeddings"))
        coords = h5["coords"][()].astype(np.float64) if "coords" in h5 else None
    micrometres = attributes.get("tile_size_um") or (attributes.get("tile_size") if attributes.get("unit") == "um" else None)
    if coords is not None and micrometres is None:
        if round(attributes.get("tile_size") or _stride(coords)) != 224:
            raise ValueError("says no unit of its coords, wanted tile_size_um (or tile_size with unit um); extract it again")
        coords, micrometres = coords / 224 * 256, 256.0
    extra = {"patch_size": micrometres, "coords_unit": "um", "anchor": "corner", "attributes": attributes}
    return Bag(set_id, features, coords, extra=extra)


def _dataset(h5: Any, name: str) -> Any:
    if name not in h5:
        raise ValueError(f"has no dataset {name!r}, it holds {', '.join(h5) or 'nothing'}; check which tool wrote it")
    return h5[name]


def _rows(dataset: Any) -> np.ndarray:
    """A dataset's rows, in memory; a large one as a map of a scratch file, whose rows can be taken in any order."""
    shape = dataset.shape[1:] if len(dataset.shape) == 3 and dataset.shape[0] == 1 else dataset.shape
    if dataset.size * dataset.dtype.itemsize <= SPOOL_BYTES:
        return dataset[()].reshape(shape)
    with tempfile.TemporaryFile() as scratch:  # its bytes live on until the map is gone
        rows = np.memmap(scratch, dataset.dtype, "w+", shape=shape)
    step = max(1, (64 * 2**20) // (rows.itemsize * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        block = slice(start, start + step)
        rows[block] = dataset[0, block] if len(dataset.shape) == 3 else dataset[block]
    return rows


def _without_batch(coords: np.ndarray) -> np.ndarray:
    return coords[0] if coords.ndim == 3 and len(coords) == 1 else coords


def _attributes(holder: Any) -> dict[str, Any]:
    """HDF5 attributes as JSON has them."""
    return {name: _plain(value) for name, value in holder.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value if isinstance(value, str | int | float) else str(value)


def _clam_level0(attributes: dict[str, Any]) -> float | None:
    """CLAM's patch files count patch_size at patch_level, which is downsample times level 0."""
    downsample = attributes.get("downsample")
    if "patch_size" not in attributes or downsample is None:
        return None
    return attributes["patch_size"] * float(downsample[0] if isinstance(downsample, list) else downsample)


def _stride(coords: np.ndarray) -> float:
    """The smallest distance between columns of tiles; 0 where there is one."""
    steps = np.diff(np.unique(coords[:, 0]))
    return float(steps.min()) if len(steps) else 0.0
