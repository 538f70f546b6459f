"""A network that sees the powder pattern alone: what the lengths and intensities of points know."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.dataset import CloudSet
from training.peers import Dropout

FloatArray = NDArray[np.float32] | NDArray[np.float64]

_BINS = 256
_BLOCK = 4096  # crystals; the temporary arrays take tens of bytes a point


def profiles(data: CloudSet, value_P: FloatArray, q_max: float, bins: int) -> NDArray[np.float64]:
    """(N, bins) sums of `value_P` over all points near |q| = bin · q_max / (bins − 1).

    A point is shared linearly between the two nearest bins: sums are continuous in |q|. `value_P`
    is of stored points, which count with their multiplicity.
    """
    width = bins + 2  # two more, dropped in the end, for the points beyond
    place_P = data.q_P3.double().norm(dim=1).numpy() * ((bins - 1) / q_max)
    crystal_P, offsets = data.crystal_P.numpy(), data.offsets.numpy()
    out = np.empty((len(data), bins))
    for start in range(0, len(data), _BLOCK):
        stop = min(start + _BLOCK, len(data))
        points = slice(offsets[start], offsets[stop])
        place = np.minimum(place_P[points], bins)
        lower = place.astype(np.int64)
        slot = (crystal_P[points] - start) * width + lower
        weight = value_P[points] * data.multiplicity_P[points].numpy()
        upper_weight = weight * (place - lower)
        size = (stop - start) * width
        sums = np.bincount(slot, weight - upper_weight, size)
        sums += np.bincount(slot + 1, upper_weight, size)
        out[start:stop] = sums.reshape(-1, width)[:, :bins]
    return out


@dataclass(frozen=True, slots=True)
class Profiles:
    """The prepared patterns of a set."""

    pattern_NCQ: Tensor  # float32; Q bins

    def batch(self, rows_B: Tensor) -> Tensor:
        """Patterns of some crystals."""
        return self.pattern_NCQ[rows_B]


class PowderCNN(nn.Module):
    """Residual 1D convolutions over the powder pattern: exactly invariant to rotation and order.

    Channels of the input are log(1 + intensity / scale) and log(1 + number of points) of each bin,
    I(000) in the first. Normalization is within a crystal, so that no answer depends on the
    neighbours in the batch.

    Args:
        classes: C.
        width: channels of the hidden layer of the head; the convolutions have half as many.
    """

    rotates: ClassVar[bool] = False

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.q_max: Tensor
        self.intensity_scale: Tensor
        self.register_buffer("q_max", torch.tensor(1.0))
        self.register_buffer("intensity_scale", torch.tensor(1.0))
        channels, stages = width // 2, 4
        self.stem = nn.Conv1d(2, channels, 7, stride=2, padding=3)
        self.stages = nn.ModuleList(_Stage(channels) for _ in range(stages))
        self.head = nn.Sequential(
            nn.GELU(),
            nn.Conv1d(channels, channels // 4, 1),
            nn.Flatten(),
            nn.LayerNorm(channels // 4 * (_BINS >> (1 + stages))),
            Dropout(0.3),
            nn.Linear(channels // 4 * (_BINS >> (1 + stages)), width),
            nn.GELU(),
            nn.Linear(width, classes),
        )

    def scale_to(self, train: CloudSet) -> None:
        """Take the range in |q| and the unit of intensity from the training crystals."""
        q_P = train.q_P3.norm(dim=1).numpy()
        # Not the largest: with miller:m, the smallest cells reach far beyond all others.
        self.q_max.fill_(float(np.quantile(q_P, 0.999)) if q_P.any() else 1.0)
        sums = profiles(train, train.intensity_P.numpy(), float(self.q_max), _BINS)
        self.intensity_scale.fill_(float(np.median(sums[sums > 0])) if sums.any() else 1.0)

    def prepare(self, data: CloudSet) -> Profiles:
        """The patterns of a set."""
        q_max = float(self.q_max)
        intensity = profiles(data, data.intensity_P.numpy(), q_max, _BINS)
        points = profiles(data, np.ones(len(data.q_P3)), q_max, _BINS)
        channels = np.stack([intensity / float(self.intensity_scale), points], axis=1)
        return Profiles(torch.from_numpy(np.log1p(channels)).to(data.q_P3.dtype))

    def forward(self, pattern_BCQ: Tensor) -> Tensor:
        """(B, C) logits."""
        hidden = self.stem(pattern_BCQ.to(self.stem.weight.dtype))
        for stage in self.stages:
            hidden = stage(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class _Stage(nn.Module):
    """A residual block, then half the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.GELU(),
            nn.Conv1d(channels, channels, 5, padding=2, groups=4),
            nn.GroupNorm(1, channels),
            nn.GELU(),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, hidden_BCQ: Tensor) -> Tensor:
        """(B, channels, Q) → (B, channels, Q/2)."""
        return nn.functional.avg_pool1d(hidden_BCQ + self.change(hidden_BCQ), 2)
