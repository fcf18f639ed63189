"""AUROC of the latest training batches: a curve to compare with dev's, without another pass over the data."""

import math
import statistics

import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAUROC
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from model.losses import label_scores


class RecentAUROC:
    """Collects scores of augmented images while the weights change: a hint of overfitting, not a measurement."""

    def __init__(self, labels: int, device: torch.device) -> None:
        self.labels = labels
        self.metric = MultilabelAUROC(labels, validate_args=False).to(device)

    def update(self, logits: Tensor, target: Tensor, mask: Tensor) -> None:
        """Add a batch: logits [B, L or more], target and mask [B, L]; soft targets count as the nearer class."""
        known = torch.where(mask & (target >= 0), (target >= 0.5).long(), -1)
        self.metric.update(label_scores(logits[:, : self.labels]).detach(), known)

    def compute(self) -> float:
        """The mean over labels with both classes in all ranks' batches since the last call; NaN if there are none."""
        areas = []
        # Label by label: MultilabelAUROC gives 0 for a label with one class, and fails for one without cells.
        with self.metric.sync_context():
            preds, target = (dim_zero_cat(state) for state in (self.metric.preds, self.metric.target))
            for scores, truth in zip(preds.T, target.T, strict=True):
                if (truth == 1).any() and (truth == 0).any():
                    known = truth >= 0
                    areas.append(binary_auroc(scores[known], truth[known], validate_args=False).item())
        self.metric.reset()
        return statistics.fmean(areas) if areas else math.nan
