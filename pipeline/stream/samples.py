"""Table → studies, and the stream that visits these instead of single images.

A study is one examination; CheXpert labels studies, and all images of one carry its labels. The stages of
`pipeline.stream.batches` read single images; here two more go with them:

    plan           steps: which studies make each batch (pipeline.stream.plan, with studies per shard)
    gather         studies → the rows of their images [B, V], V the most images that a study has
    fetch, decode  as for images, to uint8 [B, V, 1, size, size]
    label_studies  + which images are there, their projections, and the studies' targets and masks

So whatever holds of the order, of ranks and of a resume holds of studies too. In shards made with --views all a
study's images lie together. Where they do not they are read from wherever they are: to the same effect, but a
batch then needs many shards at once, and shards at a URL a cache that holds all of them.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.labels import LABELS, MOST_VIEWS, PROJECTIONS, label_states, number_studies
from pipeline.stream.batches import Decoded, Labels, OpenSplit, stages
from pipeline.stream.loader import compose
from pipeline.stream.plan import Rows, Step


class Studies(NamedTuple):
    """The studies of a split's selected images, numbered in the order of their first images.

    `rows` [S, V] are the table's rows of their images, in table order, -1 where a study has fewer than V;
    `projection` int8 [N] is the place of each table row's projection in PROJECTIONS; `shard_sizes` how many
    studies begin in each shard where any does; `left_out` the number of images beyond MOST_VIEWS of a study.
    """

    rows: Rows
    projection: npt.NDArray[np.int8]
    shard_sizes: list[int]
    left_out: int


class StudyBatch(NamedTuple):
    """Images uint8 [B, V, 1, H, W] of a step's studies; black where there is none or it is unusable.

    The step's rows are [B, V], -1 where there is none. `present` bool [B, V] are the images to look at;
    `projection` int8 [B, V] are places in PROJECTIONS, 0 where there is no image; target float32 [B, 14] and
    mask bool [B, 14] are the study's. `bad` are the positions [B] of studies without any usable image: they
    are masked.
    """

    step: Step
    images: npt.NDArray[np.uint8]
    present: npt.NDArray[np.bool_]
    projection: npt.NDArray[np.int8]
    target: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    bad: list[int]


def find_studies(split: OpenSplit, rows: Rows | None = None) -> Studies:
    """The studies of a split, with their images among `rows` (ascending; all where None); others are not there.

    V is the largest number of such images that a study has, at most MOST_VIEWS: of a study with more the first
    ones of the table are taken. Raises DataError where images of a study differ in a label, naming both.
    """
    table = split.table if rows is None else split.table.take(rows)
    rows = np.arange(table.num_rows, dtype=np.int64) if rows is None else rows
    study = number_studies(table)
    order = np.argsort(study, kind="stable")
    counts = np.bincount(study)
    starts = np.cumsum(counts) - counts
    _refuse_differences(split.name, table, order, np.repeat(order[starts], counts))
    place = np.arange(len(order)) - np.repeat(starts, counts)
    kept = place < MOST_VIEWS
    of_studies = np.full((len(counts), 1 + int(place[kept].max(initial=0))), -1, np.int64)
    of_studies[study[order][kept], place[kept]] = rows[order[kept]]
    # Shards where no study begins take no place in a window of the plan.
    sizes = np.unique(split.shard[of_studies[:, 0]], return_counts=True)[1]
    return Studies(of_studies, _projection_codes(split.table), sizes.tolist(), int((~kept).sum()))


def stream_studies(
    plan: Callable[[], Iterator[Step]],
    split: OpenSplit,
    studies: Studies,
    labels: Labels,
    *,
    size: int,
    threads: int = 2,
    max_bad: int = 0,
) -> Iterable[StudyBatch]:
    """The batches of a plan over studies: of an epoch of training, or of all studies in table order.

        plan = partial(plan_training, studies.shard_sizes, batch_size, seed, epoch, start_step)
        plan = partial(plan_evaluation, len(studies.rows), batch_size)

    `weights` of plan_training are one for each study. `labels` are those of the split's rows: a study has what
    its first image has, so a smoothing draw is one for each study. `max_bad` counts images.
    """
    fetch, decode, _ = stages(split, labels, size=size, threads=threads, max_bad=max_bad)
    return compose(
        plan,
        partial(gather, studies=studies),
        fetch,
        decode,
        partial(label_studies, studies=studies, labels=labels),
    )


def gather(steps: Iterable[Step], studies: Studies) -> Iterator[Step]:
    """Steps whose rows are numbers of studies [B] → steps whose rows are those of their images [B, V]."""
    for step in steps:
        yield step._replace(rows=studies.rows[step.rows])


def label_studies(decoded: Iterable[Decoded], studies: Studies, labels: Labels) -> Iterator[StudyBatch]:
    """Join each batch with its projections, targets and masks; nothing is learnt from unusable images."""
    for step, images, bad in decoded:
        is_image = step.rows >= 0
        present = is_image.copy()
        present.flat[bad] = False
        projection = np.where(is_image, studies.projection[step.rows], np.int8(0))
        first, unusable = step.rows[:, 0], ~present.any(axis=1)
        mask = labels.mask[first]
        mask[unusable] = False
        without = np.flatnonzero(unusable).tolist()
        yield StudyBatch(step, images, present, projection, labels.target[first], mask, without)


def _projection_codes(table: pa.Table) -> npt.NDArray[np.int8]:
    names = pc.if_else(pc.equal(table["view"], "lateral"), "lateral", table["projection"])
    codes = pc.index_in(names, value_set=pa.array(PROJECTIONS))
    found: npt.NDArray[np.int8] = pc.fill_null(codes, PROJECTIONS.index("other")).to_numpy().astype(np.int8)
    return found


def _refuse_differences(name: str, table: pa.Table, order: Rows, first: Rows) -> None:
    """Raise DataError for an image whose raw states are not those of its study's first image."""
    states, blank = label_states(table)
    states[blank] = 2
    differs = states[order] != states[first]
    for position, column in np.argwhere(differs)[:1].tolist():
        keys = [table["key"][int(rows[position])].as_py() for rows in (first, order)]
        raise DataError(
            f"{name}: {keys[0]} and {keys[1]} are of one study but differ in {LABELS[column]}; "
            "a study has one label, so read these shards by image"
        )
