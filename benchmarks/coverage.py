"""How often 95 % intervals contain the true value, and how often verdicts on shortcuts are wrong.

    OMP_NUM_THREADS=1 nice python -m benchmarks.coverage --replicates 2000
    OMP_NUM_THREADS=1 nice python -m benchmarks.coverage --replicates 200 --parts few verdicts gaps

Simulated data: 200 patients with 1 to 3 images, whose labels and scores are alike within a patient; for verdicts,
scores of known origin beside covariates. Run as a file, with PYTHONPATH at another checkout, it measures that one.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.special import ndtri as quantile

from pipeline.labels import LABELS
from pipeline.measure.belief import assess_belief
from pipeline.measure.calibration import Calibration
from pipeline.measure.delong import combine, measure_areas, measure_precision
from pipeline.measure.evaluate import Scored, assess_groups
from pipeline.measure.metrics import wilson_limits

PATIENTS = 200
RESAMPLES = 1000
ALIKE = 0.5  # the share of a score's variance that is the patient's
POSITIVES = (5, 8, 10, 30, 100)
AUROCS = (0.7, 0.85, 0.95)
Array = npt.NDArray[Any]


def draw_films(random: np.random.Generator) -> Array:
    """The patient of each film."""
    return np.repeat(np.arange(PATIENTS), random.choice([1, 2, 3], PATIENTS, p=[0.5, 0.3, 0.2]))


def draw_alike(random: np.random.Generator, patient: Array, share: float, shape: tuple[int, ...] = ()) -> Array:
    """Standard normal values per film, correlated by `share` within a patient: [films, *shape]."""
    own = random.normal(size=(PATIENTS, *shape))[patient]
    values: Array = share**0.5 * own + (1 - share) ** 0.5 * random.normal(size=(len(patient), *shape))
    return values


def draw_truth(random: np.random.Generator, patient: Array, positives: int) -> Array:
    """So many positive films, most of a patient's films alike."""
    latent = draw_alike(random, patient, 0.7)
    truth: Array = latent >= np.sort(latent)[-positives]
    return truth


def resampled(score: Array, truth: Array, owners: Array, counts: Array) -> Array:
    """AUROC under weights [patients, R] by the matrix of wins: [R], NaN without a class."""
    positive, negative = score[truth][:, None], score[~truth]
    wins = (positive > negative) + 0.5 * (positive == negative)
    weights = counts[owners[truth]], counts[owners[~truth]]
    pairs = weights[0].sum(axis=0) * weights[1].sum(axis=0)
    won = np.einsum("nr,nr->r", wins.T @ weights[0], weights[1])
    areas: Array = np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)
    return areas


def resampled_precision(score: Array, truth: Array, owners: Array, counts: Array) -> Array:
    """AUPRC [R] under weights [patients, R], of scores without ties; NaN without a positive."""
    order = np.argsort(-score)
    weights = counts[owners[order]]
    hits = np.cumsum(weights * truth[order, None], axis=0)
    precision = hits / np.maximum(np.cumsum(weights, axis=0), 1)
    total = np.where(hits[-1] > 0, hits[-1], np.nan)
    areas: Array = np.einsum("nr,nr->r", weights * truth[order, None], precision) / total
    return areas


def true_precision(auroc: float, share: float) -> float:
    """The AUPRC of normal scores with an AUROC, of any number of images of which a share is positive."""
    recall = (np.arange(20_000) + 0.5) / 20_000
    alarms = ndtr(quantile(recall) - 2**0.5 * quantile(auroc))
    return float((share * recall / (share * recall + (1 - share) * alarms)).mean())


def draw_counts(resamples: int, seed: int) -> Array:
    """How often each patient is in each resample: [patients, R]."""
    shares = np.full(PATIENTS, 1 / PATIENTS)
    return np.random.default_rng(seed).multinomial(PATIENTS, shares, resamples).T.astype(np.float32)


def percentile(values: Array, shares: tuple[float, float] = (0.025, 0.975)) -> tuple[float, float]:
    low, high = np.nanquantile(values, shares)
    return float(low), float(high)


