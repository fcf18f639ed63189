"""uint8 batch → normalized float batch, randomly transformed; runs on the device the batch is on.

The draws are a pure function of (seed, epoch, step) and are made on the CPU, so a resumed run, a run on another
device, and ranks that each hold a slice of the batch all see the same augmentations. The ranges are those that the
best CheXpert repositories share; none of them crops, so the crop is an option.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = 15.0  # degrees
SHIFT = 0.05  # share of the image's side
SCALE = 0.05  # 0.95 to 1.05
BRIGHTNESS = 0.1
CONTRAST = 0.1
AUGMENTATIONS = {
    "none": 0.0,
    "affine": 0.0,
    "crop": 0.4,
}  # of training: the largest share that a crop leaves out


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """uint8 images as float32 with zero mean and unit variance; `mean` and `std` are in gray levels."""
    normalized: Tensor = (images.float() - mean) / std
    return normalized


def augment(
    images: Tensor,
    mean: float,
    std: float,
    seed: int,
    epoch: int,
    step: int,
    crop: float = 0.0,
    places: npt.NDArray[np.int64] | None = None,
    total: int | None = None,
) -> Tensor:
    """Normalized float32 images [B, 1, H, W]: random affine, crop, contrast and brightness; no flip.

    No flip, because the heart's side is a finding. Areas that the affine map uncovers are filled from the border.
    `crop` is the largest share of the side that a random square crop of the result leaves out (0: no crop);
    affine map and crop are a single interpolation. `places` [B] are the images' positions in a batch of `total`
    (None: this is the whole batch): a part of a batch is transformed as it is in the whole.
    """
    rows, total = slice(None) if places is None else torch.from_numpy(places), total or len(images)
    generator = torch.Generator().manual_seed(_stream_seed(seed, epoch, step))
    # [B, 6] in (-1, 1): rotation, shift x, shift y, scale, brightness, contrast
    draws = _draw(total, 6, generator)[rows]
    theta = affine_matrices(draws[:, :4]) @ crop_matrices(_draw(total, 3, generator)[rows], crop)
    theta = theta.to(images.device, non_blocking=True)
    brightness, contrast = draws.to(images.device, non_blocking=True)[:, 4:].T[..., None, None, None]

    warped = F.grid_sample(
        images.float(), _sampling_grid(theta, *images.shape[2:]), padding_mode="border", align_corners=False
    )
    # Contrast about the image's own mean; brightness is a share of the full gray range. Fused with normalization into
    # one product and one sum, since memory traffic dominates the cost.
    center = warped.mean(dim=(1, 2, 3), keepdim=True)
    gain = 1 + CONTRAST * contrast
    augmented: Tensor = warped.mul_(gain / std)
    return augmented.add_((center * (1 - gain) - mean + BRIGHTNESS * 255 * brightness) / std)


def affine_matrices(draws: Tensor) -> Tensor:
    """Sampling matrices [B, 2, 3] for torch's `affine_grid`, from draws [B, 4] in (-1, 1)."""
    angle = torch.deg2rad(draws[:, 0] * ROTATION)
    shift = draws[:, 1:3] * SHIFT * 2  # the coordinates span -1 to 1
    inverse_scale = 1 / (1 + draws[:, 3] * SCALE)
    cos, sin = torch.cos(angle) * inverse_scale, torch.sin(angle) * inverse_scale
    return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)


def crop_matrices(draws: Tensor, crop: float) -> Tensor:
    """Maps [B, 3, 3] from a square crop's coordinates to its image's, both from -1 to 1.

    Draws [B, 3] in (-1, 1) decide the crop's side, uniform in (1 - crop, 1) of the image's, and its place.
    """
    side = 1 - crop * (draws[:, 0] + 1) / 2
    place = draws[:, 1:] * (1 - side[:, None])
    zero, one = torch.zeros_like(side), torch.ones_like(side)
    return torch.stack([side, zero, place[:, 0], zero, side, place[:, 1], zero, zero, one], dim=1).view(
        -1, 3, 3
    )


def _sampling_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """`F.affine_grid` without align_corners, [B, H, W, 2], by broadcasting: ten times faster on a CPU."""
    x = torch.linspace(1 / width - 1, 1 - 1 / width, width, device=theta.device)
    y = torch.linspace(1 / height - 1, 1 - 1 / height, height, device=theta.device)
    of_x, of_y, shift = theta.unsqueeze(-1).unbind(2)  # each [B, 2, 1]
    return torch.addcmul((of_y * y + shift)[..., None], of_x[..., None], x).permute(0, 2, 3, 1)


def _draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform in (-1, 1), float32 [rows, columns]."""
    return torch.rand(rows, columns, generator=generator) * 2 - 1


def _stream_seed(*parts: int) -> int:
    """A 63-bit seed: nearby (seed, epoch, step) give unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
