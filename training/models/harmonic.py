"""A network over spherical-harmonic coefficients: exactly O(3)-invariant, whatever its weights.

Shape legend, besides those of `training.dataset` and `training.models.spherical`: K learned
invariants of a degree, F fixed invariants, D numbers stored of each crystal.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from training.dataset import CloudSet
from training.models.descriptors import invariants
from training.models.spherical import CHANNELS, COMPONENTS, DEGREES, SLICES, coefficients
from training.peers import Dropout

MIXINGS = 8
_SAMPLE = 4096  # crystals whose statistics stand for the training set
_CONSTANT = 1e-4  # a column that varies less than this, relatively, tells nothing but rounding


@dataclass(frozen=True, slots=True)
class Coefficients:
    """All that the network sees of a set's crystals, computed once for all epochs."""

    values_ND: Tensor

    def batch(self, rows_B: Tensor) -> Tensor:
        """(B, D) of some crystals."""
        return self.values_ND[rows_B]


def fixed_invariants(data: CloudSet) -> Tensor:
    """(N, F) `descriptors.invariants` without the power spectra, which precede the last columns.

    The last columns are the singular values, as many as there are components of degree > 0.
    """
    columns_NF = torch.from_numpy(invariants(data))
    singular = columns_NF.shape[1] - (COMPONENTS - 1)
    power = singular - len(DEGREES[1:]) * CHANNELS
    return torch.cat([columns_NF[:, :power], columns_NF[:, singular:]], dim=1)


class Harmonic(nn.Module):
    """Learned power spectra and fixed invariants of the cloud, then a residual head.

    The channels of `spherical.coefficients` are fixed functions of |q| times fixed functions of I.
    A linear mixing of the channels of one degree, the same for all orders m, makes of them a
    learned function of |q| and I and commutes with rotation; the scalar product over m of two
    mixings is invariant to rotation and reflection (Kondor, arXiv 1803.01588; Bartók et al.,
    PRB 87, 184115). Beside these the head sees `descriptors.invariants`, but for their power
    spectra of single channels, by which the network learned its training crystals by heart. The
    learned spectra would do so, too; they start at no influence and under heavy dropout.

    Training never touches the points: its time does not depend on their number.

    Args:
        classes: C.
        width: channels of the head.
    """

    rotates: ClassVar[bool] = False

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        fixed = fixed_invariants(_no_crystals()).shape[1]
        self.q_max: Tensor
        self.intensity_scale: Tensor
        self.floor_A: Tensor
        self.centre_F: Tensor
        self.spread_F: Tensor
        self.register_buffer("q_max", torch.tensor(1.0))
        self.register_buffer("intensity_scale", torch.tensor(1.0))
        self.register_buffer("floor_A", torch.ones(CHANNELS))
        self.register_buffer("centre_F", torch.zeros(fixed))
        self.register_buffer("spread_F", torch.ones(fixed))
        angular = DEGREES[1:]
        self.mixings = nn.ParameterList(
            nn.Parameter(torch.randn(CHANNELS, 2 * MIXINGS) / CHANNELS**0.5) for _ in angular
        )
        self.fixed = nn.Linear(fixed, width)
        spectra = len(angular) * MIXINGS
        influence = nn.Linear(spectra, width, bias=False)
        nn.init.zeros_(influence.weight)
        self.learned = nn.Sequential(nn.LayerNorm(spectra), Dropout(0.5), influence)
        self.head = nn.Sequential(
            Residual(width),
            Residual(width),
            nn.LayerNorm(width),
            nn.Linear(width, classes),
        )

    def scale_to(self, train: CloudSet) -> None:
        """Take all units from the training crystals."""
        if len(train) > _SAMPLE:
            train = train.subset(np.linspace(0, len(train) - 1, _SAMPLE).astype(int))
        present = train.intensity_P[train.intensity_P > 0]
        if len(present):
            self.intensity_scale.fill_(float(present.median()))
        radius = np.quantile(train.q_P3.norm(dim=1).numpy(), 0.99) if len(train.q_P3) else 0.0
        # Not the largest: with miller:m, the smallest cells reach far beyond all others.
        self.q_max.fill_(float(radius) or 1.0)
        sums_NA = self._coefficients(train)[:, :, 0]
        # A tenth of the usual: channels that hold next to nothing must not be blown up.
        self.floor_A.copy_((0.1 * sums_NA.square().mean(dim=0).sqrt()).clamp_min(1e-6))
        fixed_NF = fixed_invariants(train)
        low_F, centre_F, high_F = torch.from_numpy(
            np.quantile(fixed_NF.numpy(), (0.16, 0.5, 0.84), axis=0)
        ).float()
        spread_F = (high_F - low_F).maximum(0.2 * fixed_NF.std(dim=0, correction=0))
        size_F = fixed_NF.square().mean(dim=0).sqrt()
        self.centre_F.copy_(centre_F)
        self.spread_F.copy_(spread_F.where(spread_F > _CONSTANT * size_F, torch.inf))

    def prepare(self, data: CloudSet) -> Coefficients:
        """Coefficients of degrees 2, 4, 6, relative to degree 0, and standardized invariants."""
        sums_NAM = self._coefficients(data)
        size_NA1 = (sums_NAM[:, :, :1].square() + self.floor_A.cpu()[:, None].square()).sqrt()
        relative_NAM = sums_NAM[:, :, 1:] / size_NA1
        fixed_NF = fixed_invariants(data).to(relative_NAM.dtype)
        fixed_NF = torch.asinh((fixed_NF - self.centre_F.cpu()) / self.spread_F.cpu())
        return Coefficients(torch.cat([relative_NAM.flatten(1), fixed_NF], dim=1))

    def forward(self, batch_BD: Tensor) -> Tensor:
        """(B, C) logits."""
        angular = CHANNELS * (COMPONENTS - 1)
        power_BK = self.power(batch_BD[:, :angular].unflatten(1, (CHANNELS, -1)))
        logits: Tensor = self.head(self.fixed(batch_BD[:, angular:]) + self.learned(power_BK))
        return logits

    def power(self, relative_BAM: Tensor) -> Tensor:
        """(B, 3K) scalar products of the two halves of each degree's mixings, compressed."""
        products = []
        for degree, mixing in zip(DEGREES[1:], self.mixings, strict=True):
            orders = slice(SLICES[degree].start - 1, SLICES[degree].stop - 1)
            mixed_BMK = relative_BAM[:, :, orders].transpose(1, 2) @ mixing
            first, second = mixed_BMK.chunk(2, dim=2)
            products.append(torch.asinh(10 * (first * second).sum(dim=1)))
        return torch.cat(products, dim=1)

    def _coefficients(self, data: CloudSet) -> Tensor:
        return coefficients(data, float(self.q_max), float(self.intensity_scale))


class Residual(nn.Module):
    """x + f(x), normalized before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            Dropout(0.1),
        )

    def forward(self, x_BC: Tensor) -> Tensor:
        """(B, width) → (B, width)."""
        changed: Tensor = x_BC + self.change(x_BC)
        return changed


def _no_crystals() -> CloudSet:
    names, no_points = np.empty(0, dtype=np.str_), torch.zeros(0)
    return CloudSet(
        ids=names,
        groups=names,
        crystal_systems=names,
        labels={},
        offsets=torch.zeros(1, dtype=torch.int64),
        hkl_P3=torch.zeros(0, 3, dtype=torch.int16),
        q_P3=torch.zeros(0, 3),
        intensity_P=no_points,
        multiplicity_P=no_points.long(),
        lattice_N33=torch.zeros(0, 3, 3),
    )
