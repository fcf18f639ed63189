"""Heat maps of networks whose answer is known."""

import pytest
import torch
from torch import nn

from model.networks import build_network
from model.predict import draw_maps


def test_the_map_is_where_the_logit_comes_from() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(name.endswith("weight"))
        network[4].weight[1] = -1  # type: ignore[operator]
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 2, 5], images[0, 0, 6, 1] = 4.0, 2.0
    scores, maps = draw_maps(network, images, [0, 1])
    torch.testing.assert_close(scores[0, 0], torch.sigmoid(torch.tensor(6 / 64)))
    assert int(maps[0, 0].argmax()) == 8 * 2 + 5  # row 2, column 5
    assert maps[0, 0, 6, 1] == pytest.approx(2 / 4, abs=0.01)
    assert maps[0, 0, 0, 0] < 0.01  # blurred, but not so far
    assert maps[0, 1].max() == 0  # what lowers a logit is not on its map


@pytest.mark.parametrize("arch", ["rescnn", "densenet121", "timm/vit_tiny_patch16_224?depth=2"])
def test_maps_of_any_network_are_in_range_and_change_nothing(arch: str) -> None:
    network = build_network(arch, 14, (80, 64))
    images = torch.randn(2, 1, 80, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.sigmoid(network.eval()(images))[:, [3, 0]]
    scores, maps = draw_maps(network, images, [3, 0])
    torch.testing.assert_close(scores, expected)
    assert maps.shape == (2, 2, 80, 64)
    assert 0 <= maps.min() <= maps.max() <= 1
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
