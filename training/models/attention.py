"""A set transformer over the strongest reflections, exactly O(3)- and permutation-invariant.

Tokens know |q| and I; directions enter attention only through P_ℓ(q̂_i·q̂_j), ℓ = 2, 4, 6, which do
not change when a pair ±q is stored by its other mate. By the addition theorem P_ℓ is the scalar
product of two vectors of harmonics (`training.models.spherical`), so that no tensor over pairs is
built: queries, keys and values carry harmonics besides their usual channels. Attention is that of
Vaswani et al., NeurIPS 2017.

Shape legend, besides that of `training.dataset`: T tokens of a crystal (the origin and at most
`POINTS` pairs ±q), D channels of a token, M components of harmonics of degree > 0; of a head: K
channels and numbers a degree, E channels and components of harmonics.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot, scaled_dot_product_attention

from training.dataset import CloudSet, ends_of
from training.models.spherical import DEGREES, harmonics
from training.peers import Dropout

POINTS = 48
HEADS = 4
LAYERS = 2
_SHELLS = 24  # Gaussians of |q|
_ABSENT = 1e-12  # |F|²/V² below any reflection that is present
_GAP = 1e-4
_SAME = 1e-5  # of |q|; a point this close to another's −q is its Friedel mate
_ANGULAR = DEGREES[1:]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The chosen points of N crystals: q (3), I, multiplicity (0: no point); origin first."""

    points_NT5: Tensor

    def batch(self, rows_B: Tensor) -> Tensor:
        """(B, T, 5) of some crystals."""
        return self.points_NT5[rows_B]


def strongest(data: CloudSet, limit: int = POINTS) -> Tokens:
    """The origin, if stored, and of each crystal at most `limit` pairs ±q of largest I/|q|².

    Symmetry-equivalent reflections agree in I and |q| up to rounding and must stay or go
    together: points are ranked by I/|q|², and the list ends at the last of its first `limit` places
    where the next value is lower by more than a part in 10⁴. Hence the choice depends neither on
    orientation nor on order and is never longer than `limit`; clouds of equal intensities keep
    their shortest q; absent reflections (I = 0) come last. Of more than `limit` points that are
    equal in both, none is taken: no rule could take some of them and be invariant. A pair counts
    as one point also where both of its mates are stored, unless they differ in I.
    """
    data = _folded(data)
    count, crystal_P = len(data), data.crystal_P
    square_P = data.q_P3.double().square().sum(dim=1)
    # Sorted by crystal, therein by falling key: the origin, whose key is infinite, comes first.
    key_P = data.intensity_P.double().clamp(min=_ABSENT).log() - square_P.log()
    order_P = torch.argsort(key_P, descending=True, stable=True)
    order_P = order_P[torch.argsort(crystal_P[order_P], stable=True)]
    crystal_P, key_P, square_P = crystal_P[order_P], key_P[order_P], square_P[order_P]
    origin_P = square_P == 0
    origins_N = torch.zeros(count, dtype=torch.int64).index_add(0, crystal_P, origin_P.long())
    place_P = torch.arange(len(key_P)) - data.offsets[crystal_P] - origins_N[crystal_P]
    ends_P = torch.ones_like(origin_P)
    ends_P[:-1] = (key_P[:-1] - key_P[1:] > _GAP) | (crystal_P[:-1] != crystal_P[1:])
    kept_N = torch.zeros(count, dtype=torch.int64).scatter_reduce(
        0, crystal_P, torch.where(ends_P & (place_P < limit), place_P + 1, 0), "amax"
    )
    chosen_P = origin_P | (place_P < kept_N[crystal_P])
    slot_P = torch.where(origin_P, 0, place_P + 1)[chosen_P]
    source_P = order_P[chosen_P]
    columns = (data.intensity_P, data.multiplicity_P.to(data.q_P3.dtype))
    points_P5 = torch.cat([data.q_P3, torch.stack(columns, dim=1)], dim=1)
    points_NT5 = torch.zeros(count, 1 + limit, 5, dtype=data.q_P3.dtype)
    points_NT5[crystal_P[chosen_P], slot_P] = points_P5[source_P]
    return Tokens(points_NT5)


