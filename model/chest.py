"""torchxrayvision's chest X-ray weights → initial weights of our densenet121.

Its networks take images scaled to ±1024 and have 18 outputs; outputs that match our labels start from its classifier's
rows. Its published files are pickles of entire networks. We read only the weights, allowing torch's layers and
placeholders for its classes, so no code in a file runs. The package cannot be imported here, because it also has a
module `model`.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint import CheckpointError, cannot_download, hub_path, load_checkpoint, refuse_bombs
from model.names import XRV
from pipeline.base.errors import DataError

SIZE = "224"
SCALE = (127.5, 255 / 2048)  # (x / 255 · 2 - 1) · 1024
TERMS = (
    "torchxrayvision's weights: Apache-2.0; trained on NIH, PadChest, CheXpert, MIMIC-CXR, Google, OpenI and RSNA "
    "or one of these, whose own terms hold"
)
OUTPUTS = (
    *("Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema", "Fibrosis"),
    *("Pleural Effusion", "Pneumonia", "Pleural Other", "Cardiomegaly", "Nodule", "Mass", "Hernia"),
    *("Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"),
)  # in its order; Effusion and Pleural_Thickening have our names
_URL = (
    "https://github.com/mlmed/torchxrayvision/releases/download/v1/"
    "{}-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
)
_SETS = {  # suffix of the name → prefix of its file's name
    "all": "nih-pc-chex-mimic_ch-google-openi-kaggle",
    **{name: name for name in ("nih", "pc", "chex", "mimic_nb", "mimic_ch")},
    "rsna": "kaggle",
}
_PREFIX = "densenet121-res224-"
_UNTRAINED = {  # of our labels
    "nih": {"Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"},
    "pc": {"Lung Lesion", "Lung Opacity", "Enlarged Cardiomediastinum"},
    **{name: {"Pleural Other"} for name in ("chex", "mimic_nb", "mimic_ch")},
    "kaggle": set(OUTPUTS) - {"Pneumonia", "Lung Opacity"},
}
_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Linear, nn.Sequential)


class _Pickled(nn.Module):
    """Placeholder for the package's classes, of which only the parameters are used."""


def download_chest(name: str) -> Path:
    """The file of torchxrayvision's weights of that name, in torch's cache; downloaded if missing.

    Raises DataError if no DenseNet has this name, and CheckpointError if the download fails.
    """
    if name not in [_PREFIX + suffix for suffix in _SETS]:
        raise DataError(f"`init` {XRV}{name}: there are {', '.join(_PREFIX + suffix for suffix in _SETS)}")
    url = _URL.format(_SETS[name.removeprefix(_PREFIX)])
    place = hub_path(url)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(place), progress=False)
        except Exception as error:
            raise CheckpointError(cannot_download(f"{XRV}{name}", url, error, place)) from error
    return place


def read_initial(path: Path) -> dict[str, Any]:
    """The contents of a weights file, including torchxrayvision's. Raises CheckpointError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of the options that trained it: plain values
            return load_checkpoint(path)
    except CheckpointError as error:
        if "torchxrayvision" not in str(error.__cause__):
            raise
    content = path.read_bytes()
    classes = ("DenseNet", "_DenseLayer", "_DenseBlock", "_Transition")
    allowed: list[Any] = [*_LAYERS, *((_Pickled, f"torchxrayvision.models.{name}") for name in classes)]
    try:
        refuse_bombs(content)
        with torch.serialization.safe_globals(allowed):
            network = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        for module in network.modules():
            vars(module).setdefault("_non_persistent_buffers_set", set())  # which old files lack
        return dict(network.state_dict())
    except Exception as error:
        raise CheckpointError(
            f"{path}: a whole network of torchxrayvision that holds more than weights; "
            "convert it on a machine that you trust: torch.save(model.state_dict(), FILE)"
        ) from error


def is_chest(weights: dict[str, object]) -> bool:
    """Whether this is the state dict of a torchxrayvision DenseNet: gray input, and its number of outputs."""
    stem, head = (weights.get(name) for name in ("features.conv0.weight", "classifier.weight"))
    if not (isinstance(stem, Tensor) and isinstance(head, Tensor)):
        return False
    return stem.shape[1:2] == (1,) and head.shape[:1] == (len(OUTPUTS),)


def name_outputs(weights: dict[str, Any], file: str) -> list[str]:
    """The names of the classifier's outputs, "" for untrained ones.

    An output is untrained if its threshold is NaN, or if the published `file`'s name says so. The thresholds themselves
    (`op_threshs`) are not used: a run chooses its own.
    """
    thresholds = weights.get("op_threshs", torch.zeros(len(OUTPUTS))).tolist()
    untrained = _UNTRAINED.get(file.partition("-densenet121-")[0], set())
    return [
        "" if value != value or name in untrained else name for name, value in zip(OUTPUTS, thresholds, strict=True)
    ]
