"""Names of networks, losses, augmentations and fusions, for a command line that does not import torch."""

import ast
import contextlib
import csv
import difflib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from pipeline.base.errors import DataError, needs
from pipeline.labels import PROJECTIONS

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "densenet121", "convnext_tiny")
ARCHITECTURES = (*TORCHVISION, "rescnn")
TIMM = "timm/"  # in front of any of timm's names; ?key=value&… after it are arguments of its constructor
FUSIONS = ("max", "mean", "attention")
UNKNOWN_FRONTAL = len(PROJECTIONS)  # a frontal that may be AP or PA: the index after the known ones
LOSSES = ("bce", "aucm")
XRV = "xrv:"  # in front of the names of torchxrayvision's DenseNets
HUB = "hf-hub:"  # in front of OWNER/NAME, or OWNER/NAME/FILE


class Published(NamedTuple):
    """Published weights of a chest encoder: a row of encoders.csv. An empty cell is not known.

    `weights` is where `file` can be downloaded or, if it does not end with that name, the page that offers it.
    """

    name: str
    title: str
    arch: str
    weights: str
    file: str
    size: str
    mean: str  # of gray levels, as `std`
    std: str
    outputs: str  # of its classifier, separated by |
    seen: str  # namespaces of the sets it was trained on, separated by spaces
    license: str
    paper: str

    @property
    def scale(self) -> tuple[float, ...]:
        """Mean and standard deviation of the input's gray levels."""
        return (float(self.mean), float(self.std)) if self.mean else ()

    @property
    def terms(self) -> str:
        """The terms of the weights, with what they were trained on."""
        return f"{self.title} ({self.paper}): {self.license}; trained on {self.seen}, on their terms"


@cache
def published() -> dict[str, Published]:
    """The published encoders by name."""
    with Path(__file__).with_name("encoders.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: Published(**row) for row in csv.DictReader(file)}


class Augmentation(NamedTuple):
    """The augmentations beyond the affine map."""

    crop: float = 0.0  # largest share of the side that a crop leaves out
    robust: bool = False  # vary what depends on the device; the network then equalizes its input, also after training


AUGMENTATIONS = {"none": Augmentation(), "affine": Augmentation(), "crop": Augmentation(0.4)}
AUGMENTATIONS["robust"] = Augmentation(0.4, robust=True)


class Input(NamedTuple):
    """The input that a network was trained on."""

    size: str  # in pixels: as `image_size`
    fixed: bool  # another size takes another network
    mean: float  # of gray levels, as `std`
    std: float


def parse_shape(text: str) -> tuple[int, int]:
    """Height and width in pixels, from text like 320 (a square) or 448x384."""
    sides = text.lower().replace("×", "x").split("x")
    if not 1 <= len(sides) <= 2 or not all(re.fullmatch(r"\d{2,4}", side) and int(side) >= 32 for side in sides):
        raise DataError(f"'{text}' is not like 320 or, as height and width, 448x384; a side has 32 to 9,999 pixels")
    return int(sides[0]), int(sides[-1])


def split_arch(arch: str) -> tuple[str, dict[str, Any]]:
    """Of `timm/NAME?patch_size=16&drop_path_rate=0.1`, the name and the constructor's arguments. Raises DataError."""
    name, _, text = arch.removeprefix(TIMM).partition("?")
    try:
        options: dict[str, Any] = dict(parse_qsl(text, strict_parsing=bool(text)))
    except ValueError:
        raise DataError(f"'{arch}' is not like timm/NAME?drop_path_rate=0.1&global_pool=avg") from None
    for key, value in options.items():
        with contextlib.suppress(ValueError, SyntaxError):  # else a word
            options[key] = ast.literal_eval(value)
    return name, options


def check_arch(arch: str) -> str:
    """The name, if a network has it. Raises DataError, which for timm suggests close names."""
    if arch not in ARCHITECTURES and find_config(arch) is None:
        raise DataError(f"'{arch}' is not one of {', '.join(map(repr, ARCHITECTURES))}, or 'timm/NAME'")
    return arch


def find_config(arch: str) -> "PretrainedCfg | None":
    """The facts of timm about a network: weights and input; None for networks of others. Raises DataError."""
    if not arch.startswith(TIMM):
        return None
    with needs("timm", f"'{arch}'"):
        import timm  # here, because it takes seconds
    name = split_arch(arch)[0]
    with contextlib.suppress(RuntimeError):  # the network has no such weights
        if timm.is_model(name):
            return timm.get_pretrained_cfg(name)
    close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained())
    hint = f"; there are {', '.join(TIMM + known for known in close)}" if close else ""
    raise DataError(f"'{arch}': timm {timm.__version__} has no such network{hint}")


def has_weights(arch: str) -> bool:
    """Whether a network has pretrained weights to download."""
    config = find_config(arch)
    return arch in TORCHVISION if config is None else bool(config.has_weights)


def own_input(arch: str) -> Input | None:
    """The input that a network of timm was made for; None for others, which take any size and the shards' scale."""
    config = find_config(arch)
    if config is None:
        return None
    mean, std = (255 * sum(values) / len(values) for values in (config.mean, config.std))
    size = "x".join(map(str, dict.fromkeys(config.input_size[1:])))
    return Input(size, config.fixed_input_size, round(mean, 4), round(std, 4))
