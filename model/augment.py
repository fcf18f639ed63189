"""uint8 batch → normalized float batch, randomly transformed; runs on the device the batch is on.

The draws are a pure function of (seed, epoch, step) and are made on the CPU, so a resumed run, a run on another
device, and ranks that each hold a slice of the batch all see the same augmentations. The ranges are those that the
best CheXpert repositories share; none of them crops, so the crop is an option.

`robust` also varies what depends on device and hospital rather than on disease: aspect ratio, sharpness, gray scale,
noise and borders. A network that relies on these performs worse on another hospital's images.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.names import AUGMENTATIONS, Augmentation

ROTATION = 15.0  # degrees
SHIFT = 0.05  # share of the image's side
SCALE = 0.05  # 0.95 to 1.05
BRIGHTNESS = 0.1
CONTRAST = 0.1
ASPECT = 0.15  # height by width: up to e^0.3, or its inverse
DETAIL = 1.5  # largest gain of detail finer than a random scale; the smallest is 0
FINEST, COARSEST = 0.5, 1 / 16  # range of that scale: pixels; share of the side
NOISE = 0.35  # largest standard deviation, in standard deviations of the image
FRAME = 0.15  # width of a border, as a share of the side
UNIFORM = 3**0.5  # largest value of an equalized image


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """Images in gray levels as float32 with zero mean and unit variance; `mean` and `std` are in gray levels."""
    return images.float().sub(mean).div(std)


def augment(
    images: Tensor,
    mean: float,
    std: float,
    at: tuple[int, int, int],
    kind: Augmentation = AUGMENTATIONS["affine"],
    places: npt.NDArray[np.int64] | None = None,
    total: int | None = None,
) -> Tensor:
    """Normalized float32 images [B, 1, H, W]: random affine, crop, contrast and brightness.

    The seed, epoch and step in `at` decide the draws. `places` [B] are the images' positions in a batch of `total`
    (None: the batch is complete), so that a part of a batch is transformed as in the complete one. With `kind.robust`
    the images are equalized instead of normalized by `mean` and `std`.
    """
    rows = slice(None) if places is None else torch.from_numpy(places)
    # By a hash, so that nearby (seed, epoch, step) give unrelated draws.
    digest = hashlib.blake2b(repr(at).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def draw(columns: int) -> Tensor:  # uniform in (-1, 1), [B, columns]
        return (torch.rand(total or len(images), columns, generator=generator) * 2 - 1)[rows]

    draws = draw(6)  # rotation, shift x, shift y, scale, brightness, contrast; no flip: the heart's side is a finding
    theta = sampling_matrices(draws[:, :4], draw(3), kind.crop, images.shape[2] / images.shape[3])
    if kind.robust:
        aspect = torch.exp(ASPECT * draw(1))
        theta = theta * torch.stack([aspect, 1 / aspect, torch.ones_like(aspect)], dim=2)
    theta = theta.to(images.device, non_blocking=True)
    brightness, contrast = draws.to(images.device, non_blocking=True)[:, 4:].T[..., None, None, None]

    inputs = equalize(images.float()) if kind.robust else images.float()
    warped = F.grid_sample(inputs, _sampling_grid(theta, *images.shape[2:]), padding_mode="border", align_corners=False)
    if kind.robust:
        look = draw(11).to(images.device, non_blocking=True)
        grain = torch.randn(images.shape[2:], generator=generator).to(images.device, non_blocking=True)
        return change_look(warped, look, grain)
    # Contrast about the image's own mean; brightness is a share of the full gray range. Fused with normalization into
    # one product and one sum, since memory traffic dominates the cost.
    center = warped.mean(dim=(1, 2, 3), keepdim=True)
    gain = 1 + CONTRAST * contrast
    return warped.mul_(gain / std).add_((center * (1 - gain) - mean + BRIGHTNESS * 255 * brightness) / std)


def change_look(images: Tensor, draws: Tensor, grain: Tensor) -> Tensor:
    """Equalized images [B, 1, H, W] as another device might have rendered them; no finding moves.

    Detail finer than a random scale is removed or enhanced, noise is added, and half of the images get a border of a
    random gray. `draws` [B, 11] in (-1, 1) decide all but `grain` [H, W], standard normal noise, which is shifted
    differently for each image. The gray scale needs no change: it is equalized afterwards.
    """
    height, width = images.shape[2:]
    unit = ((draws + 1) / 2)[..., None, None, None]  # [B, 11, 1, 1, 1] in (0, 1)
    scale = FINEST * (COARSEST * max(height, width) / FINEST) ** unit[:, 0, 0]
    coarse = low_pass(images, scale)
    images = coarse + DETAIL * unit[:, 1] * (images - coarse)

    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    down, right = (unit[:, 2, 0, 0] * height).long(), (unit[:, 3, 0, 0] * width).long()
    moved = grain[((y + down) % height)[:, :, None], ((x + right) % width)[:, None]]
    images = images + NOISE * unit[:, 4] * moved[:, None]

    top, bottom, left, right = (FRAME * unit[:, 5:9, 0, 0] * (draws[:, 9:10, None] < 0)).unbind(1)
    y, x = (y + 0.5) / height, (x + 0.5) / width
    inside = ((y > top) & (y < 1 - bottom))[:, :, None] & ((x > left) & (x < 1 - right))[:, None]
    return torch.where(inside[:, None], images, draws[:, 10, None, None, None] * UNIFORM)


def equalize(images: Tensor) -> Tensor:
    """Float images [B, 1, H, W] with each gray value replaced by the share of darker pixels in the image.

    Scaled to zero mean and unit variance; pixels of the same value count half. This undoes any monotone change
    of the gray scale (gamma, window, exposure), up to the 256 steps into which each image's range is divided.
    """
    flat = images.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    steps = ((flat - low) * (255 / (high - low).clamp_min(1e-6))).round().long()
    counts = steps.new_zeros((steps.shape[0], 256)).scatter_add(1, steps, torch.ones_like(steps))
    shares = (counts.cumsum(1) - counts / 2) / flat.shape[1]
    return ((2 * shares - 1) * UNIFORM).gather(1, steps).view_as(images)


def low_pass(images: Tensor, scale: Tensor) -> Tensor:
    """Images [B, 1, H, W], each blurred by a Gaussian with standard deviation `scale` [B, 1, 1] in pixels."""

    def kernels(side: int) -> Tensor:  # [B, side, side], renormalized at the border; each image can have another one
        place = torch.arange(side, dtype=torch.float32, device=images.device)
        kernel = torch.exp(-(((place[:, None] - place) / scale) ** 2) / 2)
        return kernel / kernel.sum(dim=2, keepdim=True)

    return (kernels(images.shape[2]) @ images[:, 0] @ kernels(images.shape[3]).transpose(1, 2))[:, None]


def sampling_matrices(turn: Tensor, cut: Tensor, crop: float, aspect: float = 1.0) -> Tensor:
    """Matrices [B, 2, 3] for torch's `affine_grid`: a crop of what a rotation, shift and change of scale give.

    From draws in (-1, 1): `turn` [B, 4] are angle, shift and scale; `cut` [B, 3] the crop's side, uniform in
    (1 - crop, 1) of the image's, and its place. Coordinates span -1 to 1 along both sides: `aspect`, height by width,
    makes the map a rotation of pixels.
    """
    angle, shift = torch.deg2rad(turn[:, 0] * ROTATION), turn[:, 1:3] * SHIFT * 2
    inverse_scale = 1 / (1 + turn[:, 3] * SCALE)
    cos, sin = torch.cos(angle) * inverse_scale, torch.sin(angle) * inverse_scale
    turned = torch.stack([cos, -sin * aspect, shift[:, 0], sin / aspect, cos, shift[:, 1]], dim=1)
    side = 1 - crop * (cut[:, 0] + 1) / 2
    x, y = (cut[:, 1:] * (1 - side[:, None])).unbind(1)
    zeros, ones = torch.zeros_like(side), torch.ones_like(side)
    cropped = torch.stack([side, zeros, x, zeros, side, y, zeros, zeros, ones], dim=1)
    return turned.view(-1, 2, 3) @ cropped.view(-1, 3, 3)


def _sampling_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """`F.affine_grid` without align_corners, [B, H, W, 2], by broadcasting: ten times faster on a CPU."""
    x = torch.linspace(1 / width - 1, 1 - 1 / width, width, device=theta.device)
    y = torch.linspace(1 / height - 1, 1 - 1 / height, height, device=theta.device)
    of_x, of_y, shift = theta.unsqueeze(-1).unbind(2)  # each [B, 2, 1]
    return torch.addcmul((of_y * y + shift)[..., None], of_x[..., None], x).permute(0, 2, 3, 1)
