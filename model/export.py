"""Network → a file that other programs run: gray levels in, scores out, with the normalisation inside.

    .onnx  ONNX (onnxruntime, OpenCV, TensorRT)
    .pt2   torch.export (PyTorch without this package)

Either takes uint8 images [B, 1, S, S] of any B and gives float32 scores [B, L], those of `predict_scores`.
"""

import io
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from model.augment import normalize
from model.losses import label_scores
from pipeline.manifest import write_atomically

TOLERANCE = 1e-4  # between the exported scores and eager ones


class Scorer(nn.Module):
    """A network with what surrounds it: normalisation by mean and std (gray levels), and the sigmoid.

    `columns` [L] are those of its logits that become scores.
    """

    def __init__(self, network: nn.Module, columns: list[int], mean: float, std: float) -> None:
        super().__init__()
        self.network = network
        self.columns = columns
        self.mean = mean
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        """Scores float32 [B, L] of images uint8 [B, 1, S, S]."""
        logits = self.network(normalize(images, self.mean, self.std))
        return label_scores(logits[:, self.columns])


def export_scorer(scorer: Scorer, image_size: int, path: Path) -> float:
    """Write the file; returns the largest difference of its scores from eager ones, on random images.

    Raises ValueError for a suffix other than .onnx and .pt2, for missing packages, and where the scores differ;
    DataError where the file cannot be written.
    """
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path}: export writes .onnx or .pt2")
    scorer = scorer.cpu().eval().to(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 1, image_size, image_size), dtype=torch.uint8, generator=generator)
    dynamic = ({0: torch.export.Dim("batch")},)
    # In inference mode, so that dropout and normalisation layers are those of evaluation.
    with torch.no_grad():
        expected = scorer(images)
        program = torch.export.export(scorer, (images[:2],), dynamic_shapes=dynamic)
        content, scores = (_as_pt2 if path.suffix == ".pt2" else _as_onnx)(program, images)
    difference = float((scores - expected).abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"{path}: exported scores differ from eager ones by {difference}")
    write_atomically(path, content)
    return difference


def _as_pt2(program: torch.export.ExportedProgram, images: Tensor) -> tuple[bytes, Tensor]:
    """The program as a file's content, and what that makes of the images."""
    file = io.BytesIO()
    torch.export.save(program, file)
    scores: Tensor = torch.export.load(file).module()(images)
    return file.getvalue(), scores


def _as_onnx(program: torch.export.ExportedProgram, images: Tensor) -> tuple[bytes, Tensor]:
    """The program as an ONNX file's content, and what onnxruntime makes of the images."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install '.[onnx]'") from None
    found = torch.onnx.export(program, (), input_names=["images"], output_names=["scores"], verbose=False)
    content = cast(torch.onnx.ONNXProgram, found).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    scores = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    return content, torch.from_numpy(np.asarray(scores))
