"""What the check of an export lets pass, and what it does not."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.augment import equalize, normalize
from model.export import TOLERANCE, Reading, Scorer, compare_scores, draw_probes, export_scorer
from model.networks import ResCNN
from model.predict import predict_scores
from model.runs.config import Config
from model.runs.folder import fuse
from pipeline import DataError


@pytest.fixture
def network() -> ResCNN:
    torch.manual_seed(0)
    network = ResCNN(14, widths=(16, 32))
    network(torch.randn(64, 1, 32, 32))  # so that BatchNorm has seen something
    return network


def add_noise(scorer: Scorer) -> None:
    torch.manual_seed(1)
    for weight in scorer.networks.parameters():
        weight.mul_(1 + 0.01 * torch.randn_like(weight))


def shift_mean(scorer: Scorer) -> None:
    scorer.members = [scorer.members[0]._replace(mean=140.0)]


@pytest.mark.parametrize(
    ("spoil", "suffix"),
    [(add_noise, ".pt2"), *(pytest.param(shift_mean, suffix, marks=pytest.mark.soak) for suffix in (".onnx", ".pt2"))],
)
def test_an_export_that_is_off_is_refused(
    network: ResCNN, spoil: Callable[[Scorer], None], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_good, path = torch.export.export, tmp_path / f"model{suffix}"

    def export_spoiled(scorer: Scorer, *arguments: object, **options: object) -> object:
        spoiled = copy.deepcopy(scorer)
        with torch.no_grad():
            spoil(spoiled)
        return export_good(spoiled, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", export_spoiled)
    with pytest.raises(DataError, match=r"model\..*: exported logits differ from eager ones by .*, more than 0.01$"):
        export_scorer(Scorer([Reading(network, list(range(14)), 120.0, 60.0)]), (32, 32), path, {})
    assert not path.exists()


def test_saturated_scores_are_no_evidence() -> None:
    saturated = torch.sigmoid(torch.full((2, 3), 30.0))
    with pytest.raises(DataError, match=r"^model.pt2: all scores of the images tried are 0 or 1"):
        compare_scores(saturated, saturated, Path("model.pt2"))


def test_probes_span_the_range() -> None:
    probes = draw_probes(48, 40)
    assert probes.shape == (12, 1, 48, 40)
    assert (int(probes.min()), int(probes.max())) == (0, 255)
    assert len({probe.double().mean().item() for probe in probes}) >= 9


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.soak), ".pt2"])
def test_a_robust_network_equalizes_wherever_it_is_used(network: ResCNN, suffix: str, tmp_path: Path) -> None:
    plain = copy.deepcopy(network).eval()
    robust = fuse(network, Config(equalize=True)).eval()
    assert robust.state_dict().keys() == plain.state_dict().keys()
    images = torch.randint(0, 200, (5, 1, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = plain(equalize(images.float()))
        torch.testing.assert_close(copy.deepcopy(robust)(normalize(images, 120.0, 60.0)), expected)
        brighter = predict_scores(robust, [7], [(images + 50,)], 120.0, 60.0, torch.float32)
        np.testing.assert_allclose(brighter[:, 0], torch.sigmoid(expected[:, 7]), atol=1e-5)
    error = export_scorer(Scorer([Reading(robust, [7], 120.0, 60.0)]), (32, 32), tmp_path / f"model{suffix}", {})
    assert error < TOLERANCE / 10
