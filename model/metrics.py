"""Scores, targets and masks → AUROC per label, and its means.

A label with one class has no AUROC: it is null and listed as skipped, never 0 and never part of a mean.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import binary_auroc

# The five labels of the CheXpert competition (Irvin et al., 2019).
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
FEW = 10  # positives; with fewer, a label's AUROC is mostly chance


class LabelResult(TypedDict):
    """One label: its AUROC (None with one class) and what it rests on."""

    auroc: float | None
    positives: int
    negatives: int


class Report(TypedDict):
    """All labels; `macro10` is the macro over labels with 10 positives or more, `mean5` the competition's."""

    macro_auroc: float | None
    macro10_auroc: float | None
    mean5_auroc: float | None
    skipped: list[str]
    labels: dict[str, LabelResult]


def report_auroc(
    names: Sequence[str],
    scores: npt.NDArray[np.float32],
    target: npt.NDArray[np.float32],
    mask: npt.NDArray[np.bool_],
) -> Report:
    """AUROC per label of scores [N, L] against targets [N, L] in {0, 1}, on the cells of mask [N, L].

    Raises ValueError where a score is not finite: torchmetrics would pass it silently.
    """
    if not np.isfinite(scores).all():
        raise ValueError("scores are not finite")
    labels: dict[str, LabelResult] = {}
    for column, name in enumerate(names):
        used = mask[:, column]
        score, truth = scores[used, column], target[used, column] == 1
        positives = int(truth.sum())
        negatives = len(truth) - positives
        auroc = None
        if positives and negatives:
            auroc = float(binary_auroc(torch.from_numpy(score), torch.from_numpy(truth).int()))
        labels[name] = {"auroc": auroc, "positives": positives, "negatives": negatives}
    competition = [labels[name]["auroc"] for name in COMPETITION if name in labels]
    return {
        "macro_auroc": _mean([label["auroc"] for label in labels.values()]),
        "macro10_auroc": _mean([label["auroc"] for label in labels.values() if label["positives"] >= FEW]),
        "mean5_auroc": None if None in competition else _mean(competition),
        "skipped": [name for name, label in labels.items() if label["auroc"] is None],
        "labels": labels,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the defined values; None where there is none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
