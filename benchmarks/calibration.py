"""Calibration of finished runs on valid: raw, with what was fitted to dev, and with other fits to dev.

    OMP_NUM_THREADS=1 nice python -m benchmarks.calibration shards/sample runs/plain runs/pos-weight

ECE and Brier are means over labels, slope and intercept medians over them, of the logistic regression of the truth on
the logit of the score (1 and 0 are perfect). `less raw` is the mean over labels of ECE less the raw one, with its
interval from resamples of patients.
"""

from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from model.runs.config import read_config
from model.runs.scores import read_scores
from pipeline.manifest import read_manifest
from pipeline.measure.bootstrap import draw_counts
from pipeline.measure.calibration import SMALLEST, apply_calibration, choose_fit, fit_logistic
from pipeline.measure.metrics import BINS
from pipeline.policies import check_blank_policy, evaluation_targets
from pipeline.stream.samples import open_split

Array = npt.NDArray[np.float64]
RESAMPLES = 500


def logits_of(score: Array) -> Array:
    inside = np.clip(score.astype(float), SMALLEST, 1 - SMALLEST)
    return np.log(inside / (1 - inside))


def fit_temperature(logits: Array, truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The temperature alone, over a grid."""
    slopes = np.geomspace(0.05, 20, 400)
    signs = np.where(truth, -1, 1)
    return float(min(slopes, key=lambda slope: np.logaddexp(0, signs * slope * logits).sum())), 0.0


def fit_bias(logits: Array, truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The bias alone, by bisection of the mean score."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        below = (1 / (1 + np.exp(-logits - middle))).mean() < truth.mean()
        low, high = (middle, high) if below else (low, middle)
    return 1.0, low


def fit_platt(logits: Array, truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Platt's: both classes' targets smoothed, which is a weight for each cell in both classes."""
    positives, negatives = truth.sum(), (~truth).sum()
    target = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    fit = LogisticRegression(C=np.inf).fit(
        np.tile(logits, 2)[:, None], np.repeat([1, 0], len(truth)), np.concatenate([target, 1 - target])
    )
    return float(fit.coef_[0, 0]), float(fit.intercept_[0])


def errors(score: Array, truth: npt.NDArray[np.bool_], weights: Array) -> Array:
    """ECE under each column of weights [n, R]: [R]."""
    bins = np.searchsorted(np.arange(1, BINS) / BINS, score)
    gaps = np.zeros((BINS, weights.shape[1]))
    np.add.at(gaps, bins, (score - truth)[:, None] * weights)
    found: Array = np.abs(gaps).sum(axis=0) / weights.sum(axis=0)
    return found


@click.command()
@click.argument("shards", type=click.Path(path_type=Path, exists=True))
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(shards: Path, runs: tuple[Path, ...]) -> None:
    """Print a table of RUNS, which have scored dev and valid of SHARDS."""
    manifest = read_manifest(shards)
    blank = check_blank_policy(manifest.policies["blank"])
    print("| run | fit | ECE | less raw [95 %] | Brier | slope | intercept |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for run in runs:
        names = list(read_config(run).labels)
        parts = {}
        for split in ("dev", "valid"):
            table = open_split(shards, manifest, split).table
            target, mask = evaluation_targets(table, blank)
            keys = table["key"]
            chosen = np.isin(keys.to_numpy(), _keys(run / f"scores-{split}.arrow"))
            scores = read_scores(run / f"scores-{split}.arrow", keys.filter(chosen), names)
            parts[split] = scores, target[chosen] == 1, mask[chosen], table["patient"].to_numpy()[chosen]
        (scores, truth, mask, patient), (others, theirs, masked, clients) = parts["dev"], parts["valid"]
        found: dict[str, list[tuple[Array, npt.NDArray[np.bool_], Array]]] = {}
        owners = np.unique(clients, return_inverse=True)[1]
        counts = next(draw_counts(owners.max() + 1, RESAMPLES, RESAMPLES, 0)).astype(float)
        counts[:, 0] = 1  # the figure itself
        for column in range(len(names)):
            used, kept = mask[:, column], masked[:, column]
            score, called = scores[used, column].astype(float), truth[used, column]
            logits, other = logits_of(score), others[kept, column].astype(float)
            ours, _ = choose_fit(score, called, patient[used])
            fits = {
                "raw": (1.0, 0.0),
                "temperature": fit_temperature(logits, called),
                "bias": fit_bias(logits, called),
                "Platt": fit_platt(logits, called),
                "both, prior": fit_logistic(logits, called),
                "**ours**: that or none": ours or (1.0, 0.0),
            }
            for name, (slope, bias) in fits.items():
                calibrated = apply_calibration(other, {"temperature": 1 / slope, "bias": bias})
                found.setdefault(name, []).append((calibrated, theirs[kept, column], counts[owners[kept]]))
        eces = {name: np.mean([errors(*cells) for cells in labels], axis=0) for name, labels in found.items()}
        for name, labels in found.items():
            brier = np.mean([np.mean((score - called) ** 2) for score, called, _ in labels])
            lines = [
                LogisticRegression(C=np.inf).fit(logits_of(score)[:, None], called)
                for score, called, _ in labels
            ]
            slope = np.median([line.coef_[0, 0] for line in lines])
            intercept = np.median([line.intercept_[0] for line in lines])
            less = eces[name] - eces["raw"]
            low, high = np.percentile(less[1:], (2.5, 97.5))
            print(
                f"| {run.name} | {name} | {eces[name][0]:.3f} | {less[0]:+.3f} [{low:+.3f}, {high:+.3f}] "
                f"| {brier:.4f} | {slope:.2f} | {intercept:+.2f} |"
            )


def _keys(path: Path) -> npt.NDArray[np.str_]:
    import pyarrow as pa

    with pa.ipc.open_file(path) as file:
        keys: npt.NDArray[np.str_] = file.read_all()["key"].to_numpy()
    return keys


if __name__ == "__main__":
    main()
