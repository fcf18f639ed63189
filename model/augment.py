"""uint8 batch → normalised float batch, randomly transformed; runs on the device the batch is on.

The draws are a pure function of (seed, epoch, step) and are made on the CPU, so a resumed run, and a run on
another device, sees the same augmentations. The ranges are those the best CheXpert repositories share.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = 15.0  # degrees
SHIFT = 0.05  # of the image's side
SCALE = 0.05  # 0.95 to 1.05
BRIGHTNESS = 0.1
CONTRAST = 0.1


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """float32 images of zero mean and unit variance, from uint8 ones; `mean` and `std` in gray levels."""
    normalized: Tensor = (images.float() - mean) / std
    return normalized


def augment(images: Tensor, mean: float, std: float, seed: int, epoch: int, step: int) -> Tensor:
    """Normalised float32 images [B, 1, H, W]: random affine, contrast and brightness; no flip.

    No flip, because the heart's side is a finding. What an affine map uncovers is filled by the border.
    """
    generator = torch.Generator().manual_seed(_stream_seed(seed, epoch, step))
    # [B, 6] in (-1, 1): rotation, shift x, shift y, scale, brightness, contrast
    draws = torch.rand(len(images), 6, generator=generator) * 2 - 1
    theta = affine_matrices(draws[:, :4]).to(images.device, non_blocking=True)
    brightness, contrast = draws.to(images.device, non_blocking=True)[:, 4:].T[..., None, None, None]

    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    warped = F.grid_sample(normalize(images, mean, std), grid, padding_mode="border", align_corners=False)
    # Contrast about the image's own mean; brightness is a share of the full gray range.
    center = warped.mean(dim=(1, 2, 3), keepdim=True)
    lift = BRIGHTNESS * brightness * (255 / std)
    augmented: Tensor = (warped - center) * (1 + CONTRAST * contrast) + center + lift
    return augmented


def affine_matrices(draws: Tensor) -> Tensor:
    """Sampling matrices [B, 2, 3] for `affine_grid`, from draws [B, 4] in (-1, 1)."""
    angle = torch.deg2rad(draws[:, 0] * ROTATION)
    shift = draws[:, 1:3] * SHIFT * 2  # affine_grid spans -1 to 1
    inverse_scale = 1 / (1 + draws[:, 3] * SCALE)
    cos, sin = torch.cos(angle) * inverse_scale, torch.sin(angle) * inverse_scale
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)


def _stream_seed(*parts: int) -> int:
    """A 63-bit seed: nearby (seed, epoch, step) give unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
