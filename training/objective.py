"""What a network is trained for: one question or several, each where the answer is known."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from training.config import TrainingConfig
from training.metrics import score
from training.split import Parts
from training.tasks import UNKNOWN


def loss(logits_BC: Tensor, parts: Parts, config: TrainingConfig, rows_B: Tensor) -> Tensor:
    """Cross entropy summed over all known answers of some training crystals.

    Every known label counts alike, so that the sum does not depend on how crystals are dealt to
    workers.
    """
    terms = []
    for task, own in _each(parts, config):
        target_B = own.target_N[rows_B].to(logits_BC.device)
        own_logits = logits_BC[:, config.columns(task)]
        terms.append(cross_entropy(own_logits, target_B, ignore_index=UNKNOWN, reduction="sum"))
    return torch.stack(terms).sum()


def validation(
    answers: Callable[[Tensor], NDArray[np.float32]], parts: Parts, config: TrainingConfig
) -> dict[str, float]:
    """Loss, AUROC and balanced accuracy of the first question; of others with `_TASK` behind.

    Args:
        answers: rows → logits of all questions. Where they are not finite, so is the loss.
    """
    record = {}
    for task, own in _each(parts, config):
        ending = "" if task == config.task else f"_{task}"
        rows = own.rows["validation"]
        logits = torch.from_numpy(answers(rows)[:, config.columns(task)])
        target = own.target_N[rows]
        record[f"validation_loss{ending}"] = float(cross_entropy(logits, target))
        if not logits.isfinite().all():
            return {f"validation_{name}": np.nan for name in _RECORDED}
        scores = score(target.numpy(), logits.double().softmax(dim=1).numpy())
        for metric in _RECORDED[1:]:
            record[f"validation_{metric}{ending}"] = float(scores[metric][0])
    return record


def standing(record: dict[str, float], config: TrainingConfig) -> list[float]:
    """How good an epoch is, to compare as lists are: mean AUROC of all questions, then −loss.

    Of a number the loss alone: AUROC of its bins does not know which are neighbours.
    """
    endings = ["", *(f"_{task}" for task in config.also)]
    return [
        float(np.mean([sign * record[f"validation_{name}{ending}"] for ending in endings]))
        for name, sign in (("auroc", 1), ("loss", -1))
        if name == "loss" or not config.question.edges
    ]


_RECORDED = ("loss", "auroc", "balanced_accuracy")


def _each(parts: Parts, config: TrainingConfig) -> list[tuple[str, Parts]]:
    return [(config.task, parts), *parts.others.items()]
