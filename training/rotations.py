"""Proper rotations: uniform on SO(3), about one axis, or none."""

import math

import torch
from torch import Tensor

from training.config import PoseName


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 3) float32 rotation matrices, det +1, distributed by the Haar measure.

    A unit quaternion uniform on S³ (a normalized 4D Gaussian) is a uniform rotation:
    Shoemake, Graphics Gems III (1992), p. 124.
    """
    quaternion = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=1).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2).float()


def posed_rotations(pose: PoseName, count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 3) float32 rotations of a training: Haar, uniform about z, or all the identity."""
    if pose == "random":
        return random_rotations(count, generator)
    turn = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    if pose == "axis":
        angle = 2.0 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
        turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
        turn[:, 1, 0] = angle.sin()
        turn[:, 0, 1] = -angle.sin()
    return turn.float()
