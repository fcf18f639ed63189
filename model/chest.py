"""torchxrayvision's chest X-ray weights → initial weights of our densenet121.

Its networks take films scaled to ±1024 and have 18 outputs, of which those that are labels of ours begin from its
classifier's rows. Its published files are pickles of whole networks: they are read as weights alone, with torch's
layers and stand-ins for its classes allowed, so no code of a file runs. The package itself cannot be imported here:
it has a module `model` too.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint import CheckpointError, cannot_download, hub_path, load_checkpoint, refuse_bombs
from model.names import XRV
from pipeline.base.errors import DataError

SIZE = 224
SCALE = (127.5, 255 / 2048)  # (x / 255 · 2 - 1) · 1024
TERMS = (
    "torchxrayvision's weights: Apache-2.0; trained on NIH, PadChest, CheXpert, MIMIC-CXR, Google, OpenI and RSNA "
    "or one of these, whose own terms hold"
)
OUTPUTS = (
    *("Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema", "Fibrosis"),
    *("Pleural Effusion", "Pneumonia", "Pleural Other", "Cardiomegaly", "Nodule", "Mass", "Hernia"),
    *("Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"),
)  # in its order; its Effusion and Pleural_Thickening by our names
_URL = (
    "https://github.com/mlmed/torchxrayvision/releases/download/v1/"
    "{}-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
)
_SETS = {  # what a name ends in, and what its file's begins with
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
    """Stands for the package's own classes, whose parameters alone are wanted."""


def download_chest(name: str) -> Path:
    """The file of torchxrayvision's weights of that name, in torch's cache; downloaded where it is not there.

    Raises DataError for a name that is not one of its DenseNets', CheckpointError where it cannot be downloaded.
    """
    if name not in [_PREFIX + of for of in _SETS]:
        raise DataError(f"`init` {XRV}{name}: there are {', '.join(_PREFIX + of for of in _SETS)}")
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
    """What a file of weights holds, also one of torchxrayvision's. Raises CheckpointError."""
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        if "torchxrayvision" not in str(error.__cause__):
            raise
    content = path.read_bytes()
    theirs = ("DenseNet", "_DenseLayer", "_DenseBlock", "_Transition")
    allowed: list[Any] = [*_LAYERS, *((_Pickled, f"torchxrayvision.models.{name}") for name in theirs)]
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


def is_chest(weights: dict[str, Any]) -> bool:
    """Whether it is the state dict of a DenseNet of torchxrayvision: over gray, with its outputs."""
    stem, head = (weights.get(name) for name in ("features.conv0.weight", "classifier.weight"))
    if not (isinstance(stem, Tensor) and isinstance(head, Tensor)):
        return False
    return stem.shape[1:2] == (1,) and head.shape[:1] == (len(OUTPUTS),)


def name_outputs(weights: dict[str, Any], file: str) -> list[str]:
    """What the outputs of its classifier are, "" for those that were not trained and so are of no use.

    Those are the ones whose threshold is NaN, or known by the published `file`'s name. The thresholds themselves
    (`op_threshs`) are not used: a run chooses its own.
    """
    thresholds = weights.get("op_threshs", torch.zeros(len(OUTPUTS))).tolist()
    untrained = _UNTRAINED.get(file.partition("-densenet121-")[0], set())
    return [
        "" if value != value or name in untrained else name for name, value in zip(OUTPUTS, thresholds, strict=True)
    ]
