"""Random numbers that belong to a crystal and to its reflections, not to a place in an array.

Each number is a hash of (arm, seed, id of the crystal, which draw) and, for those of a point, of
its Miller indices. A crystal is therefore perturbed in the same way in whatever set, order or
shard it stands; the same numbers serve all strengths of an arm, so that doses differ in nothing
else; and no global or sequential generator is touched.

The hash is the finalizer of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied once a word.
"""

import hashlib
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from training.dataset import CloudSet

_STEP = -0x61C8864680B583EB  # 2⁶⁴ divided by the golden ratio, as a signed word
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_BITS = 53  # of a float64's mantissa


class Draws:
    """The random numbers of one arm and seed on one set of clouds, on its device.

    Each call gives new numbers; the same sequence of calls gives the same ones.
    """

    def __init__(self, arm: str, seed: int, data: CloudSet) -> None:
        digest = hashlib.sha256(f"{arm}:{seed}".encode()).digest()
        self._word = int.from_bytes(digest[:8], "big", signed=True)
        self._data = data
        self.drawn = 0
        """Numbers a crystal or point that were drawn so far."""

    @cached_property
    def _key_N(self) -> Tensor:
        return _keys(self._data.ids, self._word).to(self._data.offsets.device)

    @cached_property
    def _key_P(self) -> Tensor:
        h, k, l = self._data.hkl_P3.long().unbind(1)  # noqa: E741
        hkl_P = ((h & 0xFFFF) << 32) | ((k & 0xFFFF) << 16) | (l & 0xFFFF)
        return _mixed(self._key_N[self._data.crystal_P] ^ _mixed(hkl_P + _STEP))

    def uniform_N(self, columns: int) -> Tensor:
        """(N, columns) float64 in (0, 1), of each crystal."""
        return self._uniform(self._key_N, columns)

    def uniform_P(self, columns: int) -> Tensor:
        """(P, columns) float64 in (0, 1), of each stored point."""
        return self._uniform(self._key_P, columns)

    def normal_N(self, columns: int) -> Tensor:
        """(N, columns) float64 of mean 0 and variance 1, of each crystal."""
        return _normal(self.uniform_N(columns))

    def normal_P(self, columns: int) -> Tensor:
        """(P, columns) float64 of mean 0 and variance 1, of each stored point."""
        return _normal(self.uniform_P(columns))

    def _uniform(self, key: Tensor, columns: int) -> Tensor:
        number = torch.arange(self.drawn + 1, self.drawn + columns + 1, device=key.device)
        self.drawn += columns
        drawn = _mixed(key[:, None] + number * _STEP)
        return (_shifted(drawn, 64 - _BITS).double() + 0.5) * 2.0**-_BITS


def _normal(uniform: Tensor) -> Tensor:
    normal: Tensor = torch.special.ndtri(uniform)
    return normal


def _keys(ids: np.ndarray, word: int) -> Tensor:
    """(N,) int64, a hash of each id; the same whatever the longest of them is."""
    width = ids.dtype.itemsize // 4  # NumPy keeps 4 bytes a character, padded with 0
    codes = np.ascontiguousarray(ids).view(np.uint32).reshape(len(ids), width)
    key = torch.full((len(ids),), word, device="cpu")
    for code in torch.from_numpy(codes.astype(np.int64)).unbind(1):
        key = torch.where(code > 0, _mixed(key + code * _STEP), key)
    return key


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right; PyTorch's repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
