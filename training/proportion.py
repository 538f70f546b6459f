"""The interval of a share of crystals, such as an error rate, that few groups do not flatter."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from training.metrics import CONFIDENCE, Interval


def wilson(share: Any, number: Any) -> tuple[Any, Any]:
    """Ends of Wilson's 95 % score interval of shares of so many trials: numbers, or arrays."""
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = np.sqrt(z2 * (share * (1 - share) / number + z2 / (4 * number**2))) / (1 + z2 / number)
    return np.clip(middle - half, 0.0, share), np.clip(middle + half, share, 1.0)


def proportion(hits_N: ArrayLike, groups_N: Sequence[str]) -> Interval:
    """Share of true entries with a 95 % interval; NaN for none.

    Wilson's score interval (JASA 22, 209, 1927), which never shrinks to a point when all or no
    entries are true, as a bootstrap would. The number of trials in it is Kish's effective one,
    (Σ n_g)² / Σ n_g² for groups of n_g crystals (Survey Sampling, 1965, section 8.2), as if all
    crystals of a group were hit together: exact for groups of one, else on the safe side.
    """
    hits = np.asarray(hits_N, dtype=np.float64)
    if len(hits) != len(groups_N):
        raise ValueError(f"groups_N has {len(groups_N)} entries for {len(hits)} crystals")
    if not len(hits):
        return Interval(math.nan, math.nan, math.nan)
    _, sizes = np.unique(np.asarray(groups_N, dtype=np.str_), return_counts=True)
    number = float(sizes.sum() ** 2 / (sizes**2).sum())
    share = float(hits.mean())
    low, high = wilson(share, number)
    return Interval(share, float(low), float(high))
