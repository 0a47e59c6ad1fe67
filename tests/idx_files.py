"""Small folders of idx files, as MNIST comes in."""

from __future__ import annotations

import gzip

import numpy as np


def write_idx(folder, count=12, side=6, classes=1):
    random = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = random.integers(0, 256, (count, side, side), dtype=np.uint8)
        head = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
        labels = bytes([0, 0, 8, 1]) + np.array([count], ">u4").tobytes() + bytes(i % classes for i in range(count))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
