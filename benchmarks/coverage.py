"""How often 95 % intervals hold the true figure: AUROC by several methods, its means, differences, and rates.

    OMP_NUM_THREADS=1 nice python -m benchmarks.coverage --replicates 2000

Drawn data: 200 patients with 1 to 3 films, whose labels and scores are alike within a patient.
"""

import argparse
from collections.abc import Callable
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.measure.bootstrap import draw_counts
from pipeline.measure.delong import combine_limits, measure_areas, score_limits
from pipeline.measure.metrics import Z, wilson_limits

PATIENTS = 200
RESAMPLES = 1000
ALIKE = 0.5  # the share of a score's variance that is the patient's
POSITIVES = (5, 8, 10, 30, 100)
AUROCS = (0.7, 0.85, 0.95)
Array = npt.NDArray[Any]


def quantile(share: float) -> float:
    """The normal distribution's quantile, by bisection."""
    low, high = -9.0, 9.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cumulative(middle) < share else (low, middle)
    return low


def cumulative(value: float) -> float:
    return (1 + erf(value / 2**0.5)) / 2


def draw_films(random: np.random.Generator) -> Array:
    """The patient of each film."""
    return np.repeat(np.arange(PATIENTS), random.choice([1, 2, 3], PATIENTS, p=[0.5, 0.3, 0.2]))


def draw_alike(
    random: np.random.Generator, patient: Array, share: float, shape: tuple[int, ...] = ()
) -> Array:
    """Standard normal values per film, correlated by `share` within a patient: [films, *shape]."""
    own = random.normal(size=(PATIENTS, *shape))[patient]
    return share**0.5 * own + (1 - share) ** 0.5 * random.normal(size=(len(patient), *shape))


def draw_truth(random: np.random.Generator, patient: Array, positives: int) -> Array:
    """So many positive films, most of a patient's films alike."""
    latent = draw_alike(random, patient, 0.7)
    return latent >= np.sort(latent)[-positives]


def resampled(score: Array, truth: Array, owners: Array, counts: Array) -> Array:
    """AUROC under weights [patients, R] by the matrix of wins: [R], NaN without a class."""
    positive, negative = score[truth][:, None], score[~truth]
    wins = (positive > negative) + 0.5 * (positive == negative)
    weights = counts[owners[truth]], counts[owners[~truth]]
    pairs = weights[0].sum(axis=0) * weights[1].sum(axis=0)
    won = np.einsum("nr,nr->r", wins.T @ weights[0], weights[1])
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def percentile(values: Array, shares: tuple[float, float] = (0.025, 0.975)) -> tuple[float, float]:
    low, high = np.nanquantile(values, shares)
    return float(low), float(high)


def bca(auroc: float, values: Array, jackknife: Array) -> tuple[float, float]:
    """Bias-corrected and accelerated (Efron, 1987)."""
    kept = values[~np.isnan(values)]
    below = (np.mean(kept < auroc) + np.mean(kept <= auroc)) / 2
    bias = quantile(min(max(below, 1e-4), 1 - 1e-4))
    left = jackknife[~np.isnan(jackknife)]
    lack = left.mean() - left
    scale = 6 * (lack @ lack) ** 1.5
    bend = (lack**3).sum() / scale if scale > 0 else 0.0
    shares = (cumulative(bias + (bias + z) / (1 - bend * (bias + z))) for z in (-Z, Z))
    low, high = shares
    return percentile(kept, (low, high))


def logit_limits(auroc: float, error: float) -> tuple[float, float]:
    """Normal on the logit; of a perfect AUROC both limits are 1."""
    if not 0 < auroc < 1:
        return auroc, auroc
    middle, half = np.log(auroc / (1 - auroc)), Z * error / (auroc * (1 - auroc))
    return 1 / (1 + np.exp(half - middle)), 1 / (1 + np.exp(-half - middle))


