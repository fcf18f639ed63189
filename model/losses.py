"""Logits, targets and masks → scalar loss; logits → scores.

The first L logits are one per label: positive versus negative, log p1 / p0. A label with three classes, negative,
uncertain and positive (U-MultiClass of Irvin et al., 2019), has another one after the L: uncertain versus negative.
So the paper's score p1 / (p0 + p1) is the sigmoid of the first logit either way.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

MAX_POSITIVE_WEIGHT = 20.0  # if positives are rarer than 1 in 21, a few would dominate the gradient
MEMORY = 0.99  # decay per batch of the class means of AUCMarginLoss


class MaskedLoss(nn.Module):
    """Cross-entropy over the cells whose mask is True, averaged over those cells.

    `three_class` [M] are the columns of labels with three classes, `pos_weight` [L] the weights of positives (None: 1),
    as in torch's `binary_cross_entropy_with_logits`.
    """

    three_class: Tensor
    pos_weight: Tensor | None

    def __init__(self, three_class: Sequence[int] = (), pos_weight: Tensor | None = None) -> None:
        super().__init__()
        # Not in the state dict: they follow from the configuration and the labels.
        self.register_buffer("three_class", torch.tensor(three_class, dtype=torch.int64), persistent=False)
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The loss of logits [B, L + M], target and mask [B, L], in float32; 0 if no cell is left.

        A target is in [0, 1]; with three classes it is 0, 1, or -1 for uncertain.
        """
        binary, uncertain = logits.float().tensor_split([target.shape[1]], dim=1)
        losses = F.binary_cross_entropy_with_logits(binary, target, pos_weight=self.pos_weight, reduction="none")
        if len(self.three_class):
            positive = binary[:, self.three_class]
            classes = torch.stack([torch.zeros_like(positive), positive, uncertain], dim=2)
            truth = target[:, self.three_class].long() % 3  # 0, 1, and -1 is the last class
            # Flattened, because the loss over a grid of classes is not deterministic on a GPU.
            class_losses = F.cross_entropy(classes.flatten(0, 1), truth.flatten(), reduction="none").view_as(positive)
            if self.pos_weight is not None:
                class_losses = class_losses * torch.where(truth == 1, self.pos_weight[self.three_class], 1)
            losses = losses.index_copy(1, self.three_class, class_losses)
        return (losses * mask).sum() / mask.sum().clamp(min=1)


masked_loss = MaskedLoss()  # for training loops of your own: every label has two classes, of equal weight


def label_scores(logits: Tensor) -> Tensor:
    """Scores in [0, 1] of label logits: the probability of positive, given positive or negative."""
    # In float32 at least: in half precision, nearly equal scores would tie.
    return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def positive_weights(target: Tensor, mask: Tensor) -> Tensor:
    """Weights [L] for `MaskedLoss`: train's negatives / positives, at most 20; 1 for a label with one class.

    Target and mask [N, L]; a soft target counts partly for each class, an uncertain cell (-1) for neither.
    """
    positives, negatives = class_counts(target, mask)
    weights = (negatives / positives).clamp(max=MAX_POSITIVE_WEIGHT)
    return torch.where((positives > 0) & (negatives > 0), weights, 1).float()


def class_counts(target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of positives and negatives [L] among the cells of target and mask [N, L]."""
    used = mask & (target >= 0)
    positives = torch.where(used, target, 0).sum(dim=0, dtype=torch.float64)
    return positives, used.sum(dim=0) - positives


class AUCMarginLoss(nn.Module):
    """The AUC margin loss of Yuan et al., ICCV 2021 (arXiv:2012.03173), per label, averaged over the labels.

    With scores h, the sigmoids of the logits, the share p of positives and the paper's margin of 1, a label's loss is

        min a, b  max α ≥ 0   E[ (1-p) (h-a)² [y=1] + p (h-b)² [y=0]
                                 + 2α (p(1-p) + p h [y=0] - (1-p) h [y=1]) - p(1-p) α² ]

    which is p(1-p) (Var⁺ h + Var⁻ h + (1 + E⁻ h - E⁺ h)²): how far, in the mean over pairs of a positive and a
    negative, their scores are from 1 apart. LibAUC's AUCMLoss and PESG find the saddle point by steps of descent in a
    and b and of ascent in α. It is known in closed form, so only the network is optimized here: a and b are running
    means of each class's scores (few batches hold a positive of a rare label), α is 1 + b - a, and the gradient of the
    expression at that point is the gradient of its value (Danskin's theorem). p is over all of train, so that each
    batch gives an unbiased estimate of the expectation. A label counts once both of its classes have appeared.

    A soft target y is a positive with weight y and a negative with weight 1 - y.
    """

    share: Tensor
    met: Tensor

    def __init__(self, target: Tensor, mask: Tensor) -> None:
        """Take the class shares from train's targets in [0, 1] and mask, both [N, L]."""
        super().__init__()
        positives, negatives = class_counts(target, mask)
        self.register_buffer("share", (positives / (positives + negatives).clamp(min=1)).float())
        # For positives and negatives: the sum of scores and their number, with older batches decaying.
        self.register_buffer("met", torch.zeros(2, 2, target.shape[1]))

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The loss of logits [B, L or more], target and mask [B, L], or 0 if no label counts; updates the means.

        Each of several ranks returns a loss for its slice: weighted by the slices' cells, they add up to the batch's.
        """
        scores = label_scores(logits[:, : target.shape[1]])
        positive, negative = target * mask, (1 - target) * mask
        with torch.no_grad():
            parts = torch.stack([positive * scores, positive, negative * scores, negative])
            batch = parts.sum(dim=1, dtype=torch.float64)  # so that the split over ranks does not matter
            if dist.is_initialized():  # the means are those of all ranks' images
                dist.all_reduce(batch)
            batch = batch.to(self.met.dtype)
            of_label = batch[1] + batch[3]  # cells, of all ranks
            self.met.mul_(MEMORY).add_(batch.view(2, 2, -1))
            number = self.met[:, 1]
            a, b = self.met[:, 0] / torch.where(number > 0, number, 1)
            alpha = 1 + b - a
        p, q = self.share, 1 - self.share
        cells = q * positive * ((scores - a) ** 2 - 2 * alpha * scores)
        cells = cells + p * negative * ((scores - b) ** 2 + 2 * alpha * scores)
        cells = cells + mask * (p * q * alpha * (2 - alpha))
        losses = cells.sum(dim=0) / of_label.clamp(min=1)
        counts = (number > 0).all(dim=0)
        loss = torch.where(counts, losses, 0).sum() / counts.sum().clamp(min=1)
        return loss * (of_label.sum() / mask.sum().clamp(min=1))
