"""Scores, targets, masks and patients → 95 % intervals of AUPRC and its means, by resampling patients.

A patient's images are alike, so a resample draws patients with replacement, each with all of their images, as many
as there are. The interval runs from the 2.5th to the 97.5th percentile (Efron and Tibshirani, 1993, chapter 13).
A resample is stored as how often each patient was drawn: scores are sorted once, and each resample is a column of
weights in that order.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.measure.metrics import (
    NO_LIMITS,
    Bools,
    Figure,
    Floats,
    Ints,
    Names,
    Ranking,
    rank,
    weighted_areas,
)

LIMITS = (2.5, 97.5)  # percent
FEWEST = 100  # resamples; with fewer, percentiles that far out mean nothing
BLOCK_CELLS = 2**20  # rows × resamples at once: about 70 MB


def resample_auprc(
    scores: Floats,
    target: Floats,
    mask: Bools,
    patient: Names,
    resamples: int,
    seed: int,
) -> Floats:
    """AUPRC [R, L] of resamples of scores [N, L] against targets [N, L] in {0, 1}, on the cells of mask [N, L].

    The same patients [N] and seed give the same resamples, whatever the scores and the order of the rows. NaN in
    resamples in which a label has lost a class; in all of them if it has only one, or if one patient has all positives:
    resamples then say nothing about how much patients differ.
    """
    patients, codes = np.unique(patient, return_inverse=True)
    columns: dict[int, tuple[Ranking, Ints]] = {}
    for column in range(scores.shape[1]):
        used = mask[:, column]
        truth = target[used, column] == 1
        if truth.any() and not truth.all() and len(np.unique(codes[used][truth])) > 1:
            ranking = rank(scores[used, column], truth)
            columns[column] = ranking, codes[used][ranking.order]
    values = np.full((resamples, scores.shape[1]), np.nan)
    done = 0
    for counts in draw_counts(len(patients), resamples, max(1, BLOCK_CELLS // len(scores)), seed):
        block = slice(done, done + counts.shape[1])
        for column, (ranking, owners) in columns.items():
            _, values[block, column] = weighted_areas(ranking, counts.take(owners, axis=0))
        done = block.stop
    return values


def draw_counts(patients: int, resamples: int, block: int, seed: int) -> Iterator[npt.NDArray[np.uint16]]:
    """How often each patient was drawn in each resample: blocks [patients, at most `block`].

    Each resample in turn is `patients` draws from PCG64(seed) by `Generator.integers`.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, resamples, block):
        rows = [
            np.bincount(generator.integers(patients, size=patients), minlength=patients)
            for _ in range(min(block, resamples - start))
        ]
        yield np.ascontiguousarray(np.array(rows, np.uint16).T)


def resampled_mean(values: Floats, names: Sequence[str], over: Sequence[str]) -> Floats:
    """The mean of values [R, L] over some labels, per resample; NaN if one lost a class, empty for no labels."""
    means: Floats = values[:, [names.index(name) for name in over]].mean(axis=1) if over else np.empty(0)
    return means


def interval(values: Floats) -> Figure:
    """`low` and `high` from values [R], of which those that are NaN are left out.

    None if fewer than 100 values remain, or if all are equal, which shows how few patients there are rather than how
    certain the figure is.
    """
    kept = values[~np.isnan(values)]
    if len(kept) < FEWEST or np.ptp(kept) == 0:
        return NO_LIMITS
    low, high = np.percentile(kept, LIMITS).tolist()
    return {"low": low, "high": high}
