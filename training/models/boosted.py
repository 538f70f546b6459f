"""Gradient-boosted trees on a fixed description of each cloud.

XGBoost (Chen and Guestrin, KDD 2016). The trees are kept in XGBoost's own format (UBJSON), never as
a pickle.
"""

from typing import Any

import numpy as np
import torch
import xgboost
from numpy.typing import NDArray
from torch import Tensor

from training.config import TrainingConfig

_PATIENCE = 150  # trees without a better validation loss after which boosting stops

# Other depths are in benchmarks/results/2026-11-22-models.md, another rate in 2026-11-26-rate.md;
# the rest was not varied.
_SETTINGS: dict[str, Any] = {
    "tree_method": "hist",
    "eta": 0.03,
    "max_depth": 6,
    "min_child_weight": 2,
    "reg_lambda": 5,
    "colsample_bytree": 0.2,
    "subsample": 0.7,
}


class Boosted:
    """Trees that answer with class logits."""

    def __init__(self, classes: int, content: bytes) -> None:
        self.classes = classes
        self._content = content
        self._booster = xgboost.Booster({"nthread": torch.get_num_threads()})
        self._booster.load_model(bytearray(content))

    @classmethod
    def fitted(
        cls,
        description_NF: NDArray[np.float32],
        target_N: NDArray[np.int64],
        train: NDArray[np.int64],
        validation: NDArray[np.int64],
        config: TrainingConfig,
    ) -> "Boosted":
        """Boost on the rows `train` until the loss on the rows `validation` stops falling."""
        classes = len(config.question.classes)
        settings = _SETTINGS | {
            "objective": "multi:softprob" if classes > 2 else "binary:logistic",
            "eval_metric": "mlogloss" if classes > 2 else "logloss",
            "seed": config.seed % 2**31,
            "nthread": torch.get_num_threads(),
        }
        if classes > 2:
            settings["num_class"] = classes
        known = xgboost.QuantileDMatrix(description_NF[train], target_N[train])
        held = xgboost.QuantileDMatrix(description_NF[validation], target_N[validation], ref=known)
        booster = xgboost.train(
            settings,
            known,
            config.trees,
            evals=[(held, "validation")],
            early_stopping_rounds=_PATIENCE,
            verbose_eval=False,
        )
        best = booster[: booster.best_iteration + 1]
        return cls(classes, bytes(best.save_raw("ubj")))

    @property
    def rounds(self) -> int:
        """Trees a class."""
        return int(self._booster.num_boosted_rounds())

    def logits(self, description_NF: NDArray[np.float32]) -> NDArray[np.float64]:
        """(N, C)."""
        if not len(description_NF):
            return np.zeros((0, self.classes))
        # A margin is log p/(1 − p) of class 1, or one logit a class.
        margin = self._booster.inplace_predict(description_NF, predict_type="margin")
        margin = np.asarray(margin, dtype=np.float64)
        return margin if self.classes > 2 else np.stack([np.zeros_like(margin), margin], axis=1)

    def tensors(self) -> dict[str, Tensor]:
        """What a model file holds of it: the bytes of the trees."""
        return {"trees": torch.from_numpy(np.frombuffer(self._content, np.uint8).copy())}

    @classmethod
    def from_tensors(cls, classes: int, tensors: dict[str, Tensor]) -> "Boosted":
        """What `tensors` gave, as a model again."""
        return cls(classes, tensors["trees"].numpy().tobytes())
