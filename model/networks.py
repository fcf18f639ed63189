"""Architecture name → network from gray images [B, 1, H, W] to logits [B, outputs]."""

import torch
import torchvision.models
from torch import Tensor, nn

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "rescnn")


def build_network(arch: str, outputs: int) -> nn.Module:
    """A freshly initialised network: torchvision's ResNets with a one-channel stem, or `rescnn`."""
    if arch == "rescnn":
        return ResCNN(outputs)
    network: nn.Module = getattr(torchvision.models, arch)(num_classes=outputs)
    stem = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    network.conv1 = stem
    return network


class ResCNN(nn.Module):
    """A small residual network (0.9 M weights, 0.2 G multiply-adds at 224 pixels) for CPUs and small sets.

    Stem (convolution, BatchNorm, ReLU, pooling), then per width of 32, 64, 128, 256 channels a residual
    block, which halves the resolution from the second on, and a bottleneck block; then a pooled classifier.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_norm(1, 32, kernel=5, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        channels = 32
        for width in (32, 64, 128, 256):
            blocks += [residual_block(channels, width, stride=width // channels), bottleneck_block(width)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, outputs] of images [B, 1, H, W]."""
        logits: Tensor = self.head(self.blocks(self.stem(images)))
        return logits


class _Residual(nn.Module):
    """ReLU(branch(x) + shortcut(x)), He et al., 2016."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.branch(features) + self.shortcut(features))


def residual_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Two 3×3 convolutions around a shortcut, which is a strided 1×1 convolution where the shape changes."""
    branch = nn.Sequential(
        *_conv_norm(inputs, outputs, kernel=3, stride=stride),
        nn.ReLU(),
        *_conv_norm(outputs, outputs, kernel=3),
    )
    same = stride == 1 and inputs == outputs
    shortcut = nn.Identity() if same else nn.Sequential(*_conv_norm(inputs, outputs, kernel=1, stride=stride))
    return _Residual(branch, shortcut)


def bottleneck_block(channels: int) -> nn.Module:
    """1×1 down to half the channels, 3×3, 1×1 back up, around an identity shortcut."""
    middle = channels // 2
    branch = nn.Sequential(
        *_conv_norm(channels, middle, kernel=1),
        nn.ReLU(),
        *_conv_norm(middle, middle, kernel=3),
        nn.ReLU(),
        *_conv_norm(middle, channels, kernel=1),
    )
    return _Residual(branch, nn.Identity())


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)
