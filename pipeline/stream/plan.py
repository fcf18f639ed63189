"""(samples, seed, epoch) → the order of an epoch's samples; a batch is a slice of it.

**A batch is a pure function of (manifest, seed, epoch, step)**: it depends on no thread, process, clock or earlier
batch, so resuming is starting at a step. Shards are permuted, grouped into windows, and samples are permuted or, by
weight, drawn inside a window: reading stays local, and only one window is needed at a time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.policies import divide_cells

Rows = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
WINDOW = 16  # shards whose samples are mixed with each other


class Samples(NamedTuple):
    """The samples of a split, in the order of their first images."""

    rows: Rows  # [S, V] of their images in the split's table, -1 if a sample has fewer than V
    shard_sizes: list[int]  # how many samples begin in each shard


class Step(NamedTuple):
    """Which samples make one batch: the rows [B, V] of their images in the split's table, -1 for no image."""

    epoch: int
    step: int
    rows: Rows

    @property
    def images(self) -> Rows:
        """Row numbers [N], without the -1 padding."""
        return self.rows[self.rows >= 0]


def plan_training(
    samples: Samples,
    batch_size: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    *,
    weights: Weights | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Step]:
    """The full batches of one epoch, from `start_step` on; the rest, another one each epoch, is dropped.

    `batch_size` is that of all ranks together: each takes its slice of every batch. `weights` as in `epoch_order`.
    Raises DataError if the ranks do not divide the batch.
    """
    share = share_batch(batch_size, rank, ranks)
    order = epoch_order(samples.shard_sizes, seed, epoch, weights=weights)
    for step in range(start_step, len(order) // batch_size):
        start = step * batch_size + rank * share
        yield Step(epoch, step, samples.rows[order[start : start + share]])


def plan_evaluation(
    samples: Samples, batch_size: int, start_step: int = 0, *, rank: int = 0, ranks: int = 1
) -> Iterator[Step]:
    """Every sample exactly once over the ranks, in table order; from `start_step` on.

    `batch_size` is that of one rank, which takes consecutive batches. The very last one may be short.
    """
    share_batch(batch_size * ranks, rank, ranks)
    steps = -(-len(samples.rows) // batch_size)
    for step in range(max(start_step, steps * rank // ranks), steps * (rank + 1) // ranks):
        yield Step(0, step, samples.rows[step * batch_size : (step + 1) * batch_size])


def epoch_order(
    shard_sizes: Sequence[int], seed: int, epoch: int, window: int = WINDOW, *, weights: Weights | None = None
) -> Rows:
    """Sample numbers [S], counted through the shards, as the epoch visits them.

    A shard without any sample takes no place in a window. With `weights` [S], the epoch draws S samples with
    replacement, in proportion to them. Raises ValueError for weights of another shape, negative, or all 0.
    """
    key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=16).digest()  # nearby epochs have unrelated orders
    random = np.random.Philox(key=int.from_bytes(key, "little"))
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    shards = _permute(np.arange(len(shard_sizes)), random)
    shards = shards[starts[shards] < starts[shards + 1]]
    places = [np.arange(starts[shard], starts[shard + 1]) for shard in shards]
    windows = [np.concatenate(places[first : first + window]) for first in range(0, len(places), window)]
    if not windows:
        return np.empty(0, np.int64)
    if weights is None:
        return np.concatenate([_permute(rows, random) for rows in windows])
    usable = np.all((weights >= 0) & (weights < np.inf)) and weights.any()
    if weights.shape != (starts[-1],) or not usable:
        raise ValueError(f"weights must be {starts[-1]} finite numbers, none negative and not all 0")
    # Each window has its share of the draws by its total weight, rounded: with a share by its number of samples, each
    # positive of a window with few would be drawn more often.
    sums = [np.cumsum(weights[rows]) for rows in windows]
    totals = np.cumsum([cumulative[-1] for cumulative in sums])
    ends = np.rint(totals / totals[-1] * len(weights))
    draws = []
    for rows, cumulative, count in zip(windows, sums, np.diff(ends, prepend=0), strict=True):
        # 53 bits fill a float64, so that the product stays below the sum; a weight of 0 is never drawn.
        level = (random.random_raw(int(count)) >> np.uint64(11)) / 2**53 * cumulative[-1]
        draws.append(rows[np.searchsorted(cumulative, level, side="right")])
    return np.concatenate(draws)


def _permute(values: Rows, random: np.random.Philox) -> Rows:
    """The values sorted by random 64-bit keys."""
    # Raw Philox output and a stable sort are the same in every NumPy version; Generator.permutation is not.
    return values[np.argsort(random.random_raw(len(values)), kind="stable")]


def share_batch(batch_size: int, rank: int, ranks: int) -> int:
    """The samples that each rank takes of a batch. Raises DataError for an invalid rank or batch size."""
    if not 0 <= rank < ranks:
        raise DataError(f"rank {rank} is not one of {ranks} ranks")
    if batch_size < 1:
        raise DataError(f"`batch_size` {batch_size}: a batch has at least 1 sample")
    if batch_size % ranks:
        raise DataError(f"`batch_size` {batch_size}: {ranks} ranks do not divide it")
    return batch_size // ranks


def balance_weights(target: npt.NDArray[np.float32], mask: Bools, strata: Rows | None = None) -> Weights:
    """Weights [N] under which a label's positives and negatives weigh the same in total.

    `target` [N] and `mask` [N] are the label's after its policy; a soft target counts as the nearer class. Cells that
    are masked, or of the third class of `multiclass` (-1), keep weight 1. With `strata` [N], numbers from 0, the two
    weigh the same within each stratum, whose total weight is its number of cells; in one with a single class, cells
    get 0. Raises ValueError if there are no positives or no negatives, or no stratum has both.
    """
    strata = np.zeros(len(target), np.int64) if strata is None else strata
    classes = divide_cells(target, mask)
    for name, cells in zip(("positives", "negatives"), classes, strict=True):
        if not cells.any():
            raise ValueError(f"no {name} to balance")
    counts = np.array([np.bincount(strata[cells], minlength=strata.max() + 1) for cells in classes])
    usable = counts.all(axis=0)
    if not usable.any():
        raise ValueError("no stratum has both positives and negatives")
    shares = np.where(usable, counts.sum(axis=0) / 2 / np.maximum(counts, 1), 0)  # of a cell, [class, stratum]
    weights = np.ones(len(target))
    for cells, share in zip(classes, shares, strict=True):
        weights[cells] = share[strata[cells]]
    return weights


def find_strata(table: pa.Table, columns: Sequence[str]) -> Rows:
    """The stratum of each row [N], from 0: rows with the same values, or empty cells, in these columns share one.

    Column names are case-insensitive. Raises DataError for an unknown column.
    """
    known, codes = {name.casefold(): name for name in table.column_names}, []
    for column in columns:
        if column.casefold() not in known:
            raise DataError(f"no column '{column}'; there are {', '.join(table.column_names)}")
        cells = table[known[column.casefold()]].combine_chunks()
        codes.append(pc.dictionary_encode(cells, null_encoding="encode").indices)
    strata: Rows = np.unique(np.stack(codes), axis=1, return_inverse=True)[1]
    return strata.ravel()


def mix_weights(folder: Rows, shares: Sequence[float]) -> Weights:
    """Weights [N], of mean 1, under which each folder's images have its share of the draws.

    `folder` [N] is the place of each image's folder in `shares`. Raises ValueError naming a folder without images.
    """
    counts = np.bincount(folder, minlength=len(shares))
    if not counts.all():
        raise ValueError(f"none of the images is in folder {int(np.argmin(counts)) + 1}")
    wanted = np.array(shares) / sum(shares) * len(folder)
    return (wanted / counts)[folder]
