"""How often 95 % intervals contain the true value, and how often verdicts on shortcuts are wrong.

    OMP_NUM_THREADS=1 nice python -m benchmarks.coverage --replicates 2000
    OMP_NUM_THREADS=1 nice python -m benchmarks.coverage --replicates 200 --parts few verdicts gaps

Simulated data: 200 patients with 1 to 3 images, whose labels and scores are alike within a patient; for verdicts,
scores of known origin beside covariates. Run as a file, with PYTHONPATH at another checkout, it measures that one.
"""

import argparse
from collections.abc import Callable, Iterable
from itertools import product
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
RESAMPLES = 500
ALIKE = 0.5  # the share of a score's variance that is the patient's
POSITIVES = (5, 8, 10, 30, 100)
AUROCS = (0.7, 0.85, 0.95)
Array = npt.NDArray[Any]
Interval = tuple[float, float, float]  # low and high, and the true value


def draw_patients(random: np.random.Generator) -> Array:
    """The patient of each image."""
    return np.repeat(np.arange(PATIENTS), random.choice([1, 2, 3], PATIENTS, p=[0.5, 0.3, 0.2]))


def draw_alike(random: np.random.Generator, patient: Array, share: float, shape: tuple[int, ...] = ()) -> Array:
    """Standard normal values per image, correlated by `share` within a patient: [images, *shape]."""
    own = random.normal(size=(PATIENTS, *shape))[patient]
    values: Array = share**0.5 * own + (1 - share) ** 0.5 * random.normal(size=(len(patient), *shape))
    return values


def draw_truth(random: np.random.Generator, patient: Array, positives: int, labels: int = 1) -> Array:
    """Which images are positive [images, labels], a number of each label, most of a patient's images alike."""
    latent = np.stack([draw_alike(random, patient, 0.7) for _ in range(labels)], axis=1)
    truth: Array = latent >= np.sort(latent, axis=0)[-positives]
    return truth


def draw_scores(random: np.random.Generator, patient: Array, truth: Array, aurocs: tuple[float, float]) -> Array:
    """Scores [images, labels, 2] with two AUROCs, correlated within a patient, by labels and with each other."""
    shared = draw_alike(random, patient, ALIKE)[:, None, None]
    noise = 0.5**0.5 * shared + 0.5**0.5 * draw_alike(random, patient, ALIKE, (truth.shape[1], 2))
    scores: Array = noise + 2**0.5 * quantile(np.array(aurocs)) * truth[..., None]
    return scores


def resampled_auroc(score: Array, truth: Array, owners: Array, counts: Array) -> Array:
    """AUROC under weights [patients, R] by the matrix of wins: [R], NaN without a class."""
    positive, negative = score[truth][:, None], score[~truth]
    wins = (positive > negative) + 0.5 * (positive == negative)
    weights = counts[owners[truth]], counts[owners[~truth]]
    pairs = weights[0].sum(axis=0) * weights[1].sum(axis=0)
    won = np.einsum("nr,nr->r", wins.T @ weights[0], weights[1])
    areas: Array = np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)
    return areas


def resampled_auprc(score: Array, truth: Array, owners: Array, counts: Array) -> Array:
    """AUPRC under weights [patients, R], of scores without ties: [R], NaN without a positive."""
    order = np.argsort(-score)
    weights = counts[owners[order]]
    hits = np.cumsum(weights * truth[order, None], axis=0)
    precision = hits / np.maximum(np.cumsum(weights, axis=0), 1)
    total = np.where(hits[-1] > 0, hits[-1], np.nan)
    areas: Array = np.einsum("nr,nr->r", weights * truth[order, None], precision) / total
    return areas


def true_auprc(auroc: float, share: float) -> float:
    """The AUPRC of normal scores with an AUROC, of any number of images of which a share is positive."""
    recall = (np.arange(20_000) + 0.5) / 20_000
    alarms = ndtr(quantile(recall) - 2**0.5 * quantile(auroc))
    return float((share * recall / (share * recall + (1 - share) * alarms)).mean())


def percentile(values: Array) -> tuple[float, float]:
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def cover(
    title: str,
    settings: Iterable[tuple[Any, ...]],
    simulate: Callable[..., dict[str, Interval]],
    replicates: int,
    seed: int,
) -> None:
    """Print, for each setting, how often the intervals of `simulate` contain the true value (median width)."""
    print(f"\n{title}: share of 95 % intervals that contain the true value (median width)")
    for number, setting in enumerate(settings):
        randoms = (np.random.default_rng([seed, number, replicate]) for replicate in range(replicates))
        results = [simulate(random, *setting) for random in randoms]
        limits = np.array([[*result.values()] for result in results])  # [replicates, methods, 3]
        holds = ((limits[..., 0] <= limits[..., 2]) & (limits[..., 2] <= limits[..., 1])).mean(axis=0)
        width = np.median(limits[..., 1] - limits[..., 0], axis=0)
        cells = [f"{share:.3f} ({size:.2f})" for share, size in zip(holds, width, strict=True)]
        if not number:
            print("| setting |", " | ".join(results[0]), "|\n|---|" + "---:|" * len(cells))
        print(f"| {', '.join(map(str, setting))} |", " | ".join(cells), "|", flush=True)


