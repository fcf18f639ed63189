from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.losses import AUCMarginLoss, MaskedLoss, label_scores, positive_weights


@pytest.mark.parametrize("three_class", [(), range(14)])
def test_cells_outside_the_mask_have_no_influence(three_class: Sequence[int]) -> None:
    loss, logits = MaskedLoss(three_class), torch.randn(4, 14 + len(three_class), requires_grad=True)
    target, mask = torch.randint(-1 if three_class else 0, 2, (4, 14)).float(), torch.rand(4, 14) < 0.5
    loss(logits, target, mask).backward()
    assert logits.grad is not None
    assert ((logits.grad != 0) == mask.repeat(1, logits.shape[1] // 14)).all()
    assert loss(logits, target, torch.zeros_like(mask)) == 0


def test_three_classes_are_softmax_cross_entropy_and_its_two_certain_classes_the_score() -> None:
    columns = [2, 5, 11]
    binary = torch.tensor([label for label in range(14) if label not in columns])
    logits, target = torch.randn(8, 17, dtype=torch.bfloat16), torch.rand(8, 14)
    target[:, columns] = torch.tensor([-1.0, 0.0, 1.0])[torch.randint(0, 3, (8, 3))]
    mask = torch.rand(8, 14) < 0.6
    negative, positive, uncertain = torch.zeros(8, 3), logits[:, columns].float(), logits[:, 14:].float()
    classes = torch.stack([negative, uncertain, positive], dim=2)  # [8, 3, 3], in the paper's order
    truth = torch.tensor([1, 0, 2])[(target[:, columns] + 1).long()]  # from -1, 0, 1

    ours, others = mask[:, columns], mask[:, binary]
    in_softmax = F.cross_entropy(classes[ours], truth[ours], reduction="none")
    cells = logits[:, binary].float()[others], target[:, binary][others]
    in_sigmoid = F.binary_cross_entropy_with_logits(*cells, reduction="none")
    loss = MaskedLoss(columns)(logits, target, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.cat([in_softmax, in_sigmoid]).mean())
    three = MaskedLoss(range(3))(logits[:, [2, 5, 11, 14, 15, 16]], target[:, columns], ours)
    torch.testing.assert_close(three, in_softmax.mean())  # all labels with three classes

    scores = label_scores(logits[:, :14])
    shares = torch.softmax(classes, dim=2)
    expected = shares[:, :, 2] / (shares[:, :, 0] + shares[:, :, 2])
    torch.testing.assert_close(scores[:, columns], expected)
    torch.testing.assert_close(scores[:, binary], torch.sigmoid(logits[:, binary].float()))


def test_positive_weights_are_torchs() -> None:
    logits, target, weights = torch.randn(8, 16), torch.rand(8, 14), torch.rand(14) * 5
    mask = torch.rand(8, 14) < 0.5
    expected = nn.BCEWithLogitsLoss(reduction="none", pos_weight=weights)(logits[:, :14], target)[mask].mean()
    torch.testing.assert_close(MaskedLoss(pos_weight=weights)(logits[:, :14], target, mask), expected)
    # Of three classes, positive has the weight and the others have 1
    columns, loss = [3, 7], MaskedLoss([3, 7], weights)
    target[:, columns] = torch.randint(-1, 2, (8, 2)).float()
    without = mask.clone()
    without[:, columns] = False
    expected = MaskedLoss(pos_weight=weights)(logits[:, :14], target, without) * without.sum()
    for place, column in enumerate(columns):
        used = mask[:, column]
        classes = torch.stack([torch.zeros(8), logits[:, column], logits[:, 14 + place]], dim=1)[used]
        truth = target[used, column].long() % 3
        expected += F.cross_entropy(classes, truth, torch.tensor([1, weights[column], 1]), reduction="sum")
    torch.testing.assert_close(loss(logits, target, mask) * mask.sum(), expected)
    assert loss.state_dict() == {}


def test_positive_weights_are_negatives_over_positives_of_the_cells_in_the_mask() -> None:
    columns = {
        "1 of 4": ([1, 0, 0, 0], [1, 1, 1, 1], 3.0),
        "masked": ([1, 1, 0, 0], [1, 0, 1, 1], 2.0),
        "uncertain": ([1, 1, -1, 0], [1, 1, 1, 1], 0.5),
        "soft": ([1, 0.25, 0.25, 0], [1, 1, 1, 1], 2.5 / 1.5),
        "no positive": ([0, 0, 0, 0], [1, 1, 1, 1], 1.0),
        "no negative": ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        "nothing": ([1, 0, 0, 0], [0, 0, 0, 0], 1.0),
        "rare": ([0.01, 0, 0, 0], [1, 1, 1, 1], 20.0),
    }
    target, mask, expected = (torch.tensor(rows) for rows in zip(*columns.values(), strict=True))
    torch.testing.assert_close(positive_weights(target.T, mask.T.bool()), expected)


def test_auc_margin_loss_is_the_mean_over_pairs() -> None:
    """p(1-p) times the mean over pairs of (1 - their difference)², averaged over the labels."""
    logits = torch.randn(24, 3, dtype=torch.float32, requires_grad=True)
    target, mask = torch.randint(0, 2, (24, 3)).float(), torch.rand(24, 3) < 0.8
    losses = []
    for scores, truth, used in zip(torch.sigmoid(logits).T, target.T, mask.T, strict=True):
        positives, negatives = scores[used & (truth == 1)], scores[used & (truth == 0)]
        share = len(positives) / (len(positives) + len(negatives))
        losses.append(share * (1 - share) * ((1 - positives[:, None] + negatives) ** 2).mean())
    loss, expected = AUCMarginLoss(target, mask)(logits, target, mask), torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][~mask] == 0).all()


