"""Heat maps and readers' annotations → how often a map points at them, compared with chance.

Pointing game (Zhang et al., ECCV 2016): a cell is hit if the maximum of its map lies in any of its boxes. IoU: of the
map's values of at least `THRESHOLD` with the boxes. The boxes' share of the image's area is the chance that a random
point hits, and also the IoU of marking everything.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from pipeline.base.csvs import demand, read_strings
from pipeline.base.errors import DataError, quote
from pipeline.base.files import read_object
from pipeline.labels import LABELS
from pipeline.measure.metrics import FEW, NO_LIMITS, Bools, Floats, Names, mean_limits, wilson_limits

THRESHOLD = 0.5
OTHER_NAMES = {"Airspace Opacity": "Lung Opacity"}  # CheXlocalize's
# Readers' marks by key and label: boxes (left, top, width, height), or a mask [H, W] of the original image.
Mark = list[tuple[float, ...]] | Bools
Marks = Mapping[str, Mapping[str, Mark]]


class Cell(NamedTuple):
    """A label that readers marked on an image: its map [H, W] in [0, 1], and what they marked [H, W]."""

    label: str
    patient: str
    heat: npt.NDArray[np.float32]
    marked: Bools


def read_marks(path: Path) -> Marks:
    """Readers' marks, from boxes.csv or CheXlocalize's gt_segmentations JSON. Raises DataError with the location."""
    marks: dict[str, dict[str, Any]] = {}
    if path.suffix.lower() == ".json":
        for key, rles in read_object(path).items():
            try:
                masks = {_check_label(path, name): decode_rle(rle["size"], rle["counts"]) for name, rle in rles.items()}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}, {quote(key, 80)}: damaged: {quote(str(error), 80)}") from None
            marks[key] = {label: mask for label, mask in masks.items() if mask.any()}
        return marks
    if not path.name.lower().endswith((".csv", ".csv.gz")):
        raise DataError(f"{path}: boxes are read from .csv, segmentations from .json; a pickle would run code")
    names = ("key", "label", "x", "y", "w", "h")
    table = read_strings(path, names)
    for name in names[2:]:
        number = pc.match_substring_regex(table[name], r"^-?\d+(\.\d+)?$")
        demand(path, name, table[name], number, "is not a number")
    for key, label, *box in zip(*(column.to_pylist() for column in table.columns), strict=True):
        marks.setdefault(str(key), {}).setdefault(_check_label(path, label), []).append(tuple(map(float, box)))
    return marks


def _check_label(path: Path, name: object) -> str:
    label = OTHER_NAMES.get(str(name), str(name))
    if label not in LABELS:
        raise DataError(f"{path}: '{quote(label, 80)}' is none of {', '.join(LABELS)}")
    return label


def mark_image(mark: Mark, row: Mapping[str, Any], square: str, shape: tuple[int, int]) -> Bools:
    """Which pixels [H, W] of a network's input have their center in readers' marks on the image of a label table's row.

    `square` is how the image was stored (`ImageOptions`): a padded one shows more than the original, whose pixels the
    marks are in. Raises DataError for boxes on an image of unknown size.
    """
    # A mask has the original image's size; the shards may hold a smaller copy.
    height, width = mark.shape if isinstance(mark, np.ndarray) else (row.get("height"), row.get("width"))
    if width is None or height is None:
        how = "write them again with `pipeline shards`"
        raise DataError(f"{row['key']}: these shards do not record the image's original size; {how}")
    side = {"pad": max(width, height), "crop": min(width, height)}.get(square)
    sides = zip((height, width), (side or height, side or width), shape, strict=True)
    y, x = ((full - shown) / 2 + shown * ((np.arange(count) + 0.5) / count) for full, shown, count in sides)
    marked = np.zeros(shape, bool)
    if isinstance(mark, np.ndarray):
        rows, columns = (y >= 0) & (y < height), (x >= 0) & (x < width)
        marked[np.ix_(rows, columns)] = mark[np.ix_(y[rows].astype(int), x[columns].astype(int))]
        return marked
    for left, top, across, down in mark:
        marked |= ((y >= top) & (y < top + down))[:, None] & (x >= left) & (x < left + across)
    return marked


def decode_rle(size: Sequence[int], counts: str | Sequence[int]) -> Bools:
    """The mask [H, W] of COCO's run lengths: of 0s and 1s in turn, column by column, as numbers or as COCO's text.

    In the text, a number is in groups of five bits, the lowest first, each with a sixth bit set if more follow; from
    the fourth on, it is the difference to the last but one. Raises ValueError if the runs do not fill the mask.
    """
    runs: list[int] = []
    if isinstance(counts, str):
        value = shift = 0
        for byte in counts.encode("latin-1", "replace"):
            if not 48 <= byte < 112:
                raise ValueError("not COCO's run lengths")
            value |= (byte - 48 & 31) << shift
            shift += 5
            if not byte - 48 & 32:
                value -= (byte - 48 & 16) << shift - 4 if byte - 48 & 16 else 0
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
    else:
        runs = [int(run) for run in counts]
    height, width = size
    if min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise ValueError(f"run lengths that do not fill {height}×{width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def measure_localization(cells: Sequence[Cell]) -> dict[str, Any]:
    """By label, and for all cells: hit rate and IoU with intervals that take patients as clusters, chance and its p.

    With `few` patients IoU has no interval: it would be too narrow. `fixed` is the hit rate of a map that does not
    depend on the image: the mean of the label's maps of other patients.
    """
    hit = np.array([cell.heat.max() > 0 and cell.marked.flat[cell.heat.argmax()] for cell in cells], bool)
    sums: dict[tuple[str, ...], Any] = {}  # of the maps of a label, and of a label and patient
    for cell in cells:
        for group in ((cell.label,), (cell.label, cell.patient)):
            sums[group] = sums.get(group, 0) + cell.heat.astype(float)
    # One map at a time: all of them in float64 would take twice the memory of the cells.
    others = ((sums[cell.label,] - sums[cell.label, cell.patient], cell.marked) for cell in cells)
    fixed = np.array([heat.max() > 1e-6 and marked.flat[heat.argmax()] for heat, marked in others], bool)
    called = ((cell.heat >= THRESHOLD, cell.marked) for cell in cells)
    iou = np.array([(heat & marked).sum() / max((heat | marked).sum(), 1) for heat, marked in called])
    share = np.array([cell.marked.mean() for cell in cells])
    label, patient = (np.array([getattr(cell, name) for cell in cells]) for name in ("label", "patient"))
    labels = {}
    for name in (*dict.fromkeys(label.tolist()), "all"):
        rows = (label == name) | (name == "all")
        patients = len(np.unique(patient[rows]))
        mean = mean_limits(iou[rows], patient[rows])
        limits = NO_LIMITS if patients < FEW else {"low": max(mean["low"], 0), "high": min(mean["high"], 1)}
        labels[name] = {
            "cells": int(rows.sum()),
            "patients": patients,
            "few": patients < FEW,
            "hits": int(hit[rows].sum()),
            "hit_rate": float(hit[rows].mean()),
            "hit_limits": wilson_limits(hit[rows], patient[rows]),
            "chance": float(share[rows].mean()),
            "p": exceedance(share[rows], patient[rows], int(hit[rows].sum())),
            "fixed": float(fixed[rows].mean()),
            "iou": mean["value"],
            "iou_limits": limits,
        }
    return {"threshold": THRESHOLD, "labels": labels}


def exceedance(chances: Floats, owner: Names, hits: int) -> float:
    """The probability of at least `hits` hits in cells with these chances [n], if only owners [n] are independent.

    An owner's cells are maximally correlated: one uniform draw decides them all. With one cell per owner, this is the
    Poisson binomial distribution.
    """
    distribution = np.ones(1)
    for name in np.unique(owner):
        at_least = np.sort(chances[owner == name])[::-1]  # the chance of 1, 2, … hits
        distribution = np.convolve(distribution, -np.diff([1.0, *at_least, 0.0]))
    return float(min(1.0, distribution[hits:].sum()))
