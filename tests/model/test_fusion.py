"""Networks over the views of a study, against the network for one image that they are made of."""

import copy

import pytest
import torch
from torch import Tensor, nn

from model.names import FUSIONS, UNKNOWN_FRONTAL, check_arch
from model.networks import StudyNetwork, build_network
from model.runs.embeddings import embed

# A lateral alone, a frontal with a lateral whose first image is unusable, and three views.
PRESENT = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1]]).bool()
PROJECTION = torch.tensor([2, 0, 2, 1, 2, 3], dtype=torch.int8)
VIEWS = [[0], [1, 2], [3, 4, 5]]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def build(fusion: str, arch: str = "rescnn", frozen: bool = False) -> tuple[nn.Module, StudyNetwork]:
    torch.manual_seed(0)
    network = build_network(arch, 14).eval()
    return network, StudyNetwork(copy.deepcopy(network), fusion, frozen).eval()


@pytest.mark.parametrize("arch", ["rescnn", "resnet18", "densenet121", "convnext_tiny", "timm/resnet10t"])
def test_it_starts_as_the_network_for_images(arch: str, images: Tensor) -> None:
    check_arch(arch)
    network, fused = build("mean", arch)
    with torch.inference_mode():
        logits, found = network(images), fused(images, PRESENT, PROJECTION)
    expected = torch.stack([logits[views].mean(dim=0) for views in VIEWS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(embed(fused, images), fused.backbone(images))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_pooling_is_over_the_views_there_are(fusion: str, images: Tensor) -> None:
    _, fused = build(fusion)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        found = fused(images, PRESENT, PROJECTION)
        codes = PROJECTION.long()
        features = fused.backbone(images) * (1 + fused.projection[codes, 0]) + fused.projection[codes, 1]
        for study, views in enumerate(VIEWS):
            if fusion == "attention":
                weights = fused.attention(features[views]).softmax(dim=0)
                expected = (weights * fused.head(features[views])).sum(dim=0)
            else:
                own = features[views]
                expected = fused.head(own.mean(dim=0) if fusion == "mean" else own.amax(dim=0))
            torch.testing.assert_close(found[study], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_keep_their_precision_under_autocast(fusion: str, images: Tensor) -> None:
    _, fused = build(fusion)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = fused(images, PRESENT, PROJECTION)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).float().mean() > 0.9


def test_an_unknown_frontal_is_between_ap_and_pa(images: Tensor) -> None:
    _, fused = build("mean")
    with torch.no_grad():
        fused.projection.normal_(generator=torch.Generator().manual_seed(2))
        one = torch.ones(1, 1, dtype=torch.bool)
        features = fused.backbone(images[:1])
        between = fused.projection[:2].mean(dim=0)
        expected = fused.head(features * (1 + between[0]) + between[1])
        torch.testing.assert_close(fused(images[:1], one, torch.tensor([UNKNOWN_FRONTAL])), expected)