def test_auc_margin_loss_keeps_the_classes_means_between_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 4, 1, generator=generator, requires_grad=True)
    target = torch.zeros(8, 4, 1)
    target[::3, 0] = 1  # batches 1, 2, 4, 5 and 7 have no positive
    mask = torch.ones(8, 4, 1, dtype=torch.bool)
    loss = AUCMarginLoss(target.flatten(0, 1), mask.flatten(0, 1))
    scores = torch.sigmoid(logits)
    age = 0.99 ** torch.arange(7, -1, -1)[:, None, None]
    a = (scores * target * age).sum().detach() / (target * age).sum()
    b = (scores * (1 - target) * age).sum().detach() / ((1 - target) * age).sum()
    alpha, p = (1 + b - a).detach(), target.mean()

    for step in range(7):
        loss(logits[step], target[step], mask[step])
    resumed = AUCMarginLoss(target.flatten(0, 1), mask.flatten(0, 1))
    resumed.load_state_dict(loss.state_dict())
    direct = (1 - p) * (scores[7] - a) ** 2 * target[7] + p * (scores[7] - b) ** 2 * (1 - target[7])
    direct = direct + 2 * alpha * (p * (1 - p) + p * scores[7] * (1 - target[7]) - (1 - p) * scores[7] * target[7])
    direct = (direct - p * (1 - p) * alpha**2).mean()
    for value in (loss(logits[7], target[7], mask[7]), resumed(logits[7], target[7], mask[7])):
        torch.testing.assert_close(value, direct)
        gradients = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, direct)]
        torch.testing.assert_close(*gradients)


def test_auc_margin_loss_leaves_out_labels_of_one_class_or_not_met() -> None:
    target, mask = torch.zeros(40, 4), torch.ones(40, 4, dtype=torch.bool)
    target[:20, 0] = target[0, 1] = target[:, 2] = 1
    mask[:, 3] = False
    loss = AUCMarginLoss(target, mask)
    logits = torch.randn(40, 4, requires_grad=True)
    half = slice(10, 40)  # has no positive of label 1
    value = loss(logits[half], target[half], mask[half])
    alone = AUCMarginLoss(target[:, :1], mask[:, :1])
    torch.testing.assert_close(value, alone(logits[half, :1], target[half, :1], mask[half, :1]))
    value.backward()
    assert logits.grad is not None
    assert ((logits.grad != 0).any(dim=0) == torch.tensor([True, False, False, False])).all()
    loss(logits, target, mask).backward()  # now it has been met
    assert (logits.grad[:, 1] != 0).all()
    assert loss(logits, target, torch.zeros_like(mask)).isfinite()


def test_ranks_share_the_classes_means(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = torch.randn(16, 2), torch.randint(0, 2, (16, 2)).float()
    mask = torch.rand(16, 2) < 0.9
    complete, other, ours = (AUCMarginLoss(target, mask) for _ in range(3))
    complete(logits, target, mask)
    other(logits[8:], target[8:], mask[8:])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: sums.add_(other.met.flatten(0, 1)))
    ours(logits[:8], target[:8], mask[:8])
    torch.testing.assert_close(ours.met, complete.met)