def compare_single(replicates: int, seed: int = 0) -> None:
    print("AUROC: share of intervals that hold the true one (width of the median)")
    methods = ("percentile", "ours")
    print("| positives | AUROC |", " | ".join(methods), "| zero width: percentile, ours |")
    print("|---:" * (len(methods) + 3) + "|")
    counts = draw_counts(RESAMPLES, seed)
    for positives in POSITIVES:
        for true in AUROCS:
            random = np.random.default_rng([seed, positives, int(100 * true)])
            found = np.empty((replicates, len(methods), 2))
            for number in range(replicates):
                patient = draw_films(random)
                truth = draw_truth(random, patient, positives)
                score = draw_alike(random, patient, ALIKE) + 2**0.5 * quantile(true) * truth
                areas = measure_areas(score[:, None], truth[:, None], np.ones((len(score), 1), bool), patient)
                values = resampled(score, truth, patient, counts)
                found[number] = (percentile(values), (areas.low[0], areas.high[0]))
            holds = (found[..., 0] <= true) & (true <= found[..., 1])
            width = np.median(found[..., 1] - found[..., 0], axis=0)
            cells = [f"{share:.3f} ({size:.2f})" for share, size in zip(holds.mean(axis=0), width, strict=True)]
            flat = (found[..., 1] - found[..., 0] < 1e-9).mean(axis=0)
            print(f"| {positives} | {true} |", " | ".join(cells), f"| {flat[0]:.3f}, {flat[-1]:.3f} |", flush=True)


