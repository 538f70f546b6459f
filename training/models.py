"""Networks: packed clouds → class logits."""

import torch
from torch import Tensor, nn

from training.dataset import CloudBatch


class PointNet(nn.Module):
    """The reference arm: shared per-point MLP, max pool over points, head.

    Qi et al., CVPR 2017, as in Wang et al., arXiv 2101.01773; without batch normalization, so
    that a crystal's answer never depends on its neighbours in the batch. Invariant to the order
    of points by construction, to rotation only as far as augmentation teaches it.

    Args:
        classes: C.
        width: channels of the last per-point layer.
        q_scale: root mean square |q| of the training set in 1/Å, the unit of length.
        intensity_scale: median non-zero intensity of the training set; features see
            log(1 + I / scale), which is 0 for an absent reflection.
    """

    def __init__(self, classes: int, width: int, q_scale: float, intensity_scale: float) -> None:
        super().__init__()
        self.classes = classes
        self.q_scale: Tensor
        self.intensity_scale: Tensor
        self.register_buffer("q_scale", torch.tensor(q_scale))
        self.register_buffer("intensity_scale", torch.tensor(intensity_scale))
        self.points = nn.Sequential(
            nn.Linear(4, width // 2),
            nn.ReLU(),
            nn.Linear(width // 2, width // 2),
            nn.ReLU(),
            nn.Linear(width // 2, width),
        )
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width // 2),
            nn.ReLU(),
            nn.Linear(width // 2, classes),
        )

    def forward(self, batch: CloudBatch) -> Tensor:
        """(B, C) logits."""
        intensity = torch.log1p(batch.intensity_P / self.intensity_scale)
        features_P4 = torch.cat([batch.q_P3 / self.q_scale, intensity[:, None]], dim=1)
        points_PC = self.points(features_P4)
        pooled_BC = torch.segment_reduce(points_PC, "max", lengths=batch.lengths_B, unsafe=True)
        logits: Tensor = self.head(pooled_BC)
        return logits
