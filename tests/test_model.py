import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from sklearn.metrics import roc_auc_score
from torchvision.transforms.functional import InterpolationMode, affine

from model.augment import affine_matrices, augment, normalize
from model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from model.losses import label_scores, masked_loss
from model.metrics import report_auroc
from model.networks import ARCHITECTURES, build_network


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_networks_map_gray_images_to_logits_and_pass_gradients(arch: str) -> None:
    network = build_network(arch, 14)
    logits = network(torch.rand(2, 1, 64, 64))
    assert logits.shape == (2, 14)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_one_channel_resnet_is_torchvisions_but_for_its_stem() -> None:
    ours = build_network("resnet18", 14).state_dict()
    theirs = torchvision.models.resnet18(num_classes=14).state_dict()
    assert {name: value.shape for name, value in ours.items() if name != "conv1.weight"} == {
        name: value.shape for name, value in theirs.items() if name != "conv1.weight"
    }
    assert ours["conv1.weight"].shape == (64, 1, 7, 7)


def test_masked_loss_is_the_mean_over_the_cells_in_the_mask() -> None:
    logits, target = torch.randn(8, 14), torch.rand(8, 14)
    mask = torch.rand(8, 14) < 0.5
    expected = F.binary_cross_entropy_with_logits(logits[mask], target[mask])
    torch.testing.assert_close(masked_loss(logits, target, mask), expected)
    assert masked_loss(logits, target, torch.zeros(8, 14, dtype=torch.bool)) == 0
    # an ignored cell has no influence, whatever it holds
    logits.requires_grad_()
    masked_loss(logits, target, mask).backward()
    assert logits.grad is not None
    assert (logits.grad[~mask] == 0).all()


def test_three_classes_are_softmax_cross_entropy_and_its_two_certain_classes_the_score() -> None:
    columns = torch.tensor([2, 5, 11])
    binary = torch.tensor([label for label in range(14) if label not in columns])
    logits, target = torch.randn(8, 17, dtype=torch.bfloat16), torch.rand(8, 14)
    target[:, columns] = torch.tensor([-1.0, 0.0, 1.0])[torch.randint(0, 3, (8, 3))]
    mask = torch.rand(8, 14) < 0.6
    negative, positive, uncertain = torch.zeros(8, 3), logits[:, columns].float(), logits[:, 14:].float()
    classes = torch.stack([negative, uncertain, positive], dim=2)  # [8, 3, 3], in the paper's order
    truth = torch.tensor([1, 0, 2])[(target[:, columns] + 1).long()]  # from -1, 0, 1

    ours, others = mask[:, columns], mask[:, binary]
    losses = torch.cat(
        [
            F.cross_entropy(classes[ours], truth[ours], reduction="none"),
            F.binary_cross_entropy_with_logits(
                logits[:, binary].float()[others], target[:, binary][others], reduction="none"
            ),
        ]
    )
    loss = masked_loss(logits, target, mask, columns)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses.mean())
    torch.testing.assert_close(  # all labels with three classes
        masked_loss(logits[:, [2, 5, 11, 14, 15, 16]], target[:, columns], ours, torch.arange(3)),
        F.cross_entropy(classes[ours], truth[ours]),
    )

    scores = label_scores(logits, 14)
    shares = torch.softmax(classes, dim=2)
    expected = shares[:, :, 2] / (shares[:, :, 0] + shares[:, :, 2])
    torch.testing.assert_close(scores[:, columns], expected)
    torch.testing.assert_close(scores[:, binary], torch.sigmoid(logits[:, binary].float()))


def test_three_classes_pass_gradients_to_cells_in_the_mask_alone() -> None:
    logits = torch.randn(4, 28, requires_grad=True)
    mask = torch.rand(4, 14) < 0.5
    target = torch.randint(-1, 2, (4, 14)).float()
    masked_loss(logits, target, mask, torch.arange(14)).backward()
    assert logits.grad is not None
    assert ((logits.grad != 0) == mask.repeat(1, 2)).all()
    assert masked_loss(logits, target, torch.zeros_like(mask), torch.arange(14)) == 0


def test_auroc_equals_scikit_learn_and_skips_one_class_labels() -> None:
    random = np.random.default_rng(0)
    names = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion", "Fracture", "Rare"]
    target = (random.random((300, 7)) < 0.3).astype(np.float32)
    scores = (random.random((300, 7)) * 0.5 + target * 0.2).astype(np.float32).round(2)  # with ties
    mask = random.random((300, 7)) < 0.8
    target[:, 5] = 0
    target[:, 6] = np.arange(300) < 9
    mask[:, 6] = True
    report = report_auroc(names, scores, target, mask)
    expected = {
        name: roc_auc_score(target[mask[:, column], column], scores[mask[:, column], column])
        for column, name in enumerate(names)
        if name != "Fracture"
    }
    for name, value in expected.items():
        assert report["labels"][name]["auroc"] == pytest.approx(value, abs=1e-6)
    assert report["labels"]["Fracture"] == {"auroc": None, "positives": 0, "negatives": int(mask[:, 5].sum())}
    assert report["skipped"] == ["Fracture"]
    assert report["macro_auroc"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert report["mean5_auroc"] == pytest.approx(np.mean(list(expected.values())[:5]), abs=1e-6)
    assert report["macro10_auroc"] == report["mean5_auroc"]  # Rare has 9 positives
    mask[:, 0] = False
    assert report_auroc(names, scores, target, mask)["mean5_auroc"] is None
    with pytest.raises(ValueError, match="scores are not finite"):
        report_auroc(names, np.full_like(scores, np.nan), target, mask)


def test_augmentation_is_a_function_of_seed_epoch_and_step() -> None:
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    first = augment(images, 128.0, 64.0, seed=1, epoch=2, step=3)
    torch.manual_seed(99)
    torch.testing.assert_close(augment(images, 128.0, 64.0, seed=1, epoch=2, step=3), first, rtol=0, atol=0)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(augment(images, 128.0, 64.0, *other), first)
    assert not torch.equal(first[0], normalize(images, 128.0, 64.0)[0])


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ((0.8, 0.0, 0.0, 0.0), {"angle": -12.0}),
        ((0.0, 0.5, -0.25, 0.0), {"translate": [-2, 1]}),
        ((0.0, 0.0, 0.0, 1.0), {"scale": 1.05}),
    ],
)
def test_affine_maps_are_torchvisions(draws: tuple[float, ...], expected: dict[str, Any]) -> None:
    rows, columns = torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij")
    image = (torch.sin(rows / 5) + torch.cos(columns / 7))[None, None]
    grid = F.affine_grid(affine_matrices(torch.tensor([draws])), [1, 1, 80, 80], align_corners=False)
    ours = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    options = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0]} | expected
    theirs = affine(image, interpolation=InterpolationMode.BILINEAR, **options)
    torch.testing.assert_close(ours[..., 20:60, 20:60], theirs[..., 20:60, 20:60], rtol=0, atol=1e-3)


def test_checkpoints_come_back_and_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    state = {"weights": {"a": torch.arange(3.0)}, "epoch": 3, "history": [{"auroc": None}]}
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"]["a"], torch.arange(3.0))
    assert (loaded["epoch"], loaded["history"]) == (3, [{"auroc": None}])
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"weights": Payload()}, path)
    with pytest.raises(CheckpointError, match=r"last.pt: damaged, or not a checkpoint of this program$"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    save_checkpoint(path, state)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"none.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