def compare_single(replicates: int, seed: int = 0) -> None:
    print("AUROC: share of intervals that hold the true one (width of the median)")
    methods = ("percentile", "BCa", "logit DeLong", "Newcombe", "ours")
    print("| positives | AUROC |", " | ".join(methods), "| zero width: percentile, ours |")
    print("|---:" * (len(methods) + 3) + "|")
    counts = np.concatenate(list(draw_counts(PATIENTS, RESAMPLES, RESAMPLES, seed)), axis=1).astype(
        np.float32
    )
    leave = (1 - np.eye(PATIENTS)).astype(np.float32)
    for positives in POSITIVES:
        for true in AUROCS:
            random = np.random.default_rng([seed, positives, int(100 * true)])
            found = np.empty((replicates, len(methods), 2))
            for number in range(replicates):
                patient = draw_films(random)
                truth = draw_truth(random, patient, positives)
                score = draw_alike(random, patient, ALIKE) + 2**0.5 * quantile(true) * truth
                areas = measure_areas(score[:, None], truth[:, None], np.ones((len(score), 1), bool), patient)
                auroc = float(areas.auroc[0])
                values = resampled(score, truth, patient, counts)
                found[number] = (
                    percentile(values),
                    bca(auroc, values, resampled(score, truth, patient, leave)),
                    logit_limits(auroc, float(np.linalg.norm(areas.influence))),
                    score_limits(auroc, positives, len(score) - positives),
                    (areas.low[0], areas.high[0]),
                )
            holds = (found[..., 0] <= true) & (true <= found[..., 1])
            width = np.median(found[..., 1] - found[..., 0], axis=0)
            cells = [
                f"{share:.3f} ({size:.2f})" for share, size in zip(holds.mean(axis=0), width, strict=True)
            ]
            flat = (found[..., 1] - found[..., 0] < 1e-9).mean(axis=0)
            print(
                f"| {positives} | {true} |",
                " | ".join(cells),
                f"| {flat[0]:.3f}, {flat[-1]:.3f} |",
                flush=True,
            )


def compare_combined(replicates: int, seed: int = 1) -> None:
    """Means over five labels, and paired differences of a label and of the mean."""
    print("\nMean of 5 labels, paired differences of one label and of the mean: percentile, ours")
    print("| positives | true AUROCs | one label's difference | mean | mean's difference |")
    print("|---:|---|---:|---:|---:|")
    counts = np.concatenate(list(draw_counts(PATIENTS, RESAMPLES // 2, RESAMPLES, seed)), axis=1).astype(
        np.float32
    )
    for positives in POSITIVES:
        for ours, theirs in ((0.7, 0.7), (0.85, 0.8), (0.95, 0.9)):
            random = np.random.default_rng([seed, positives, int(100 * ours)])
            holds = np.zeros((replicates, 3, 2), bool)
            for number in range(replicates):
                patient = draw_films(random)
                truth = np.stack([draw_truth(random, patient, positives) for _ in range(5)], axis=1)
                shared = draw_alike(random, patient, ALIKE)[:, None, None]  # by labels and by runs
                noise = 0.5**0.5 * shared + 0.5**0.5 * draw_alike(random, patient, ALIKE, (5, 2))
                shift = 2**0.5 * np.array([quantile(ours), quantile(theirs)])
                scores = noise + shift * truth[..., None]
                mask = np.ones(truth.shape, bool)
                first, second = (measure_areas(scores[..., run], truth, mask, patient) for run in (0, 1))
                both = first.join(second)
                drawn = np.array(
                    [
                        [
                            resampled(scores[:, label, run], truth[:, label], patient, counts)
                            for label in range(5)
                        ]
                        for run in (0, 1)
                    ]
                )
                mean = np.full(5, 0.2)
                one = np.eye(5)[0]
                cases = (
                    (np.concatenate([one, -one]), drawn[0, 0] - drawn[1, 0], ours - theirs),
                    (np.concatenate([mean, 0 * mean]), drawn[0].mean(axis=0), ours),
                    (np.concatenate([mean, -mean]), (drawn[0] - drawn[1]).mean(axis=0), ours - theirs),
                )
                for place, (weights, values, true) in enumerate(cases):
                    limits = combine_limits(both, weights)
                    for method, (low, high) in enumerate((percentile(values), limits.values())):
                        holds[number, place, method] = low <= true <= high
            cells = [", ".join(f"{share:.3f}" for share in pair) for pair in holds.mean(axis=0)]
            print(f"| {positives} | {ours}, {theirs} |", " | ".join(cells), "|", flush=True)


def compare_rates(replicates: int, seed: int = 2) -> None:
    print("\nSensitivity: Wilson, Wilson with a design effect")
    print("| positives | true | coverage |")
    print("|---:|---:|---:|")
    for positives in POSITIVES:
        for true in (0.5, 0.8, 0.95):
            random = np.random.default_rng([seed, positives, int(100 * true)])
            holds = np.zeros((replicates, 2), bool)
            for number in range(replicates):
                patient = draw_films(random)
                chosen = draw_truth(random, patient, positives)
                called = (draw_alike(random, patient, ALIKE) < quantile(true))[chosen]
                for method, owners in enumerate((np.arange(positives), patient[chosen])):
                    low, high = wilson_limits(called, owners).values()
                    holds[number, method] = low is not None and high is not None and low <= true <= high
            print(
                f"| {positives} | {true} |",
                ", ".join(f"{share:.3f}" for share in holds.mean(axis=0)),
                "|",
                flush=True,
            )


PARTS: dict[str, Callable[[int], None]] = {
    "single": compare_single, "combined": compare_combined, "rates": compare_rates,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments.replicates)


if __name__ == "__main__":
    main()
