"""Where on a slide there is tissue: Otsu's threshold on the saturation of its overview."""

from __future__ import annotations

import numpy as np

from distset.data.schema import need

__all__ = ["otsu", "tissue_mask"]


def tissue_mask(picture: np.ndarray, *, median: int = 5, least: int = 15) -> np.ndarray:
    r"""Stained pixels of an overview: saturation :math:`255 (\max - \min) / \max` of the colour, smoothed by a median, above
    Otsu's threshold.

    Args:
        picture: ``(height, width, 3)`` uint8.
        median: edge of the median filter in pixels, odd.
        least: the lowest threshold. Otsu's splits any picture in two, the noise of bare glass as well.

    Returns:
        bool ``(height, width)``.

    References:
        Otsu: A threshold selection method from gray-level histograms. IEEE Transactions on Systems, Man, and Cybernetics
        1979.
    """
    image, filters = need("PIL.Image"), need("PIL.ImageFilter")
    high, low = picture.max(-1).astype(np.float32), picture.min(-1).astype(np.float32)
    saturation = ((high - low) / np.maximum(high, 1) * 255).round().astype(np.uint8)
    smooth = np.asarray(image.fromarray(saturation).filter(filters.MedianFilter(median)))
    return smooth > max(otsu(smooth), least - 1)


def otsu(values: np.ndarray) -> int:
    r"""The threshold t of uint8 values that maximises the variance between those up to t and those above,
    :math:`\omega_0 \omega_1 (\mu_0 - \mu_1)^2`."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    weight = counts.cumsum()
    moment = (counts * np.arange(256)).cumsum()
    between = (moment[-1] * weight - moment * weight[-1]) ** 2 / np.maximum(weight * (weight[-1] - weight), 1e-12)
    return int(between[:-1].argmax())
