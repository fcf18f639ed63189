"""A trained run → scores of a split, or of image files."""

import contextlib
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor, nn

from model.fusion import UNKNOWN_FRONTAL
from model.predict import InterruptedEvaluationError, predict_scores
from model.runs.config import Config, learned_columns
from model.runs.folder import load_best
from model.runs.job import Job, Selected, agree, choose_device, network_inputs, open_rows, read_batches
from model.runs.overlap import check_seen, count_known
from pipeline.console import Advance, progress_bar, say
from pipeline.images import Gray, ImageError, ImageOptions, decode_stored, find_position, prepare, resize
from pipeline.labels import POSITIONS, PROJECTIONS
from pipeline.measure.calibration import apply_calibrations
from pipeline.measure.evaluate import Scored
from pipeline.measure.metrics import Floats
from pipeline.stream.batches import choose_usable
from pipeline.stream.plan import plan_evaluation

EVALUATION_BATCH = 64  # images
Scores = Floats
Alteration = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]  # of images [N, 1, H, W]


class Result(NamedTuple):
    """Scores of a split, the rows of its table, and what it shares with what the weights have learned from.

    `members` are the calibrated scores [N, L] of those of an ensemble, by their folder.
    """

    images: Scored
    table: pa.Table
    shared: Mapping[str, int] = MappingProxyType({})
    members: Mapping[str, Floats] = MappingProxyType({})


def score_best(job: Job, name: str, alter: Alteration | None = None, most: float = math.inf) -> Result:
    """What best.pt makes of a split, or the mean of an ensemble's calibrated scores; `alter` changes the images first.

    Of a split with more samples than `most`, every second, third, … is scored.

    Raises DataError for images that the weights have learned from (`check_seen`), before any is scored.
    """
    if not job.members:
        network, best = load_best(job.run, job.config, job.device, job.ranks)
        shared = check_seen(job, name, best["seen"])
        chosen = open_rows(job, name)
        if len(chosen.rows) > most:
            chosen = replace(chosen, samples=chosen.samples.thin(math.ceil(len(chosen.rows) / most)))
        return Result(*score_split(job, network, chosen, best["pixels"], alter), shared)
    conditions = {field: getattr(job.config, field) for field in ("where", "views", "limit", "max_bad")}
    found, shared = {}, dict[str, int]()
    for member, calibration in job.members:
        config = replace(member.config, **conditions)
        one = score_best(replace(member, config=config, shared_images=job.shared_images), name, alter, most)
        found[str(member.run)] = apply_calibrations(job.config.labels, one.images.scores, calibration)
        shared |= {key: max(count, shared.get(key, 0)) for key, count in one.shared.items()}
    mean = np.mean(list(found.values()), axis=0)
    return Result(one.images._replace(scores=mean), one.table, shared, found)


def score_split(
    job: Job,
    network: nn.Module,
    chosen: Selected,
    pixels: Mapping[str, float],
    alter: Alteration | None = None,
) -> tuple[Scored, pa.Table]:
    """A network's scores of the chosen rows, with targets and masks that leave the uncertain cells out.

    And those rows of the table. Images that are unusable, as far as --max-bad allows it, are in neither.
    A run by studies scores these, and the rows are those of their first images.
    Each rank scores its share of the rows, and all get the scores of all. `alter` changes the images of each batch.
    """
    config, split, rows = job.config, chosen.split, chosen.rows
    columns = learned_columns(config)
    plan = partial(
        plan_evaluation, chosen.samples, EVALUATION_BATCH, rank=job.ranks.rank, ranks=job.ranks.count
    )
    batches = read_batches(job, chosen, chosen.truth, plan)
    bad, ours = np.zeros(len(rows)), np.zeros(len(rows), bool)

    def samples(advance: Advance) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            start = batch.step.step * EVALUATION_BATCH
            bad[[start + position for position in batch.bad]] = 1
            ours[start : start + len(batch.target)] = True
            images = batch.images if alter is None else alter(batch.images)
            yield network_inputs(config, job.device, images, batch.present, batch.projection)
            advance(min(int(ours.sum()) * job.ranks.count, len(rows)), len(rows))

    with (
        progress_bar(f"Scoring {split.name}", config.units) as advance,
        contextlib.suppress(InterruptedEvaluationError),
    ):
        found = predict_scores(
            network, columns, samples(advance), pixels["mean"], pixels["std"], job.precision, job.stop
        )
    if agree(job)[0]:
        raise InterruptedEvaluationError
    scores = np.zeros((len(rows), len(columns)))
    scores[ours] = found
    scores = job.ranks.sum(scores)
    chosen.bad.update(job.ranks.unite(chosen.bad.rows))
    usable = job.ranks.sum(bad) == 0
    rows = rows[usable]
    facts = split.table.take(rows)
    scored = Scored(
        scores[usable],
        chosen.truth.target[rows][:, columns],
        chosen.truth.mask[rows][:, columns],
        facts["patient"].to_numpy(),
        facts["study"].to_numpy(),
        facts["sex"].to_numpy(),
        pc.fill_null(facts["age"], -1).to_numpy(),
        pc.fill_null(facts["projection"], "").to_numpy(),
    )
    return scored, facts