def draw_counts(seed: int) -> Array:
    """How often each patient is in each resample: [patients, R]."""
    shares = np.full(PATIENTS, 1 / PATIENTS)
    return np.random.default_rng(seed).multinomial(PATIENTS, shares, RESAMPLES).T.astype(np.float32)


def compare_areas(replicates: int) -> None:
    """AUROC and AUPRC of one label, the means of five, and the differences of two networks, beside resampling."""
    counts = draw_counts(0)

    def simulate(random: np.random.Generator, positives: int, first: float, second: float) -> dict[str, Interval]:
        patient = draw_patients(random)
        truth = draw_truth(random, patient, positives, labels=5)
        scores, share = draw_scores(random, patient, truth, (first, second)), positives / len(patient)
        single, mean = np.eye(5)[0], np.full(5, 0.2)
        intervals: dict[str, Interval] = {}
        for metric, measure, resample, actual in (
            ("AUROC", measure_areas, resampled_auroc, (first, second)),
            ("AUPRC", measure_precision, resampled_auprc, [true_auprc(auroc, share) for auroc in (first, second)]),
        ):
            own, other = (measure(scores[..., run], truth, np.ones(truth.shape, bool), patient) for run in (0, 1))
            drawn = [
                resample(scores[:, label, run], truth[:, label], patient, counts)
                for run in (0, 1)
                for label in range(5)
            ]
            for name, weights in {
                metric: [single, 0 * single], f"{metric}, difference": [single, -single],
                f"{metric}, mean": [mean, 0 * mean], f"{metric}, mean's difference": [mean, -mean],
            }.items():  # fmt: skip
                weight = np.concatenate(weights)
                value = float(actual[0] + actual[1] * weights[1].sum())
                _, low, high = combine(own.join(other), weight).values()
                intervals[f"{name}: resampled"] = *percentile(weight @ np.array(drawn)), value
                intervals[name] = low, high, value
        return intervals

    pairs = ((0.7, 0.7), (0.85, 0.8), (0.95, 0.9))
    settings = [(positives, *pair) for positives, pair in product(POSITIVES, pairs)]
    cover("Positives and two AUROCs", settings, simulate, replicates, 0)


def compare_rates(replicates: int) -> None:
    def simulate(random: np.random.Generator, positives: int, true: float) -> dict[str, Interval]:
        patient = draw_patients(random)
        chosen = draw_truth(random, patient, positives)[:, 0]
        called = (draw_alike(random, patient, ALIKE) < quantile(true))[chosen]
        limits = {"Wilson": wilson_limits(called, np.arange(positives)), "ours": wilson_limits(called, patient[chosen])}
        return {name: (*map(float, limit.values()), true) for name, limit in limits.items()}  # type: ignore[misc]

    cover("Positives and sensitivity", product(POSITIVES, (0.5, 0.8, 0.95)), simulate, replicates, 2)


def compare_few(replicates: int) -> None:
    def simulate(random: np.random.Generator, sick: int, images: int) -> dict[str, Interval]:
        owner = np.concatenate([np.repeat(np.arange(sick), images), np.arange(sick, sick + 300)])
        truth = (owner < sick)[:, None]
        own, rest = random.normal(size=sick + 300)[owner], random.normal(size=len(owner))
        score = 0.6**0.5 * own + 0.4**0.5 * rest + 2**0.5 * quantile(0.8) * truth[:, 0]
        areas = measure_areas(score[:, None], truth.astype(float), np.ones(truth.shape, bool), owner)
        return {"AUROC .8": (areas.low[0], areas.high[0], 0.8)}

    settings = ((2, 15), (3, 10), (5, 6), (10, 3), (30, 1))
    cover("Patients of a class, with images each, beside 300 others", settings, simulate, replicates, 3)


def as_scored(score: Array, truth: Array, random: np.random.Generator) -> Scored:
    """Scores [n, L] of one image a patient, with groups drawn at random."""
    rows = np.arange(len(score))
    ranks = (np.argsort(np.argsort(score, axis=0), axis=0) + 0.5) / len(score)
    groups = random.choice(["Female", "Male"], len(rows)), random.integers(20, 95, len(rows))
    projection = random.choice(["AP", "PA"], len(rows))
    return Scored(ranks, truth * 1.0, np.ones(truth.shape, bool), rows, rows, *groups, projection)


def count_verdicts(replicates: int) -> None:
    print("\nVerdicts: cleared, condemned, either in part or undecided")
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
        wide += any(limits["low"] > 0 for group in groups.values() for limits in group["tpr_gap_limits"].values())
    print(f"\nA fair network with some significant gap of sensitivity between groups: {wide / replicates:.0%}")


PARTS: dict[str, Callable[[int], None]] = {
    "areas": compare_areas, "rates": compare_rates, "few": compare_few, "verdicts": count_verdicts, "gaps": count_gaps,
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