def _folded(data: CloudSet) -> CloudSet:
    """One point of each pair ±q: a cloud whose mates are both stored, as a half of it would be.

    Mates are next to each other in the order of |q·u|, where u is a direction that no two other
    reflections are equally far along, so that rounding of q does not part them.
    """
    single_P = (data.multiplicity_P == 1) & (data.q_P3 != 0).any(dim=1)
    points = torch.nonzero(single_P)[:, 0]
    if len(points) < 2:
        return data
    q_P3 = data.q_P3[points].double()
    along_P = q_P3 @ q_P3.new_tensor([1.0, 2 ** (1 / 3), 2 ** (2 / 3)])
    points = points[order := along_P.abs().argsort(stable=True)]
    points = points[second := data.crystal_P[points].argsort(stable=True)]
    q_P3, crystal_P = q_P3[order][second], data.crystal_P[points]
    first_P, second_P = data.intensity_P[points].double().unfold(0, 2, 1).T
    apart_P = (q_P3[1:] + q_P3[:-1]).norm(dim=1) > _SAME * q_P3[1:].norm(dim=1)
    apart_P |= (first_P - second_P).abs() > _GAP * first_P
    mates_P = ~apart_P & (crystal_P[1:] == crystal_P[:-1])
    if not mates_P.any():
        return data
    multiplicity_P = data.multiplicity_P.index_fill(0, points[:-1][mates_P], 2)
    kept_P = torch.ones_like(single_P).index_fill(0, points[1:][mates_P], False)
    return replace(
        data,
        offsets=ends_of(torch.bincount(data.crystal_P[kept_P], minlength=len(data))),
        hkl_P3=data.hkl_P3[kept_P],
        q_P3=data.q_P3[kept_P],
        intensity_P=data.intensity_P[kept_P],
        multiplicity_P=multiplicity_P[kept_P],
    )


class Attention(nn.Module):
    """Logits from the strongest points of a crystal's cloud.

    Args:
        classes: C.
        width: D, channels of a token.
    """

    rotates: ClassVar[bool] = False

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.intensity_scale: Tensor
        self.q_max: Tensor
        self.register_buffer("intensity_scale", torch.tensor(1.0))
        self.register_buffer("q_max", torch.tensor(1.0))
        self.embed = nn.Sequential(
            nn.Linear(_SHELLS + 4, width), nn.GELU(), nn.Linear(width, width)
        )
        self.layers = nn.ModuleList(Layer(width) for _ in range(LAYERS))
        self.head = nn.Sequential(
            nn.LayerNorm(3 * width),
            Dropout(0.2),
            nn.Linear(3 * width, width),
            nn.GELU(),
            Dropout(0.2),
            nn.Linear(width, classes),
        )

    def scale_to(self, train: CloudSet) -> None:
        """Take the units of |q| (the largest) and I (the median) from the training crystals."""
        present = train.intensity_P[train.intensity_P > 0]
        if len(present):
            self.intensity_scale.fill_(float(present.median()))
        radius = train.q_P3.norm(dim=1)
        if len(radius) and float(radius.max()) > 0:
            self.q_max.fill_(float(radius.max()))

    def prepare(self, data: CloudSet) -> Tokens:
        """Choose the points; see `strongest`."""
        return strongest(data)

    def forward(self, points_BT5: Tensor) -> Tensor:
        """(B, C) logits."""
        q_BT3, intensity_BT, multiplicity_BT = points_BT5.split([3, 1, 1], dim=2)
        present_BT = multiplicity_BT[..., 0] > 0
        radius_BT = q_BT3.norm(dim=2, keepdim=True)
        direction = (q_BT3 / radius_BT.clamp(min=1e-9)).reshape(-1, 3)
        angular_BTM = harmonics(direction)[:, 1:].unflatten(0, q_BT3.shape[:2])
        x_BTD = self.embed(self._features(radius_BT, intensity_BT, present_BT))
        # The origin's token is always there: a crystal without points has an answer, too.
        valid_BT = present_BT.clone()
        valid_BT[:, 0] = True
        for layer in self.layers:
            x_BTD = layer(x_BTD, angular_BTM, valid_BT)
        hidden = ~valid_BT[..., None]
        mean_BD = x_BTD.masked_fill(hidden, 0).sum(dim=1) / valid_BT.sum(dim=1, keepdim=True)
        largest_BD = x_BTD.masked_fill(hidden, -torch.inf).amax(dim=1)
        logits: Tensor = self.head(torch.cat([x_BTD[:, 0], mean_BD, largest_BD], dim=1))
        return logits

    def _features(self, radius_BT1: Tensor, intensity_BT1: Tensor, present_BT: Tensor) -> Tensor:
        """What is known of a point but its direction."""
        length = radius_BT1 / self.q_max
        grid = torch.linspace(0, 1, _SHELLS, dtype=length.dtype, device=length.device)
        shells = torch.exp(-0.5 * ((length - grid) * (_SHELLS - 1)).square())
        relative = intensity_BT1 / self.intensity_scale
        origin = torch.zeros_like(relative)
        origin[:, 0] = 1.0
        intensity = [relative.clamp(min=1e-4).log() / 4, relative.sqrt() / 4]
        return torch.cat([shells, *intensity, origin, present_BT[..., None].to(shells)], dim=2)


