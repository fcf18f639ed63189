"""Time to AUROC: minutes from CSV and JPEGs to a dev macro AUROC, beside two usual ways to feed the same training.

    make bench-auroc                                                       20,000 drawn films to .90
    .venv/bin/python -m benchmarks.auroc --images 600 --target 0.55        a minute, to see it work

All train the same network from the same films and first weights on two cores, with the trainer's augmentation, loss,
optimizer, schedule and averaged weights, and score the same patients at the same steps; only the way from files to
batches differs. The clock runs from before the imports until dev's mean over the labels with ten positives reaches
the target. `preparing` is all before the first batch (shards for ours, tars for webdataset, imports for all),
`waiting` is for batches, and `scoring` includes reading dev. Each turn is a fresh process, contestants take turns,
and figures are medians over seeds. Uncertain cells are zeros in training, and left out on dev.
"""

import copy
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import nn

from model.augment import augment
from model.losses import MaskedLoss
from model.networks import build_network
from model.optim import build_optimizer, scheduled_lr, set_lr, update_average
from model.predict import predict_scores
from pipeline import open_shards
from pipeline.labels import LABELS, hash_fraction
from pipeline.measure.delong import report_auroc
from pipeline.synthetic.sample import write_sample

DEV, WORKERS = 0.1, 2  # share of the patients; threads or processes
MEAN, STD = 110.0, 64.0  # about those of the films, in gray levels
BATCH, LR, CLIP_NORM, EMA = 32, 2e-3, 1.0, 0.999  # as the trainer has them
# Forked, as a program of its own would have them on Linux; this one's turns are spawned, which children inherit.
PROCESSES: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True, "multiprocessing_context": "fork"}

Batches = Iterable[tuple[Any, Any, Any]]  # images [B, 1, H, W] in gray levels, target and mask [B, 14]
Read = Callable[[str, int], Batches]  # split, epoch → a pass; train's are shuffled, and without a last part


class Setting(NamedTuple):
    """What the contestants share."""

    size: int
    epochs: int
    every: int  # steps from one scoring of dev to the next
    target: float


class Result(NamedTuple):
    """Minutes by what they went to, steps, and the AUROC of dev at the end."""

    preparing: float
    waiting: float
    network: float
    scoring: float
    steps: int
    auroc: float


def ours(source: Path, work: Path, setting: Setting) -> Read:
    """`pipeline shards` and the stream."""
    pipeline = Path(sys.executable).with_name("pipeline")
    command = [pipeline, "shards", source, work / "shards", "--size", setting.size, "--dev", DEV]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    shards = open_shards(work / "shards")

    def read(split: str, epoch: int) -> Batches:
        at, uncertain = (epoch, "zeros") if split == "train" else (None, "ignore")
        stream = shards[split].batches(BATCH, setting.size, epoch=at, uncertain=uncertain)
        return ((batch.images, batch.target, batch.mask) for batch in stream)

    return read


def torchxrayvision(source: Path, work: Path, setting: Setting) -> Read:
    """Its CheXpert in torch's DataLoader, resized by OpenCV: three times as fast as its default."""
    # Its networks, which it imports too, take the name `model` for themselves.
    sys.modules.setdefault("torchxrayvision.baseline_models", ModuleType("unused"))
    import torchxrayvision as xrv
    from torch.utils.data import DataLoader

    loaders, states = {}, {}
    for split in ("train", "dev"):
        films = xrv.datasets.CheX_Dataset(
            str(source),
            str(source / f"train-{split}.csv"),
            views=["PA", "AP"],
            transform=xrv.datasets.XRayResizer(setting.size, engine="cv2"),
            unique_patients=False,
        )
        # Its own labels leave out No Finding, and change the others by it.
        states[split] = torch.tensor([states_of(row) for row in read_rows(source / f"train-{split}.csv")])
        how: dict[str, Any] = {"shuffle": split == "train", "drop_last": split == "train"}
        loaders[split] = DataLoader(films, BATCH, **PROCESSES, **how)

    def read(split: str, epoch: int) -> Batches:
        for batch in loaders[split]:
            yield ((batch["img"] + 1024) * (255 / 2048), *with_mask(states[split][batch["idx"]], split))

    return read


def webdataset(source: Path, work: Path, setting: Setting) -> Read:
    """Tars by its writer, read as most examples do: Pillow in RGB, torchvision's transforms, float32."""
    import webdataset as wds
    from torchvision.transforms import v2

    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([v2.Grayscale(), v2.Resize((setting.size, setting.size)), *to_float])
    loaders = {}
    for split, shuffled in (("train", True), ("dev", False)):
        with wds.ShardWriter(str(work / f"{split}-%06d.tar"), maxcount=1000, verbose=0) as writer:
            for row in read_rows(source / f"train-{split}.csv"):
                film = source.parent / row["Path"]
                key = "_".join((*film.parts[-3:-1], film.stem))
                writer.write({"__key__": key, "jpg": film.read_bytes(), "json": states_of(row)})
        files = sorted(map(str, work.glob(f"{split}-*.tar")))
        films = wds.WebDataset(files, shardshuffle=100 if shuffled else False, empty_check=False)
        films = (films.shuffle(1000) if shuffled else films).decode("pil").to_tuple("jpg", "json")
        batches = films.map_tuple(transform, torch.tensor).batched(BATCH, partial=not shuffled)
        loaders[split] = wds.WebLoader(batches, batch_size=None, **PROCESSES)

    def read(split: str, epoch: int) -> Batches:
        for images, states in loaders[split]:
            yield (images * 255, *with_mask(states, split))

    return read


