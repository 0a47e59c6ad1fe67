"""One array a bag: ``.pt`` (loaded without running code), ``.npy`` and ``.npz``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distset.data.bag import Bag
from distset.data.readers.files import FileSource, bag_files

__all__ = ["arrays", "pt_files"]

FEATURES = ("features", "feats", "x", "X", "data", "arr_0")
COORDS = ("coords", "coordinates", "xy")
INSTANCE_LABELS = ("instance_labels", "labels", "y_inst")


def pt_files(path: str | Path) -> FileSource:
    """Bags in ``.pt`` files: a tensor ``(N, D)`` or ``(N, C, H, W)``, or a dict with ``features`` and, if there, ``coords``
    and ``instance_labels``. Files are loaded with ``weights_only=True``: they can hold tensors, not code.

    Args:
        path: the folder of files, or the one that holds CLAM's ``pt_files``.
    """
    return FileSource(bag_files(path, (".pt", ".pth"), "pt_files"), _read_pt)


def arrays(path: str | Path) -> FileSource:
    """Bags in ``.npy`` files (an array each) and ``.npz`` files (``features`` and, if there, ``coords`` and
    ``instance_labels``); never unpickled.

    Args:
        path: the folder of files.
    """
    return FileSource(bag_files(path, (".npy", ".npz")), _read_numpy)


def _read_pt(set_id: str, file: Path) -> Bag:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # a file of the old format cannot be mapped
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    return _bag(set_id, loaded)


def _read_numpy(set_id: str, file: Path) -> Bag:
    if file.suffix.lower() == ".npy":
        return _bag(set_id, np.load(file, mmap_mode="r", allow_pickle=False))
    with np.load(file, allow_pickle=False) as archive:
        return _bag(set_id, {name: archive[name] for name in archive.files})


def _bag(set_id: str, loaded: Any) -> Bag:
    if not isinstance(loaded, Mapping):
        if not hasattr(loaded, "shape"):
            raise ValueError(f"holds a {type(loaded).__name__}, wanted an array or a dict with one of {', '.join(FEATURES)}")
        return Bag(set_id, loaded)
    features = _first(loaded, FEATURES)
    if features is None:
        raise ValueError(f"holds {', '.join(map(str, loaded)) or 'nothing'}, wanted one of {', '.join(FEATURES)}")
    coords, labels = _first(loaded, COORDS), _first(loaded, INSTANCE_LABELS)
    return Bag(
        set_id, features, None if coords is None else np.asarray(coords), None if labels is None else np.asarray(labels)
    )


def _first(loaded: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((loaded[name] for name in names if name in loaded), None)
