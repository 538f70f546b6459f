"""Out of distribution: is a cloud unlike those that the network was trained on?

Each cloud gives four numbers that no rotation changes, as logarithms: I(0) = (Σf(0)/V)², the
number of points (the volume of the cell, if they fill a sphere), and the intensity summed over
the inner and over the outer shell of |q|, each about Σf²/V (A. J. C. Wilson, Nature 150, 152
(1942)). Together they know how densely atoms of about which kind are packed. They are whitened
with the training crystals, and a crystal's distance is that to its fifth nearest of them. What is
farther than 99 % of the validation crystals is flagged, so that about 1 % of crystals like those
of the training are.

Measured on elastic crystals of the Materials Project: of those blown up to ten times their volume
all are flagged, of those pressed to three times their density four in five; Mahalanobis' distance
in the same space finds half as many of the latter, and profiles of more shells find fewer, since
few points lie in each. The flag knows nothing of the network: what is not flagged can still be
misjudged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from training import checkpoint
from training.dataset import Clouds, CloudSet
from training.identity import first_difference
from training.portions import blocks, sample

FILE = "domain.safetensors"
_QUANTILE = 0.99
_NEIGHBOUR = 5
# More training crystals than this make a query slower and the distances little better.
_MOST_KEPT = 10_000
_BLOCK = 512  # crystals at a time: 20 MB of distances


def fit(data: Clouds, train_rows: Tensor, validation_rows: Tensor) -> dict[str, Tensor]:
    """What `flags` needs to know of the training crystals.

    Args:
        train_rows: (n,) int64, at least one; `validation_rows` alike.

    Returns:
        Named tensors, 40 bytes a training crystal at most.
    """
    train_rows, validation_rows = (
        rows[:: -(-len(rows) // _MOST_KEPT)] for rows in (train_rows, validation_rows)
    )
    tensors = _scales(data.subset(sample(data, train_rows).numpy()))
    statistics = _of_blocks(_statistics, data, train_rows, tensors)
    centred = statistics - statistics.mean(dim=0)
    covariance = centred.T @ centred / len(centred)
    # A statistic that is the same for all must not divide by zero.
    covariance += torch.diag(1e-3 * covariance.diag() + 1e-6)
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    tensors |= {"mean": statistics.mean(dim=0), "whitening": whitening}
    tensors |= {"known": (centred @ whitening).contiguous()}
    validation = _of_blocks(_distances, data, validation_rows, tensors)
    return tensors | {"threshold": torch.tensor(np.quantile(validation.numpy(), _QUANTILE))}


def _scales(train: CloudSet) -> dict[str, Tensor]:
    length_P, intensity_P = train.q_P3.norm(dim=1).numpy(), train.intensity_P.numpy()
    present = intensity_P[intensity_P > 0]
    return {
        "middle": torch.tensor(np.quantile(length_P, 0.99) / 2 if len(length_P) else 1.0),
        # What a cloud without intensity is taken to have, so that its logarithm is finite.
        "floor": torch.tensor(float(np.quantile(present, 0.01)) if len(present) else 1.0),
    }


def distances(data: CloudSet, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """(N,) distance of each crystal to its fifth nearest of the training."""
    answer: NDArray[np.float64] = _distances(data, tensors).numpy()
    return answer


def _distances(data: CloudSet, tensors: Mapping[str, Tensor]) -> Tensor:
    known = tensors["known"]
    points = (_statistics(data, tensors) - tensors["mean"]) @ tensors["whitening"]
    nearest = [
        torch.cdist(part, known, compute_mode="donot_use_mm_for_euclid_dist")
        .kthvalue(min(_NEIGHBOUR, len(known)), dim=1)
        .values
        for part in points.split(_BLOCK)
    ]
    return torch.cat(nearest)


def flags(data: CloudSet, tensors: Mapping[str, Tensor]) -> NDArray[np.bool_]:
    """(N,) whether each crystal is farther than 99 % of the validation crystals were."""
    return distances(data, tensors) > float(tensors["threshold"])


def write(
    run: Path,
    data: Clouds,
    train_rows: Tensor,
    validation_rows: Tensor,
    identity: Mapping[str, Any],
) -> dict[str, Tensor]:
    """`fit`, kept in the folder of a training run of that identity."""
    tensors = fit(data, train_rows, validation_rows)
    checkpoint.save(run / FILE, tensors, {"identity": identity})
    return tensors


def read(run: Path, identity: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What `write` kept; None where a run has none.

    Raises:
        UserError: it is damaged, or of another run.
    """
    if not (run / FILE).exists():
        return None
    tensors, state = checkpoint.read(run / FILE)
    if found := first_difference(state.get("identity", {}), identity):
        raise UserError(
            f"{run / FILE} is of another training: {found[0]} = {found[1]!r} there, {found[2]!r} "
            "of the model",
            remedy="put back that of this training, or make it anew with xtal train --resume",
        )
    return tensors


def _of_blocks(
    function: Callable[[CloudSet, Mapping[str, Tensor]], Tensor],
    data: Clouds,
    rows: Tensor,
    tensors: Mapping[str, Tensor],
) -> Tensor:
    """A function of clouds for some crystals, of whose clouds few are in memory at a time."""
    return torch.cat([function(data.subset(b.numpy()), tensors) for b in blocks(data, rows)])


def _statistics(data: CloudSet, tensors: Mapping[str, Tensor]) -> Tensor:
    """(N, 4) float64; finite, also without any point."""
    length_P, intensity_P = data.q_P3.norm(dim=1), data.intensity_P.double()
    at_origin_P, outer_P = length_P < 1e-6, length_P > tensors["middle"]
    crystal_P = data.crystal_P

    def total(values_P: Tensor) -> Tensor:
        return torch.zeros(len(data), dtype=torch.float64).index_add_(0, crystal_P, values_P)

    weight_P = torch.where(at_origin_P, 0.0, data.multiplicity_P.double())
    weighted_P = weight_P * intensity_P
    floor = float(tensors["floor"])
    return torch.stack(
        [
            total(intensity_P * at_origin_P).add(floor).log(),
            total(weight_P).log1p(),
            total(weighted_P * ~outer_P).add(floor).log(),
            total(weighted_P * outer_P).add(floor).log(),
        ],
        dim=1,
    )
