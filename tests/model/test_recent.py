"""Against scikit-learn, label by label."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from model.recent import RecentAUROC


def test_it_is_the_mean_over_the_labels_with_both_classes_since_the_last_call() -> None:
    random = torch.Generator().manual_seed(0)
    recent = RecentAUROC(3, torch.device("cpu"))
    for _ in range(2):
        logits = torch.randn(40, 4, generator=random)  # the last column is of a third class
        target = torch.rand(40, 3, generator=random)
        target[::7, 0] = -1  # uncertain as a class of its own
        target[:, 2] = 1.0  # one class
        mask = torch.rand(40, 3, generator=random) > 0.3
        recent.update(logits[:25], target[:25], mask[:25])
        recent.update(logits[25:].bfloat16(), target[25:], mask[25:])
        scores = torch.cat([logits[:25], logits[25:].bfloat16().float()]).sigmoid()
        expected = []
        for label in range(2):
            used = (mask[:, label] & (target[:, label] >= 0)).numpy()
            truth = target[:, label].numpy()[used] >= 0.5
            expected.append(roc_auc_score(truth, scores[:, label].numpy()[used]))
        assert recent.compute() == pytest.approx(np.mean(expected), abs=1e-6)
    recent.update(logits, target, torch.zeros_like(mask))
    assert math.isnan(recent.compute())
