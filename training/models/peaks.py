"""Maxima of a periodic map.

Shape legend: X × Y × Z a grid over one cell.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

FloatArray = NDArray[np.float64]


def peaks_of(density_XYZ: FloatArray, most: int) -> tuple[FloatArray, FloatArray]:
    """Heights and fractional places of the highest maxima, both interpolated by parabolas."""
    index = maxima(density_XYZ)[:most]
    value = density_XYZ[tuple(index.T)]
    height, place = value.copy(), index.astype(np.float64)
    for axis in range(3):
        beside = []
        for step in (-1, 1):
            moved = index.copy()
            moved[:, axis] = (moved[:, axis] + step) % density_XYZ.shape[axis]
            beside.append(density_XYZ[tuple(moved.T)])
        bend = np.minimum(beside[0] + beside[1] - 2 * value, -1e-9)
        step_N = (0.5 * (beside[0] - beside[1]) / bend).clip(-0.5, 0.5)
        place[:, axis] += step_N
        height += 0.25 * (beside[1] - beside[0]) * step_N
    return height, place / np.array(density_XYZ.shape)


def maxima(density_XYZ: NDArray[Any]) -> NDArray[np.int64]:
    """(any, 3) indices of points not lower than their 26 neighbours, highest first."""
    top = density_XYZ >= maximum_filter(density_XYZ, 3, mode="wrap") - 1e-12
    index = np.argwhere(top)
    return index[np.argsort(-density_XYZ[top], kind="stable")]