class Layer(nn.Module):
    """Self-attention that sees angles, then a per-token MLP; both residual, normalized before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.plain = width // HEADS
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * HEADS * (self.plain + len(_ANGULAR)))
        self.merge = nn.Linear(HEADS * (self.plain + 2 * len(_ANGULAR)), width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = Dropout(0.1)
        # One number a degree serves all its orders: this is what keeps the invariance.
        serves = [*range(self.plain)]
        for index, degree in enumerate(_ANGULAR):
            serves += [self.plain + index] * (2 * degree + 1)
        expansion_KE = one_hot(torch.tensor(serves)).T.to(torch.get_default_dtype())
        self.expansion_KE: Tensor
        self.register_buffer("expansion_KE", expansion_KE, persistent=False)

    def forward(self, x_BTD: Tensor, angular_BTM: Tensor, valid_BT: Tensor) -> Tensor:
        """(B, T, D); `angular_BTM` are the harmonics of degree 2, 4, 6 of each direction."""
        # To expand the weights is cheaper than to expand what they give.
        weight, bias = (
            torch.einsum("ke,nk...->ne...", self.expansion_KE, given.unflatten(0, (3 * HEADS, -1)))
            for given in (self.project.weight, self.project.bias)
        )
        expanded = linear(self.norm(x_BTD), weight.flatten(0, 1), bias.flatten())
        ones_BTK = angular_BTM.new_ones(*x_BTD.shape[:2], self.plain)
        factors_BT1E = torch.cat([ones_BTK, angular_BTM], dim=2)[:, :, None]
        heads = expanded.unflatten(2, (3, HEADS, -1)) * factors_BT1E[:, :, None]
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=valid_BT[:, None, None], scale=self.plain**-0.5
        ).transpose(1, 2)
        # Of the sums Σ_j w_ij c_j Y_ℓ(q̂_j): the part along Y_ℓ(q̂_i), which is
        # Σ_j w_ij c_j P_ℓ(cos θ_ij), and the length.
        along = (attended * factors_BT1E) @ self.expansion_KE.T
        square = (
            attended[..., self.plain :].square() @ self.expansion_KE[self.plain :, self.plain :].T
        )
        seen = torch.cat([along, (square + 1e-6).sqrt()], dim=3)
        x_BTD = x_BTD + self.dropout(self.merge(seen.flatten(2)))
        mixed: Tensor = x_BTD + self.dropout(self.mlp(x_BTD))
        return mixed
