"""(samples, seed, epoch) → the order of an epoch's samples; a batch is a slice of it.

**A batch is a pure function of (manifest, seed, epoch, step)**: it depends on no thread, process, clock or
earlier batch, so resuming is starting at a step. Shards are permuted, grouped into windows, and samples are
permuted inside a window: reading stays local, and only one window is needed at a time. The same
holds if samples are drawn by weight, and if each of several ranks takes its slice of every batch.
A sample is the views of a study, or one image alone: only the number of samples in each shard counts here.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DataError

Rows = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

WINDOW = 16  # shards whose samples are mixed with each other


class Samples(NamedTuple):
    """The samples of a split, in the order of their first images.

    `rows` [S, V] are the rows of their images in the split's table, -1 if a sample has fewer than V;
    `shard_sizes` is how many samples begin in each shard.
    """

    rows: Rows
    shard_sizes: list[int]

    def thin(self, step: int) -> "Samples":
        """Every `step`-th sample, to be read in table order: they are not counted by shard."""
        return Samples(self.rows[::step], [])


class Step(NamedTuple):
    """Which samples make one batch: the rows [B, V] of their images in the split's table, -1 for no image."""

    epoch: int
    step: int
    rows: Rows

    @property
    def images(self) -> Rows:
        """Row numbers [N], without the -1 padding."""
        return self.rows[self.rows >= 0]


def training_steps(samples: int, batch_size: int) -> int:
    """Full batches per epoch; training drops the rest, which differs each epoch."""
    return samples // batch_size


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
    """The steps of one epoch, from `start_step` on; `weights` as in `epoch_order`.

    `batch_size` is that of all ranks together: each takes its slice of every batch, so any number of ranks sees
    the same batches in the same order. Raises DataError if the ranks do not divide it.
    """
    share = share_batch(batch_size, rank, ranks)
    order = epoch_order(samples.shard_sizes, seed, epoch, weights=weights)
    for step in range(start_step, training_steps(len(order), batch_size)):
        start = step * batch_size + rank * share
        yield Step(epoch, step, samples.rows[order[start : start + share]])


def plan_evaluation(
    samples: Samples, batch_size: int, start_step: int = 0, *, rank: int = 0, ranks: int = 1
) -> Iterator[Step]:
    """Every sample exactly once over the ranks, in table order; from `start_step` on.

    `batch_size` is that of one rank: each takes consecutive batches, at most one more than another rank. Ranks
    read different shards, and their results, concatenated, are in table order. The very last batch may be short.
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
    random = np.random.Philox(key=_key(seed, epoch))
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    shards = _permute(np.arange(len(shard_sizes)), random)
    shards = shards[starts[shards] < starts[shards + 1]]
    windows = []
    for first in range(0, len(shards), window):
        places = [np.arange(starts[shard], starts[shard + 1]) for shard in shards[first : first + window]]
        windows.append(np.concatenate(places))
    if not windows:
        return np.empty(0, np.int64)
    if weights is None:
        return np.concatenate([_permute(places, random) for places in windows])
    usable = np.all((weights >= 0) & (weights < np.inf)) and weights.any()
    if weights.shape != (starts[-1],) or not usable:
        raise ValueError(f"weights must be {starts[-1]} finite numbers, none negative and not all 0")
    return np.concatenate(_draw(windows, weights, random))


def _draw(windows: Sequence[Rows], weights: Weights, random: np.random.Philox) -> list[Rows]:
    """As many draws as there are weights; each window gets its share of them by its total weight, rounded.

    With a share by its number of samples, each positive of a window with few would be drawn more often.
    """
    sums = [np.cumsum(weights[places]) for places in windows]
    totals = np.cumsum([cumulative[-1] for cumulative in sums])
    ends = np.rint(totals / totals[-1] * len(weights))
    draws = []
    for places, cumulative, count in zip(windows, sums, np.diff(ends, prepend=0), strict=True):
        # 53 bits fill a float64, so that the product stays below the sum; a weight of 0 is never drawn.
        level = (random.random_raw(int(count)) >> np.uint64(11)) / 2**53 * cumulative[-1]
        draws.append(places[np.searchsorted(cumulative, level, side="right")])
    return draws


def _permute(values: Rows, random: np.random.Philox) -> Rows:
    """The values sorted by random 64-bit keys."""
    # Raw Philox output and a stable sort are the same in every NumPy version; Generator.permutation is not.
    return values[np.argsort(random.random_raw(len(values)), kind="stable")]


def _key(seed: int, epoch: int) -> int:
    """A 128-bit Philox key: nearby (seed, epoch) give unrelated orders."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=16).digest(), "little")


def share_batch(batch_size: int, rank: int, ranks: int) -> int:
    """The samples that each rank takes of a batch. Raises DataError for an invalid rank or batch size."""
    if not 0 <= rank < ranks:
        raise DataError(f"rank {rank} is not one of {ranks} ranks")
    if batch_size < 1:
        raise DataError(f"`batch_size` {batch_size}: a batch has at least 1 sample")
    if batch_size % ranks:
        raise DataError(f"`batch_size` {batch_size}: {ranks} ranks do not divide it")
    return batch_size // ranks
