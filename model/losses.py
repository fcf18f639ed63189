"""Logits, targets and masks → scalar loss; logits → scores.

The first L logits are one per label: positive against negative, log p1 / p0. A label with the three classes
negative, uncertain and positive (U-MultiClass of Irvin et al., 2019) has one more, behind the L: uncertain
against negative. So the paper's score p1 / (p0 + p1) is the sigmoid of the first logit with either head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_loss(logits: Tensor, target: Tensor, mask: Tensor, three_class: Tensor | None = None) -> Tensor:
    """Cross-entropy over the cells whose mask is True, averaged over those cells.

    Logits [B, L + M], target and mask [B, L], `three_class` [M] the columns of the labels with three classes
    (None: no such label). A target is in [0, 1]; of three classes it is 0, 1, or -1 for uncertain.
    In float32 whatever the logits' precision. 0 where no cell is left.
    """
    logits = logits.float()
    binary, uncertain = logits.tensor_split([target.shape[1]], dim=1)
    losses = F.binary_cross_entropy_with_logits(binary, target, reduction="none")
    if three_class is not None:
        positive = binary[:, three_class]
        classes = torch.stack([torch.zeros_like(positive), positive, uncertain], dim=2)
        truth = target[:, three_class].long() % 3  # 0, 1, and -1 is the last class
        # Flat, because the loss of a grid of classes is not deterministic on a GPU.
        ours = F.cross_entropy(classes.flatten(0, 1), truth.flatten(), reduction="none")
        losses = losses.index_copy(1, three_class, ours.view_as(positive))
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def label_scores(logits: Tensor, labels: int) -> Tensor:
    """Scores [B, L] in [0, 1]: how probable positive is, given that the label is positive or negative.

    In float32 whatever the logits' precision: in half precision near-equal scores would tie.
    """
    return torch.sigmoid(logits[:, :labels].float())
