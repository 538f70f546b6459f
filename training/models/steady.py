"""Columns for trees that do not tell how a crystal was turned, or in which order it was stored.

A tree cuts at a number that it has seen, so that the last bit of a column can decide: of two clouds
of one crystal that differ by rounding, one goes left, the other right. Rounded to few digits,
both are the same number, but where rounding itself has its boundary between them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = 12  # kept of a number: a part in 4,096 to 8,192
_LEAST = 2.0**-6  # of the largest beside it; below it a number has fewer digits


def steady(columns_NF: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(N, F) rounded to `BITS` significant bits, and of small numbers to what large ones are.

    Columns of one kind and unit belong together: sums that cancel are as wrong as what they are
    made of is, not as they are themselves. NaN stays.
    """
    columns = np.asarray(columns_NF, dtype=np.float64)
    size = np.max(np.abs(columns), axis=1, keepdims=True, initial=0.0, where=~np.isnan(columns))
    _, exponent = np.frexp(np.maximum(np.abs(columns), _LEAST * size))
    steps = exponent - BITS
    answer: NDArray[np.float64] = np.ldexp(np.rint(np.ldexp(columns, -steps)), steps)
    return answer
