"""Logits, targets and masks → scalar loss."""

import torch.nn.functional as F
from torch import Tensor


def masked_bce(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy over the cells whose mask is True, averaged over those cells; all [B, 14].

    In float32 whatever the logits' precision. 0 where no cell is left.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)
