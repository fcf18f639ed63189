"""Does a run tell a label by the film's look? AUROC on dev as it is, and with looks swapped between the classes.

    python benchmarks/swap.py --shards shards/nih --label Pneumonia runs/nih-*

Each film of dev gets the histogram and the mean power at each spatial frequency of a random film of the other class:
what is left to tell the classes is where things are in the film. It needs no films but the training set's own, so
settings can be chosen by it.
"""

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from model.predict import predict_scores
from model.runs.config import read_config
from model.runs.folder import load_best
from pipeline import open_shards
from pipeline.labels import LABELS

Films = npt.NDArray[np.uint8]


def swap_looks(films: Films, positive: npt.NDArray[np.bool_], seed: int) -> Films:
    """Films [N, 1, H, W], each with the look of a random one of the other class."""
    random = np.random.default_rng(seed)
    height, width = films.shape[2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    band = (frequency * height).astype(np.int64)
    swapped = np.empty_like(films)
    for place, film in enumerate(films[:, 0]):
        other = films[random.choice(np.flatnonzero(positive != positive[place])), 0]
        waves, wanted = (np.fft.rfft2(one - one.mean()) for one in (film, other))
        power, target = (np.bincount(band.ravel(), (abs(one) ** 2).ravel()) for one in (waves, wanted))
        gain = np.sqrt(target / np.maximum(power, 1e-12))
        ranks = np.fft.irfft2(waves * gain[band], s=(height, width)).ravel().argsort(kind="stable")
        levels = np.empty(height * width, np.uint8)
        levels[ranks] = np.sort(other.ravel())
        swapped[place, 0] = levels.reshape(height, width)
    return swapped


def in_parts(films: Films) -> Iterator[tuple[Tensor]]:
    """What `predict_scores` takes of films."""
    return ((torch.from_numpy(films[at : at + 64]),) for at in range(0, len(films), 64))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--shards", required=True)
@click.option("--label", default="Pneumonia", show_default=True, type=click.Choice(LABELS))
@click.option("--draws", default=3, show_default=True, help="Times that the looks are swapped.")
def main(runs: tuple[Path, ...], shards: str, label: str, draws: int) -> None:
    """Print both AUROCs of LABEL on dev for each of RUNS."""
    column = LABELS.index(label)
    for run in runs:
        config = read_config(run)
        network, best = load_best(run, config, torch.device("cpu"))
        batches = list(open_shards(shards)["dev"].batches(64, config.image_size, epoch=None))
        films, target, mask = (
            np.concatenate([getattr(batch, name) for batch in batches])
            for name in ("images", "target", "mask")
        )
        known = mask[:, column]
        films, positive, pixels = films[known], target[known, column] > 0.5, best["pixels"]
        seen = [films, *(swap_looks(films, positive, seed) for seed in range(draws))]
        found = [
            predict_scores(network, [column], in_parts(one), pixels["mean"], pixels["std"], torch.float32)
            for one in seen
        ]
        auroc, *swapped = (float(roc_auc_score(positive, scores[:, 0])) for scores in found)
        print(f"{run}: {label} {auroc:.3f}, looks swapped {np.mean(swapped):.3f}")


if __name__ == "__main__":
    main()
