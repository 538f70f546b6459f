"""What the arms ask of a set of clouds: frames, shells, equivalent points, groups and orders.

All of it is vectorized over the points of all crystals, on their device, in double precision.
"""

from dataclasses import replace

import torch
from torch import Tensor

from training.dataset import CloudSet, ends_of

# |q| of one shell differ by the rounding of single precision, intensities of equivalent points by
# that and by how well the source's symmetry was found.
_SHELL_TOLERANCE = 2e-6
_INTENSITY_TOLERANCE = 1e-3


def origin_P(data: CloudSet) -> Tensor:
    """Whether a point is 000."""
    return (data.hkl_P3 == 0).all(dim=1)


def frames_N33(data: CloudSet) -> Tensor:
    """Right-handed orthonormal rows in each crystal: along a, in the plane of a and b, the third.

    Directions that are drawn in it turn with the crystal.
    """
    a, b, _ = data.lattice_N33.double().unbind(1)
    first = torch.nn.functional.normalize(a, dim=1)
    across = b - (b * first).sum(1, keepdim=True) * first
    second = torch.nn.functional.normalize(across, dim=1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=1)


def to_frame(vector_M3: Tensor, frame_M33: Tensor) -> Tensor:
    """Components of Cartesian vectors along the rows of their frames."""
    return (vector_M3[:, None, :] * frame_M33).sum(2)


def from_frame(component_M3: Tensor, frame_M33: Tensor) -> Tensor:
    """Cartesian vectors of components along the rows of their frames."""
    return (component_M3[:, :, None] * frame_M33).sum(1)


def axes_N3(data: CloudSet, normal_N6: Tensor) -> tuple[Tensor, Tensor]:
    """Two unit vectors of each crystal, at right angles, uniform if the numbers are normal."""
    first = torch.nn.functional.normalize(normal_N6[:, :3], dim=1)
    rest = normal_N6[:, 3:]
    across = rest - (rest * first).sum(1, keepdim=True) * first
    frame = frames_N33(data)
    second = torch.nn.functional.normalize(across, dim=1)
    return from_frame(first, frame), from_frame(second, frame)


def ordered(*keys: Tensor) -> Tensor:
    """Indices that sort by the first key, where equal by the second, and so on."""
    order = torch.argsort(keys[-1], stable=True)
    for key in reversed(keys[:-1]):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def grouped(order: Tensor, new: Tensor) -> Tensor:
    """Number of the group of each item, given their order and where in it a group begins."""
    group = torch.empty_like(order)
    group[order] = new.cumsum(0) - 1
    return group


def groups_of(*keys: Tensor) -> Tensor:
    """Number of the group of items whose keys are all equal; groups are in order of the keys."""
    order = ordered(*keys)
    new = torch.ones_like(order, dtype=torch.bool)
    for number, key in enumerate(keys):
        differs = key[order][1:] != key[order][:-1]
        new[1:] = differs if number == 0 else new[1:] | differs
    return grouped(order, new)


def shells_P(data: CloudSet) -> Tensor:
    """Number of the shell of each point: those of one crystal with equal |q|, ascending."""
    crystal, length = data.crystal_P, data.q_P3.double().norm(dim=1)
    order = ordered(crystal, length)
    crystal, length = crystal[order], length[order]
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = length.diff() > _SHELL_TOLERANCE * length[1:]
    new[1:] |= crystal.diff() > 0
    return grouped(order, new)


def shell_length_P(data: CloudSet) -> Tensor:
    """|q| in 1/Å of each point, the very same for all points of a shell."""
    return mean_of(data.q_P3.double().norm(dim=1), shells_P(data))


def equivalents_P(data: CloudSet) -> Tensor:
    """Number of the set of points of one crystal with equal |q| and I that each point is in.

    Equivalent reflections are in one set, whatever the point group; a set can hold several orbits
    that agree by accident.
    """
    shell, intensity = shells_P(data), data.intensity_P.double()
    order = ordered(shell, intensity)
    shell, intensity = shell[order], intensity[order]
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = intensity.diff() > _INTENSITY_TOLERANCE * intensity[1:]
    new[1:] |= shell.diff() > 0
    return grouped(order, new)


def sum_of(values: Tensor, group: Tensor) -> Tensor:
    """Of each item, the sum over its group; groups are numbered from 0."""
    count = int(group.max()) + 1 if len(group) else 0
    return values.new_zeros(count).index_add(0, group, values)[group]


def mean_of(values: Tensor, group: Tensor) -> Tensor:
    """Of each item, the mean over its group."""
    return sum_of(values, group) / sum_of(torch.ones_like(values), group)


def first_of(group: Tensor) -> Tensor:
    """Of each item, the index of the first of its group."""
    place = torch.arange(len(group), device=group.device)
    count = int(group.max()) + 1 if len(group) else 0
    start = place.new_full((count,), len(group))
    return start.scatter_reduce(0, group, place, "amin")[group]


def place_in(group: Tensor, *keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of each item, its place from 0 in the order of the keys in its group, and the group's size.

    Groups are numbered from 0; some may be empty.
    """
    order = ordered(group, *keys)
    count = torch.bincount(group)
    place = torch.empty_like(order)
    start = count.cumsum(0) - count
    place[order] = torch.arange(len(order), device=order.device) - start[group[order]]
    return place, count[group]


def weaker_part(group: Tensor, values: Tensor) -> Tensor:
    """Of each item, the part of its group that is not larger, in (0, 1]; equal items agree."""
    place, count = place_in(group, values)
    level = groups_of(group, values)
    last = torch.zeros(len(level), dtype=torch.int64, device=level.device)
    return (last.scatter_reduce(0, level, place, "amax")[level] + 1).double() / count


def shuffled(values: Tensor, group: Tensor, key: Tensor) -> Tensor:
    """Values permuted within groups, at random if the keys are."""
    mixed = values.clone()
    mixed[torch.argsort(group, stable=True)] = values[ordered(group, key)]
    return mixed


def code_P(data: CloudSet) -> Tensor:
    """One number for the Miller indices of each point, to order by."""
    h, k, l = data.hkl_P3.long().unbind(1)  # noqa: E741
    return (h * 65536 + k) * 65536 + l


def only(data: CloudSet, kept_P: Tensor) -> CloudSet:
    """The points of a boolean mask."""
    lengths = torch.bincount(data.crystal_P[kept_P], minlength=len(data))
    return replace(
        data,
        offsets=ends_of(lengths),
        hkl_P3=data.hkl_P3[kept_P],
        q_P3=data.q_P3[kept_P],
        intensity_P=data.intensity_P[kept_P],
        multiplicity_P=data.multiplicity_P[kept_P],
    )


def with_intensity(data: CloudSet, intensity_P: Tensor) -> CloudSet:
    """The same points with other intensities, in the precision of the set."""
    return replace(data, intensity_P=intensity_P.to(data.intensity_P.dtype))


def with_q(data: CloudSet, q_P3: Tensor) -> CloudSet:
    """The same points elsewhere, in the precision of the set."""
    return replace(data, q_P3=q_P3.to(data.q_P3.dtype))
