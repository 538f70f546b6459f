"""The paper's network: packed clouds → class logits."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from training.dataset import CloudBatch, CloudSet


class PointNet(nn.Module):
    """The reference arm: shared per-point MLP, max pool over points, head.

    Qi et al., CVPR 2017, as in Wang et al., arXiv 2101.01773; without batch normalization, so
    that a crystal's answer never depends on its neighbours in the batch. Invariant to the order
    of points by construction, to rotation only as far as augmentation teaches it.

    Args:
        classes: C.
        width: channels of the last per-point layer.
    """

    rotates: ClassVar[bool] = True  # training shows it each cloud in random orientations

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.q_scale: Tensor
        self.intensity_scale: Tensor
        self.register_buffer("q_scale", torch.tensor(1.0))
        self.register_buffer("intensity_scale", torch.tensor(1.0))
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

    def scale_to(self, train: CloudSet) -> None:
        """Units from the training crystals.

        Of length: the root mean square |q| in 1/Å. Of intensity: the median of those above 0;
        the network sees log(1 + I / unit), which is 0 for an absent reflection.
        """
        present = train.intensity_P[train.intensity_P > 0]
        self.q_scale.fill_(float(train.q_P3.square().sum(dim=1).mean().sqrt()) or 1.0)
        self.intensity_scale.fill_(float(present.median()) if len(present) else 1.0)

    def prepare(self, data: CloudSet) -> CloudSet:
        """The clouds as they are."""
        return data

    def forward(self, batch: CloudBatch) -> Tensor:
        """(B, C) logits."""
        intensity = torch.log1p(batch.intensity_P / self.intensity_scale)
        features_P4 = torch.cat([batch.q_P3 / self.q_scale, intensity[:, None]], dim=1)
        logits: Tensor = self.head(self._pooled(features_P4, batch.lengths_B))
        return logits

    def _pooled(self, features_P4: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, width) largest value of each channel over a crystal's points.

        Only the points that hold a largest value have a gradient, a quarter of them: these alone
        are computed again with what a gradient needs.
        """
        with torch.set_grad_enabled(False):
            points_PC = self.points(features_P4)
            if not self.training:
                return torch.segment_reduce(points_PC, "max", lengths=lengths_B, unsafe=True)
            longest = max(1, int(lengths_B.max())) if len(lengths_B) else 1
            within_L = torch.arange(longest, device=lengths_B.device)
            first_B1 = (lengths_B.cumsum(0) - lengths_B)[:, None]
            padded_BL = first_B1 + within_L.where(within_L < lengths_B[:, None], 0)
            largest_BC = padded_BL.gather(1, points_PC[padded_BL].max(dim=1).indices)
            chosen_S, place_BC = largest_BC.unique(return_inverse=True)
        chosen_SC: Tensor = self.points(features_P4[chosen_S])
        return chosen_SC.gather(0, place_BC)