def compare_combined(replicates: int, seed: int = 1) -> None:
    """Means over five labels, and paired differences of a label and of the mean."""
    print("\nMean of 5 labels, paired differences of one label and of the mean: percentile, ours")
    print("| positives | true AUROCs | one label's difference | mean | mean's difference |")
    print("|---:|---|---:|---:|---:|")
    counts = draw_counts(RESAMPLES // 2, seed)
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
                        [resampled(scores[:, label, run], truth[:, label], patient, counts) for label in range(5)]
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
                    _, *limits = combine(both, weights).values()
                    for method, (low, high) in enumerate((percentile(values), limits)):
                        holds[number, place, method] = low <= true <= high
            cells = [", ".join(f"{share:.3f}" for share in pair) for pair in holds.mean(axis=0)]
            print(f"| {positives} | {ours}, {theirs} |", " | ".join(cells), "|", flush=True)


def compare_precision(replicates: int, seed: int = 3) -> None:
    """AUPRC, and its paired difference from that of scores with more noise and the same AUROC."""
    print("\nAUPRC: share of intervals that contain the true one (median width), and of those of a difference")
    print("| positives | AUROC | AUPRC | percentile | ours | difference: percentile, ours |")
    print("|---:" * 6 + "|")
    counts = draw_counts(RESAMPLES // 2, seed)
    for positives in POSITIVES:
        for auroc in AUROCS:
            random = np.random.default_rng([seed, positives, int(100 * auroc)])
            limits, truths = np.empty((replicates, 2, 2, 2)), np.empty(replicates)  # of area and difference, by method
            for number in range(replicates):
                patient = draw_films(random)
                truth = draw_truth(random, patient, positives)
                noise = 0.5**0.5 * draw_alike(random, patient, ALIKE)[:, None]
                noise = noise + 0.5**0.5 * draw_alike(random, patient, ALIKE, (2,))
                scores = noise + 2**0.5 * quantile(auroc) * truth[:, None]
                cells = np.repeat(truth[:, None], 2, axis=1), np.ones(scores.shape, bool), patient
                areas = measure_precision(scores, *cells)
                values = np.array([resampled_precision(score, truth, patient, counts) for score in scores.T])
                truths[number] = true_precision(auroc, positives / len(truth))
                limits[number, 0] = percentile(values[0]), (areas.low[0], areas.high[0])
                limits[number, 1] = percentile(values[0] - values[1]), [*combine(areas, [1, -1]).values()][1:]
            actual = np.stack([truths, np.zeros(replicates)], axis=1)[..., None]
            holds = ((limits[..., 0] <= actual) & (actual <= limits[..., 1])).mean(axis=0)
            width = np.median(limits[:, 0, :, 1] - limits[:, 0, :, 0], axis=0)
            cells_shown = [f"{share:.3f} ({size:.2f})" for share, size in zip(holds[0], width, strict=True)]
            pair = ", ".join(f"{share:.3f}" for share in holds[1])
            print(f"| {positives} | {auroc} | {truths.mean():.2f} |", " | ".join([*cells_shown, pair]), "|", flush=True)


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
                f"| {positives} | {true} |", ", ".join(f"{share:.3f}" for share in holds.mean(axis=0)), "|", flush=True
            )


def compare_few(replicates: int) -> None:
    print("\nAUROC .8, a class of few patients with many images, 300 other patients: coverage")
    for sick, images in ((2, 15), (3, 10), (5, 6), (10, 3), (30, 1)):
        holds = []
        for seed in range(replicates):
            random = np.random.default_rng(seed)
            owner = np.concatenate([np.repeat(np.arange(sick), images), np.arange(sick, sick + 300)])
            truth = (owner < sick)[:, None]
            own, rest = random.normal(size=sick + 300)[owner], random.normal(size=len(owner))
            score = 0.6**0.5 * own + 0.4**0.5 * rest + 2**0.5 * quantile(0.8) * truth[:, 0]
            areas = measure_areas(score[:, None], truth.astype(float), np.ones(truth.shape, bool), owner)
            holds.append(areas.low[0] <= 0.8 <= areas.high[0])
        print(f"| {sick} patients, {images} images each | {np.mean(holds):.3f} |", flush=True)


def as_scored(score: Array, truth: Array, random: np.random.Generator) -> Scored:
    """Scores [n, L] of one image a patient, with groups drawn at random."""
    rows = np.arange(len(score))
    ranks = (np.argsort(np.argsort(score, axis=0), axis=0) + 0.5) / len(score)
    groups = random.choice(["Female", "Male"], len(rows)), random.integers(20, 95, len(rows))
    projection = random.choice(["AP", "PA"], len(rows))
    return Scored(ranks, truth * 1.0, np.ones(truth.shape, bool), rows, rows, *groups, projection)


def count_verdicts(replicates: int) -> None:
    print("\nVerdicts: cleared, condemned, either in part or not told")
    print("| the score is | images, positives | cleared | condemned | neither |")
    print("|---|---|---:|---:|---:|")
    for kind, images, positives, auroc in (
        ("the patient number", 200, 20, 0.7), ("the patient number", 1000, 60, 0.65),
        ("the patient number", 3000, 300, 0.7), ("the sum of six covariates", 2000, 600, 0.72),
        ("the distance of the number to its middle", 2000, 800, 0.9),
        ("the disease, half by the number", 2000, 600, 0.84),
        ("the disease", 200, 25, 0.75), ("the disease", 500, 100, 0.8), ("the disease", 2000, 400, 0.65),
    ):  # fmt: skip
        counts = np.zeros(3, int)
        for seed in range(replicates):
            random = np.random.default_rng(seed)
            truth = np.arange(images) < positives
            noise, shift = random.normal(size=(images, 6)), 2**0.5 * quantile(auroc) * truth
            score, covariates = noise[:, 0] + shift, {"number": noise[:, 1], "other": noise[:, 2]}
            if kind == "the patient number":
                covariates = {"number": score}
            elif kind.startswith("the sum"):
                parts = noise + shift[:, None] / 6**0.5
                score, covariates = parts.sum(axis=1), {f"c{n}": part for n, part in enumerate(parts.T)}
            elif kind.startswith("the distance"):
                score = np.abs(noise[:, 0]) + shift
                covariates = {"number": score * random.choice([-1, 1], images)}
            elif "half" in kind:
                covariates["number"] = noise[:, 1] + truth
                score = noise[:, 0] + truth + covariates["number"]
            images_of = as_scored(score[:, None], truth[:, None], random)
            strata = {"sex": images_of.sex, "projection": images_of.projection}
            verdict = assess_belief(["Edema"], images_of, covariates, strata).get("Edema", {"verdict": ""})["verdict"]
            cleared = "no covariate" in verdict or "no shortcut" in verdict
            condemned = "nothing is left" in verdict or "shortcut shown" in verdict
            counts += (cleared, condemned, not cleared and not condemned)
        shares = " | ".join(f"{share:.0%}" for share in counts / replicates)
        print(f"| {kind} (AUROC {auroc}) | {images}, {positives} | {shares} |", flush=True)


def count_gaps(replicates: int) -> None:
    wide = 0
    fit: Calibration = {"thresholds": {"youden": 0.6}, "temperature": 1.0, "bias": 0.0, "note": None}
    for seed in range(replicates):
        random = np.random.default_rng(seed)
        truth = random.random((800, len(LABELS))) < 0.25
        images = as_scored(random.normal(size=truth.shape) + 1.2 * truth, truth, random)
        groups = assess_groups(LABELS, images, dict.fromkeys(LABELS, fit))
        wide += any(of["low"] > 0 for group in groups.values() for of in group["tpr_gap_limits"].values())
    print(f"\nA fair network with some significant gap of sensitivity between groups: {wide / replicates:.0%}")


PARTS: dict[str, Callable[[int], None]] = {
    "single": compare_single, "combined": compare_combined, "precision": compare_precision, "rates": compare_rates,
    "few": compare_few, "verdicts": count_verdicts, "gaps": count_gaps,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments.replicates)


if __name__ == "__main__":
    main()
