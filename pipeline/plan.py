"""(shard sizes, seed, epoch) → the order of an epoch's samples; a batch is a slice of it.

**A batch is a pure function of (manifest, seed, epoch, step)**: it depends on no thread, process, clock or
earlier batch, so resuming is starting at a step. Shards are permuted, grouped into windows, and samples are
permuted inside a window: reading stays local, and a window is all that has to be at hand.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

WINDOW = 16  # shards whose samples are mixed with each other


class Step(NamedTuple):
    """Which samples make one batch: row numbers [B] of the split's table."""

    epoch: int
    step: int
    rows: Rows


def training_steps(samples: int, batch_size: int) -> int:
    """Full batches per epoch; the tail is dropped in training (another one each epoch)."""
    return samples // batch_size


def plan_training(
    shard_sizes: Sequence[int], batch_size: int, seed: int, epoch: int, start_step: int = 0
) -> Iterator[Step]:
    """The steps of one epoch, from `start_step` on."""
    order = epoch_order(shard_sizes, seed, epoch)
    for step in range(start_step, training_steps(len(order), batch_size)):
        yield Step(epoch, step, order[step * batch_size : (step + 1) * batch_size])


def plan_evaluation(samples: int, batch_size: int) -> Iterator[Step]:
    """Every sample exactly once, in table order; the last batch may be short."""
    for step, start in enumerate(range(0, samples, batch_size)):
        yield Step(0, step, np.arange(start, min(start + batch_size, samples), dtype=np.int64))


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, window: int = WINDOW) -> Rows:
    """Row numbers [N] of the split's table, whose rows lie in shard order, as the epoch visits them."""
    random = np.random.Philox(key=_key(seed, epoch))
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    shards = _permute(np.arange(len(shard_sizes), dtype=np.int64), random)
    windows = []
    for first in range(0, len(shards), window):
        rows = [np.arange(starts[shard], starts[shard + 1]) for shard in shards[first : first + window]]
        windows.append(_permute(np.concatenate(rows), random))
    return np.concatenate(windows) if windows else np.empty(0, np.int64)


def _permute(values: Rows, random: np.random.Philox) -> Rows:
    """The values sorted by random 64-bit keys."""
    # Raw Philox output and a stable sort are the same in every NumPy version; Generator.permutation is not.
    return values[np.argsort(random.random_raw(len(values)), kind="stable")]


def _key(seed: int, epoch: int) -> int:
    """A 128-bit Philox key: nearby (seed, epoch) give unrelated orders."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=16).digest(), "little")
