"""Image files on the disk → the samples that a run scores: files one by one, or the views of studies."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.names import UNKNOWN_FRONTAL
from model.runs.config import Config
from pipeline.base.errors import DataError
from pipeline.console import say
from pipeline.images import Gray, ImageError, ImageOptions, decode_stored, find_position, prepare, resize
from pipeline.labels import POSITIONS, PROJECTIONS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom")


class View(NamedTuple):
    """An image file, ready for a run; black if it is unusable, for the reason `fault`."""

    pixels: Gray  # [H, W]
    projection: int = UNKNOWN_FRONTAL  # index in PROJECTIONS
    content: int = 0  # as `join_content`
    fault: str = ""


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files, and the image files below the folders, sorted; reports others. Raises DataError if there is none."""
    images: list[Path] = []
    for path in paths:
        below = (file for file in path.rglob("*") if file.is_file() or not file.exists())  # a link may lead nowhere
        files = [path] if path.is_file() else sorted(below)
        chosen = [file for file in files if file == path or _is_image(file)]
        others = Counter(file.suffix.lower() or "other" for file in {*files} - {*chosen})
        for suffix, count in sorted(others.items()):
            say(f"{path}: {count:,} {suffix} files skipped: only JPEG, PNG and DICOM can be read")
        images += chosen
    if not images:
        raise DataError(f"{', '.join(map(str, paths))}: no {', '.join(IMAGE_SUFFIXES)} file")
    return images


def _is_image(file: Path) -> bool:
    """Whether the suffix is an image's or, because DICOM files often have none, the content is DICOM, or unreadable."""
    if file.suffix.lower() in IMAGE_SUFFIXES or file.name == "DICOMDIR":
        return file.name != "DICOMDIR"
    try:
        with file.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:  # which `read_view` reports
        return True


def group_files(files: Iterable[Path], by: str | None, most: float) -> dict[str, list[Path]]:
    """The files of each study, by name: their folder, its parent, or a pattern's match in their paths.

    Without `by`, each file is a study. Raises DataError if the pattern does not match, or a study exceeds `most` files.
    """
    if by is None:
        return {str(file): [file] for file in files}
    studies: dict[str, list[Path]] = {}
    for file in files:
        match = re.search(by, str(file))
        name = {"study": str(file.parent), "patient": str(file.parent.parent)}.get(by) or (match and match[0])
        if name is None:
            raise DataError(f"{file}: --group-by '{by}' is not in its path")
        studies.setdefault(name, []).append(file)
    for name, views in studies.items():
        if len(views) > most:
            how = "a study's images must lie in a folder of their own, or name it by --group-by"
            raise DataError(f"{name}: {len(views)} images, of a study there are at most {most}; {how}")
    return studies


def find_projection(file: Path, content: bytes) -> int:
    """The image's index in PROJECTIONS by its DICOM header or CheXpert's file name; else an AP or PA, unknown."""
    if position := find_position(content):
        return PROJECTIONS.index(POSITIONS.get(position, "other").replace("frontal", position))
    is_lateral = re.fullmatch(r"view\d{1,4}_lateral", file.stem)
    return PROJECTIONS.index("lateral") if is_lateral else UNKNOWN_FRONTAL


def read_view(file: Path, config: Config, options: ImageOptions) -> View:
    """A file, prepared as it would be in shards."""
    try:
        content = file.read_bytes()
        stored = prepare(content, options).data
    except (OSError, ImageError) as error:
        fault = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        return View(np.zeros(config.shape, np.uint8), fault=fault)
    pixels = resize(decode_stored(stored, options.encoding), *config.shape)
    projection = UNKNOWN_FRONTAL if config.fusion is None else find_projection(file, content)
    return View(pixels, projection, zlib.crc32(stored) << 32 | len(stored))
