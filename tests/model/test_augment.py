from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, affine, gaussian_blur, resized_crop

from model.augment import _sampling_grid, augment, change_look, equalize, low_pass, normalize, sampling_matrices
from model.names import AUGMENTATIONS, Augmentation


def smooth_image(height: int, width: int) -> Tensor:
    """Waves [1, 1, height, width], whose interpolation errors are small."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return (torch.sin(rows / 5) + torch.cos(columns / 7))[None, None]


def sample(image: Tensor, theta: Tensor) -> Tensor:
    grid = _sampling_grid(theta, *image.shape[2:])
    torch.testing.assert_close(grid, F.affine_grid(theta, list(image.shape), align_corners=False))
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


@pytest.mark.parametrize("name", ["affine", "robust"])
def test_augmentation_is_a_function_of_seed_epoch_and_step(name: str) -> None:
    kind = AUGMENTATIONS[name]
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    first = augment(images, 128.0, 64.0, (1, 2, 3), kind)
    torch.manual_seed(99)
    torch.testing.assert_close(augment(images, 128.0, 64.0, (1, 2, 3), kind), first, rtol=0, atol=0)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(augment(images, 128.0, 64.0, other, kind), first)
    assert not torch.equal(first[0], normalize(images, 128.0, 64.0)[0])


def test_the_draws_are_written_in_stone() -> None:
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = (4 * rows + 3 * columns).to(torch.uint8).expand(3, 1, 32, 32)
    augmented = augment(images, 100.0, 50.0, (1, 2, 3))
    expected = torch.tensor([[-1.35959, 0.12409, 1.04803], [-1.30174, 0.39630, 1.63963], [-0.80237, 0.78033, 1.90606]])
    torch.testing.assert_close(augmented[:, 0, [4, 16, 27], [5, 16, 20]], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [Augmentation(), Augmentation(crop=0.2), AUGMENTATIONS["robust"]])
def test_ranks_together_see_the_augmentations_of_one(kind: Augmentation) -> None:
    images = torch.randint(0, 256, (6, 1, 32, 32), dtype=torch.uint8)
    complete = augment(images, 128.0, 64.0, (1, 2, 3), kind)
    parts = [augment(images[i : i + 2], 128.0, 64.0, (1, 2, 3), kind, np.arange(i, i + 2), 6) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), complete, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("draws", "expected"),
    [((0.8, 0, 0, 0), {"angle": -12.0}), ((0, 0.5, -0.25, 0), {"translate": [-3, 1]}), ((0, 0, 0, 1), {"scale": 1.05})],
)
def test_affine_maps_are_torchvisions(draws: tuple[float, ...], expected: dict[str, Any]) -> None:
    image = smooth_image(80, 120)
    turn = torch.tensor([draws], dtype=torch.float32)
    output = sample(image, sampling_matrices(turn, torch.zeros(1, 3), 0.0, 80 / 120))
    options = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0]} | expected
    reference = affine(image, interpolation=InterpolationMode.BILINEAR, **options)
    torch.testing.assert_close(output[..., 20:60, 20:100], reference[..., 20:60, 20:100], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("draws", "side", "left", "top"),
    [((-1, 0.3, -0.7), 80, 0, 0), ((1, -1, 1), 60, 0, 20), ((0, 0.6, -0.2), 70, 8, 4), ((1, 1, 0.4), 60, 20, 14)],
)
def test_crops_are_torchvisions(draws: tuple[float, ...], side: int, left: int, top: int) -> None:
    image = smooth_image(80, 80)
    output = sample(image, sampling_matrices(torch.zeros(1, 4), torch.tensor([draws], dtype=torch.float32), 0.25))
    reference = resized_crop(image, top, left, side, side, [80, 80], InterpolationMode.BILINEAR, antialias=False)
    torch.testing.assert_close(output[..., 1:-1, 1:-1], reference[..., 1:-1, 1:-1], rtol=0, atol=1e-4)


def test_a_crop_is_cut_from_what_the_affine_map_gives() -> None:
    image, zeros = smooth_image(160, 160), torch.zeros(1, 7)
    turn, cut = torch.tensor([[0.9, 0.5, -0.5, -1.0]]), torch.tensor([[1.0, 0.4, -0.6]])
    turned = sample(image, sampling_matrices(turn, zeros[:, :3], 0.0))
    expected = sample(turned, sampling_matrices(zeros[:, :4], cut, 0.5))
    output, inner = sample(image, sampling_matrices(turn, cut, 0.5)), (..., slice(40, 120), slice(40, 120))
    torch.testing.assert_close(output[inner], expected[inner], rtol=0, atol=0.02)


def test_crops_stay_inside_and_leave_the_other_draws_alone() -> None:
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]]).T
    edges = sampling_matrices(torch.zeros(1000, 4), torch.rand(1000, 3) * 2 - 1, 0.2) @ corners
    assert (edges.abs() <= 1 + 1e-6).all()
    sides = (edges[:, :, 1] - edges[:, :, 0]) / 2
    assert sides.min() >= 0.8 - 1e-6
    assert 0.89 < sides.mean() < 0.91
    # Of a flat image only the brightness is seen.
    flat = torch.full((4, 1, 8, 8), 100, dtype=torch.uint8)
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    for batch, same in ((flat, True), (images, False)):
        cropped, plain = (augment(batch, 128.0, 64.0, (1, 2, 3), Augmentation(crop=crop)) for crop in (0.2, 0.0))
        assert torch.allclose(cropped, plain, rtol=1e-5, atol=1e-5) == same


def draws_of(**given: float) -> Tensor:
    """Draws [1, 11] under which a film keeps its look, but for what is given in (-1, 1)."""
    names = ["scale", "gain", "down", "right", "noise", "top", "bottom", "left", "edge", "no_frame", "gray"]
    neutral = dict.fromkeys(names, 0.0) | {"gain": 1 / 3, "noise": -1.0, "no_frame": 1.0}
    return torch.tensor([list((neutral | given).values())])


def test_detail_is_what_a_gaussian_blur_removes() -> None:
    film = torch.randn(2, 1, 48, 64)
    blurred = low_pass(film, torch.tensor([0.7, 2.0])[:, None, None])
    for output, image, sigma in zip(blurred, film, (0.7, 2.0), strict=True):
        reference = gaussian_blur(image, [17, 17], [sigma, sigma])
        torch.testing.assert_close(output[:, 9:-9, 9:-9], reference[:, 9:-9, 9:-9], rtol=0, atol=1e-3)
    torch.testing.assert_close(low_pass(torch.ones(1, 1, 8, 8), torch.full((1, 1, 1), 2.0)), torch.ones(1, 1, 8, 8))
    # (1/16 of the side / 0.5) is 8: half of the scale's range is 0.5 · 8^½ pixels
    softest = change_look(film[:1], draws_of(gain=-1.0), torch.zeros(48, 64))
    torch.testing.assert_close(softest, low_pass(film[:1], torch.full((1, 1, 1), 2**0.5)))
    harder = change_look(film[:1], draws_of(gain=1.0), torch.zeros(48, 64))
    torch.testing.assert_close(harder, softest + 1.5 * (film[:1] - softest), rtol=0, atol=1e-5)


def test_noise_is_the_grain_from_another_place() -> None:
    film, grain = torch.randn(1, 1, 24, 32), torch.randn(24, 32)
    torch.testing.assert_close(change_look(film, draws_of(), grain), film, rtol=0, atol=1e-6)  # it keeps its look
    grain = torch.randn(8, 16)
    noisy = change_look(torch.zeros(1, 1, 8, 16), draws_of(noise=1.0, down=-0.5, right=0.5), grain)
    torch.testing.assert_close(noisy[0, 0], 0.35 * torch.roll(grain, (-2, -12), (0, 1)))


def test_a_border_is_flat_and_at_most_so_wide() -> None:
    film = torch.randn(1, 1, 100, 200)
    widths = {"top": 1.0, "bottom": -1.0, "left": 0.0, "edge": -0.2}
    framed = change_look(film, draws_of(no_frame=-0.1, gray=0.5, **widths), torch.zeros(100, 200))
    inside = torch.zeros(100, 200, dtype=torch.bool)
    inside[15:, 15:188] = True  # 15 % of 100, half of that of 200, and 40 % of it
    torch.testing.assert_close(framed[0, 0, inside], film[0, 0, inside], rtol=0, atol=1e-5)
    assert framed[0, 0, ~inside].unique().tolist() == pytest.approx([0.5 * 3**0.5])


def test_equalized_values_are_ranks_whatever_the_gray_scale() -> None:
    levels = np.random.default_rng(0).normal(110, 30, (3, 1, 40, 50)).clip(0, 255).astype(np.uint8)
    levels[:, :, :5] = 0  # ties
    levels[2] = 77  # a flat film
    ranks = np.stack([rankdata(film, method="average").reshape(1, 40, 50) for film in levels])
    output = equalize(torch.from_numpy(levels).float())
    expected = (2 * (ranks - 0.5) / 2000 - 1) * 3**0.5
    torch.testing.assert_close(output.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
    brighter = equalize(torch.from_numpy((levels / 255.0) ** 0.7).float())  # where two steps may become one
    torch.testing.assert_close(brighter, output, rtol=0, atol=0.03)
    torch.testing.assert_close(equalize(normalize(torch.from_numpy(levels), 128.0, 64.0)), output)


def test_robust_is_bounded_and_finite() -> None:
    images = torch.randint(0, 256, (64, 1, 32, 32), dtype=torch.uint8)
    images[0] = 0
    inputs = augment(images, 128.0, 64.0, (1, 2, 3), AUGMENTATIONS["robust"])
    assert inputs.dtype == torch.float32
    assert inputs.shape == images.shape
    assert inputs.abs().max() < 6  # 3.46 of detail at the most, and noise
    assert equalize(inputs).abs().max() <= 3**0.5