CONTESTANTS = {"ours": ours, "torchxrayvision + DataLoader": torchxrayvision, "webdataset, usual recipe": webdataset}


def with_mask(states: torch.Tensor, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and mask: uncertain is 0 on train, and left out on dev."""
    return (states == 1).float(), (states != -1) | (split == "train")


def states_of(row: Mapping[str, str]) -> list[float]:
    """1, 0, -1, and 0 where blank."""
    return [float(row[label] or 0) for label in LABELS]


def read_rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def list_films(source: Path) -> int:
    """Write the frontals of our train and dev as CSVs, for those who split nothing; the number in train."""
    rows = [row for row in read_rows(source / "train.csv") if row["Frontal/Lateral"] == "Frontal"]
    parts: dict[str, list[dict[str, str]]] = {"train": [], "dev": []}
    for row in rows:
        is_dev = hash_fraction("dev", 0, row["Path"].split("/")[-3]) < DEV
        parts["dev" if is_dev else "train"].append(row)
    for split, of_split in parts.items():
        with (source / f"train-{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(of_split)
    return len(parts["train"])


def train(name: str, source: Path, setting: Setting, seed: int, films: int, started: float) -> Result:
    """Train until the target is reached, or to the end of the schedule."""
    torch.manual_seed(seed)
    network = build_network("rescnn", len(LABELS)).to(memory_format=torch.channels_last)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer, loss = build_optimizer(network, LR, 1e-2), MaskedLoss([], None)
    steps = films // BATCH
    total = setting.epochs * steps
    waiting, scoring, auroc, step = 0.0, 0.0, 0.0, 0
    with tempfile.TemporaryDirectory(dir=source.parent) as work:
        read = CONTESTANTS[name](source, Path(work), setting)
        began = time.time()

        def without_end() -> Iterator[tuple[Any, Any, Any]]:
            for epoch in range(2 * setting.epochs):  # webdataset's passes lose a part of a batch a worker
                yield from read("train", epoch)

        batches = without_end()
        while step < total and auroc < setting.target:
            asked = time.time()
            images, target, mask = map(torch.as_tensor, next(batches))
            waiting += time.time() - asked
            set_lr(optimizer, scheduled_lr(LR, step, total))
            inputs = augment(images, MEAN, STD, (seed, *divmod(step, steps)))
            logits = network(inputs.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            loss(logits, target, mask).backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
            optimizer.step()
            update_average(average, network, EMA, step)
            step += 1
            if step % setting.every == 0 or step == total:
                asked = time.time()
                auroc = score(average, read("dev", 0))
                scoring += time.time() - asked
        network_time = time.time() - began - waiting - scoring
        return Result((began - started) / 60, waiting / 60, network_time / 60, scoring / 60, step, auroc)


def score(network: nn.Module, dev: Batches) -> float:
    """Mean AUROC of the labels with ten positives, or 0 where there is none."""
    images, target, mask = zip(*(map(torch.as_tensor, batch) for batch in dev), strict=True)
    scores = predict_scores(network, list(range(len(LABELS))), zip(images), MEAN, STD, torch.float32)
    cells = torch.cat(target).numpy(), torch.cat(mask).numpy()
    report = report_auroc(LABELS, scores, *cells, np.arange(len(scores)))
    return report["macro10_auroc"] or 0.0


def describe(results: Mapping[str, Sequence[Result]], target: float) -> Iterator[str]:
    """The table's lines, medians over seeds; where one did not reach the target, the least AUROC."""
    minutes = {name: [sum(result[:4]) for result in of_name] for name, of_name in results.items()}
    for name, of_name in results.items():
        parts = [statistics.median(part) for part in zip(*of_name, strict=True)]
        ratio = statistics.median(b / a for a, b in zip(minutes["ours"], minutes[name], strict=True))
        spent = zip(("preparing", "waiting", "network", "scoring"), parts, strict=False)
        least = min(result.auroc for result in of_name)
        yield (
            f"  {name:28} {statistics.median(minutes[name]):6.2f} min   "
            + "".join(f"{what} {part:5.2f}   " for what, part in spent)
            + f"{parts[4]:,.0f} steps   {ratio:.2f} × ours"
            + (f"   ONLY {least:.3f}" if least < target else "")
        )


@click.command()
@click.option("--images", default=20_000, show_default=True, help="Films to draw; not on the clock.")
@click.option("--seeds", default=1, show_default=True, help="Rounds, each with other first weights.")
@click.option("--target", default=0.9, show_default=True, help="Dev macro AUROC, of labels with 10 positives.")
@click.option("--size", default=96, show_default=True, help="Pixels of a side.")
@click.option("--epochs", default=10, show_default=True, help="Length of the schedule.")
@click.option("--every", default=100, show_default=True, help="Steps from one scoring of dev to the next.")
def main(images: int, seeds: int, target: float, **setting: Any) -> None:
    """Print minutes to the target, and what they went to."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as folder:
        source = write_sample(Path(folder), images=images, workers=WORKERS)
        films = list_films(source)
        print(f"{films:,} films of {setting['size']} pixels to dev macro AUROC {target:g}, {seeds} rounds", flush=True)
        results: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
        for seed in range(seeds):
            for name, of_name in results.items():
                task = (name, source, Setting(target=target, **setting), seed, films, time.time())
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    of_name.append(fresh.submit(train, *task).result())
        print("\n".join(describe(results, target)))


if __name__ == "__main__":
    main()
