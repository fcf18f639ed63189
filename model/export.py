"""Network → a file for other programs: gray levels in, scores out, normalization included.

    .onnx  ONNX (onnxruntime, OpenCV, TensorRT); score.py beside it scores image files
    .pt2   torch.export (PyTorch without this package)

Both take uint8 images [B, 1, H, W] for any B and give float32 scores [B, L] as `predict` does: those of one network, or
the calibrated mean of several networks' calibrated scores; with thresholds, also decisions, bool [B, L].
"""

import io
import json
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.augment import normalize
from model.losses import label_scores
from pipeline.base.errors import DataError, needs
from pipeline.base.files import write_atomically

SCRIPT = Path(__file__).parent / "templates" / "score.py"
TOLERANCE = 0.01  # between logits of the exported network and eager ones
STEEPEST = 8.0  # larger logits are not compared: a float32 score that near 0 or 1 has lost its logit
SMALLEST = 2.0**-24  # scores nearer to 0 or 1 are calibrated as if they were this near
Fits = Sequence[tuple[float, float] | None]  # slope and bias of each label's logit


class Reading(NamedTuple):
    """A network, and how its images become scores."""

    network: nn.Module
    columns: list[int]  # [L], of the logits that become scores
    mean: float  # of gray levels, as the standard deviation
    std: float
    fits: Fits = ()  # calibrate these scores


class Scorer(nn.Module):
    """Scores of a network, or the mean over several, calibrated by `fits`; decisions by `limits` [L]."""

    def __init__(self, members: Sequence[Reading], fits: Fits = (), limits: Sequence[float] = ()) -> None:
        super().__init__()
        self.networks = nn.ModuleList(member.network for member in members)
        self.members = list(members)
        self.fits, self.limits = fits, limits

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """float32 scores [B, L] of uint8 images [B, 1, H, W]; with limits also decisions, bool [B, L], False at nan."""
        parts = []
        for network, columns, mean, std, fits in self.members:
            logits = network(normalize(images, mean, std))
            parts.append(fit_scores(label_scores(logits[:, columns]), fits))
        raw = torch.stack(parts).mean(dim=0)
        scores = fit_scores(raw, self.fits)
        return (scores, raw >= torch.tensor(self.limits)) if self.limits else (scores,)


def fit_scores(scores: Tensor, fits: Fits) -> Tensor:
    """Scores [B, L], calibrated by the slope and bias of each label's logit; unchanged for None, or without fits."""
    if not fits:
        return scores
    slope, bias = (torch.tensor([fit[part] if fit else nan for fit in fits]) for part in (0, 1))
    return torch.where(slope.isnan(), scores, torch.sigmoid(torch.logit(scores, SMALLEST) * slope + bias))


def export_scorer(scorer: Scorer, shape: tuple[int, int], path: Path, facts: Mapping[str, str]) -> float:
    """Write the file; returns the largest difference between its logits and eager ones, on X-ray-like images.

    `facts` are stored in the file: as metadata_props of ONNX, or as facts.json among the extra files of torch.export.
    Raises DataError for a suffix other than .onnx and .pt2, for missing packages, if the logits differ or none can be
    compared, if another score.py is in the folder, and if a file cannot be written.
    """
    if path.suffix not in (".onnx", ".pt2"):
        raise DataError(f"{path}: export writes .onnx or .pt2")
    script, content = path.with_name(SCRIPT.name), SCRIPT.read_bytes()
    if path.suffix == ".onnx" and script.exists() and not script.read_bytes().startswith(content[:30]):
        raise DataError(f"{script}: another program; export writes a script of this name: choose another folder")
    scorer = scorer.cpu().eval().to(memory_format=torch.contiguous_format)
    images = draw_probes(*shape)
    dynamic = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        expected = scorer(images)[0]
        program = torch.export.export(scorer, (images[:2],), dynamic_shapes=dynamic)
        if path.suffix == ".pt2":
            file = io.BytesIO()
            torch.export.save(program, file, extra_files={"facts.json": json.dumps(dict(facts))})
            exported, scores = file.getvalue(), torch.export.load(file).module()(images)[0]
        else:
            with needs("onnx"):
                import onnxruntime
                import onnxscript  # noqa: F401 - torch.onnx needs it
            names = ["scores", "decisions"][: len(program.graph_signature.user_outputs)]
            made = torch.onnx.export(program, (), input_names=["images"], output_names=names, verbose=False)
            model = cast(torch.onnx.ONNXProgram, made).model_proto
            for key, value in facts.items():
                model.metadata_props.add(key=key, value=value)
            exported = model.SerializeToString()
            session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
            outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            scores = torch.from_numpy(np.asarray(outputs[0]))
    difference = compare_scores(scores, expected, path)
    write_atomically(path, exported)
    if path.suffix == ".onnx":
        write_atomically(script, content)
    return difference


def draw_probes(height: int, width: int) -> Tensor:
    """uint8 images [12, 1, height, width] over the whole gray range: flat, gradients, and shades as in X-rays."""
    down, right = (torch.linspace(0, 255, side) for side in (height, width))
    probes = [torch.full((height, width), level) for level in (0.0, 64.0, 128.0, 255.0)]
    probes += [ramp.expand(height, width) for ramp in (right, down[:, None], right.flip(0))]
    generator = torch.Generator().manual_seed(0)  # smooth, because noise saturates a network trained on X-rays
    for cells in (3, 5, 8, 12, 20):
        coarse = torch.rand((1, 1, cells, cells), generator=generator) * 255
        probes.append(functional.interpolate(coarse, (height, width), mode="bilinear")[0, 0])
    return torch.stack(probes).round().to(torch.uint8)[:, None]


def compare_scores(scores: Tensor, expected: Tensor, path: Path) -> float:
    """The largest difference in logits between scores [B, L] and expected scores, over those that are not saturated.

    Raises DataError, with the path, if it is above TOLERANCE, or if all are saturated.
    """
    exported, eager = (torch.logit(values.double()) for values in (scores, expected))
    used = eager.abs() <= STEEPEST
    if not used.any():
        raise DataError(f"{path}: all scores of the images tried are 0 or 1, so the export cannot be checked")
    difference = float((exported - eager)[used].abs().max())
    if not difference <= TOLERANCE:
        raise DataError(f"{path}: exported logits differ from eager ones by {difference:.3g}, more than {TOLERANCE}")
    return difference
