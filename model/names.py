"""Names of networks, losses, augmentations and fusions, for a command line that does not import torch."""

import difflib
from typing import TYPE_CHECKING, NamedTuple

from pipeline.base.errors import DataError, needs
from pipeline.labels import PROJECTIONS

if TYPE_CHECKING:
    from types import ModuleType

TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "densenet121", "convnext_tiny")
ARCHITECTURES = (*TORCHVISION, "rescnn")
TIMM = "timm/"  # in front of any of timm's names
FUSIONS = ("max", "mean", "attention")
UNKNOWN_FRONTAL = len(PROJECTIONS)  # a frontal that may be AP or PA: the index after the known ones
LOSSES = ("bce", "aucm")
XRV = "xrv:"  # in front of any name of torchxrayvision's DenseNets, in place of a file


class Augmentation(NamedTuple):
    """The augmentations beyond the affine map."""

    crop: float = 0.0  # largest share of the side that a crop leaves out
    # Vary the appearance that depends on the device. The network then equalizes its input, also after training.
    robust: bool = False


AUGMENTATIONS = {
    "none": Augmentation(),
    "affine": Augmentation(),
    "crop": Augmentation(crop=0.4),
    "robust": Augmentation(crop=0.4, robust=True),
}


class Input(NamedTuple):
    """The input that a network was trained on."""

    size: int  # side of the square, in pixels
    fixed: bool  # it takes no other size
    mean: float  # of gray levels
    std: float


def check_arch(arch: str) -> str:
    """The name, if a network has it. Raises DataError, which for timm suggests close names."""
    if arch in ARCHITECTURES:
        return arch
    if not arch.startswith(TIMM):
        raise DataError(f"'{arch}' is not one of {', '.join(map(repr, ARCHITECTURES))}, or 'timm/NAME'")
    timm, name = import_timm(arch), arch.removeprefix(TIMM)
    try:
        if timm.is_model(name):
            timm.get_pretrained_cfg(name)
            return arch
    except RuntimeError:  # the network has no such weights
        pass
    close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained())
    hint = f"; there are {', '.join(TIMM + known for known in close)}" if close else ""
    raise DataError(f"'{arch}': timm {timm.__version__} has no such network{hint}")


def own_input(arch: str) -> Input | None:
    """The input that a network of timm was trained on; None for others, which take any size and the shards' scale."""
    if not arch.startswith(TIMM):
        return None
    timm = import_timm(check_arch(arch))
    config = timm.get_pretrained_cfg(arch.removeprefix(TIMM))
    _, height, width = config.input_size
    if height != width:
        raise DataError(f"'{arch}' takes images of {height}×{width}, and these are square: choose another `arch`")
    mean, std = (255 * sum(values) / len(values) for values in (config.mean, config.std))
    return Input(height, config.fixed_input_size, round(mean, 4), round(std, 4))


def import_timm(arch: str) -> "ModuleType":
    """Import timm. Raises DataError if it is missing."""
    with needs("timm", f"'{arch}'"):
        import timm  # here, because it takes seconds
    return timm