def find_projection(file: Path, content: bytes) -> int:
    """The place of an image's projection in PROJECTIONS, or UNKNOWN_FRONTAL, as `score_files` describes."""
    name = "lateral" if re.fullmatch(r"view\d{1,4}_lateral", file.stem) else ""
    if position := find_position(content):
        name = POSITIONS.get(position, "other").replace("frontal", position)
    return PROJECTIONS.index(name) if name else UNKNOWN_FRONTAL


def read_view(file: Path, config: Config, options: ImageOptions) -> tuple[Gray, int, int] | str:
    """A file as a run takes it: pixels, projection, and its content as in `join_content`; or why it is unusable."""
    try:
        content = file.read_bytes()
        stored = prepare(content, options).data
        pixels = resize(decode_stored(stored, options.encoding), config.image_size, config.image_size)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ImageError as error:
        return str(error)
    projection = UNKNOWN_FRONTAL if config.fusion is None else find_projection(file, content)
    return pixels, projection, zlib.crc32(stored) << 32 | len(stored)


def score_files(
    run: Path, config: Config, samples: Sequence[Sequence[Path]], workers: int
) -> tuple[Scores, list[tuple[Path, str]]]:
    """Scores [N, L] by best.pt of samples: image files one by one or, for a run by studies, a study's together.

    NaN where none of a sample's files can be read; and which files cannot, and why. An image takes the way it
    would take through shards: the same resize, encoding and decoding. A view is what its DICOM says, or a lateral by
    CheXpert's name of one; else a frontal that may be AP or PA.
    """
    device, precision = choose_device(config.amp)
    network, best = load_best(run, config, device)
    read = partial(read_view, config=config, options=ImageOptions(**best["images"]))
    bad: list[tuple[Path, str]] = []
    contents: list[int] = []
    usable = np.ones(len(samples), bool)

    def batches(advance: Advance) -> Iterator[tuple[Tensor, ...]]:
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(samples), EVALUATION_BATCH):
                some = samples[start : start + EVALUATION_BATCH]
                files = [file for of_sample in some for file in of_sample]
                sample = np.repeat(np.arange(len(some)), [len(of_sample) for of_sample in some])
                place = np.concatenate([np.arange(len(of_sample)) for of_sample in some])
                images = np.zeros((len(files), 1, config.image_size, config.image_size), np.uint8)
                projection = np.full(len(files), UNKNOWN_FRONTAL, np.int8)
                readable = np.ones(len(files), np.bool_)
                for position, (file, view) in enumerate(zip(files, pool.map(read, files), strict=True)):
                    if isinstance(view, str):
                        bad.append((file, view))
                        readable[position] = False
                    else:
                        images[position, 0], projection[position], content = view
                        contents.append(content)
                kept, without = choose_usable(sample, place, readable)
                usable[[start + position for position in without]] = False
                present = np.zeros((len(some), place.max() + 1), np.bool_)
                present[sample[kept], place[kept]] = True
                yield network_inputs(config, device, images[kept], present, projection[kept])
                advance(start + len(some), len(samples))

    pixels = best["pixels"]
    with progress_bar("Scoring", config.units) as advance:
        scores = predict_scores(
            network, learned_columns(config), batches(advance), pixels["mean"], pixels["std"], precision
        )
    scores[~usable] = np.nan
    if known := count_known(contents, best["seen"]):
        of = f"{known:,} of these {len(contents):,} images"
        say(f"{run} has learned from {of}: its scores of them are too good")
    return scores, bad
