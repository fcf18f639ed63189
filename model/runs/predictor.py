"""The networks of a run or an ensemble, with everything needed to score images.

predictor = open_predictor([Path("runs/first")])
predictor.score(run, "valid").images.scores                        # [N, L] of a split of the run's shards
predictor.score_files([[Path("image.png")]], workers=4)            # [1, L] of files, and the unreadable ones
predictor.decide("youden")                                         # calibration and thresholds

An ensemble's score is the mean of its members' calibrated scores. Its folder has what a run's has of an evaluation, and
ensemble.json, which lists the members with the sha256 of their evaluated weights.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from model.checkpoint import load_checkpoint, refused, save_checkpoint
from model.networks import build_network, freeze, load_initial
from model.predict import choose_precision, find_device, network_inputs, predict_scores
from model.ranks import ALONE, Ranks, requested
from model.runs.config import ENSEMBLE, Config, Setup, read_config, read_members
from model.runs.folder import describe_start, fuse
from model.runs.overlap import Seen, check_seen, report_seen
from model.runs.run import Run, Selected, open_rows, read_batches
from model.runs.views import read_view
from pipeline.base.errors import DataError
from pipeline.base.files import hash_file, read_object, sync_folder, write_json
from pipeline.console import progress_bar, say
from pipeline.images import Gray, ImageOptions
from pipeline.labels import LABELS
from pipeline.measure.calibration import RULES, Calibration, apply_calibration, apply_calibrations
from pipeline.measure.evaluate import Scored, calibrate, study_level
from pipeline.measure.metrics import Floats
from pipeline.stream.batches import choose_usable
from pipeline.stream.plan import Samples, plan_evaluation
from pipeline.stream.samples import OpenSplit

EVALUATION_BATCH = 64  # images
Alteration = Callable[[Gray], Gray]  # of images [N, 1, H, W]
Calibrations = Mapping[str, Calibration] | None  # by label
Files = Sequence[Sequence[Path]]  # of each sample
Unreadable = list[tuple[Path, str]]  # files, with the reason
# Settings that members must share, and their options: otherwise their scores are not comparable.
SAME = {"unit": "fusion", "manifest": "shards"} | {name: name for name in ("dev", "labels", "blank", "where", "views")}


class Result(NamedTuple):
    """Scores of a split."""

    split: OpenSplit
    images: Scored
    table: pa.Table  # the rows of its table
    shared: Mapping[str, int]  # overlap with the training data, by `check_seen`
    members: Mapping[str, Floats]  # calibrated scores [N, L] by an ensemble's members' folders


class Decision(NamedTuple):
    """How scores are used: calibration, and thresholds `limits` [L] of raw scores (nan: undecided)."""

    calibration: Calibrations
    limits: list[float]  # [] without a rule
    rule: str
    combine: str = "max"  # how a study's score is computed from its views

    def apply(self, labels: Sequence[str], scores: Floats) -> tuple[Floats, Floats]:
        """Calibrated scores [N, L], and decisions by raw scores: 1, 0, or NaN; [N, 0] without a rule."""
        limits = np.array(self.limits)
        raw = scores[:, : len(limits)]
        decided = np.where(np.isnan(raw) | np.isnan(limits), np.nan, raw >= limits)
        return scores if self.calibration is None else apply_calibrations(labels, scores, self.calibration), decided


class Network(NamedTuple):
    """A network with the contents of a run's best.pt; in an ensemble, also the run's calibration."""

    folder: Path
    config: Config
    network: nn.Module
    pixels: Mapping[str, float]  # mean and std of the input's gray levels
    images: ImageOptions  # how the shards' images were prepared
    seen: Seen
    dataset: Mapping[str, str]
    calibration: Calibrations = None

    def calibrate(self, scores: Floats) -> Floats:
        """The scores [N, L] to average in an ensemble; unchanged without a calibration."""
        return scores if self.calibration is None else apply_calibrations(self.config.labels, scores, self.calibration)


@dataclass(frozen=True)
class Predictor:
    """The networks of a run or an ensemble. Without a folder, an ensemble has no calibration or thresholds."""

    name: str
    folder: Path | None
    configs: Mapping[Path, Config]  # of the members, by folder
    ranks: Ranks = ALONE

    @property
    def config(self) -> Config:
        """The first member's configuration."""
        return next(iter(self.configs.values()))

    @cached_property
    def members(self) -> list[Network]:
        """The networks with their best weights. Raises CheckpointError, and DataError if a calibration is missing."""
        several = len(self.configs) > 1  # an ensemble averages calibrated scores
        fits = [read_calibration(*member)["image"] if several else None for member in self.configs.items()]
        networks = (load_network(*member, self.ranks) for member in self.configs.items())
        return [network._replace(calibration=fit) for network, fit in zip(networks, fits, strict=True)]

    def score(self, run: Run, name: str, alter: Alteration | None = None, most: float = math.inf) -> Result:
        """The scores of a split of the run's shards, under its conditions; `alter` changes the images first.

        If a split has more samples than `most`, scores every second, third, … Before scoring, raises DataError if the
        weights were trained on any of the images (`check_seen`). Raises CheckpointError and Stopped.
        """
        runs = [score_as(run, member.folder, member.config) for member in self.members]
        counts = [check_seen(own, name, member.seen) for own, member in zip(runs, self.members, strict=True)]
        scores: dict[str, Floats] = {}
        for member, own in zip(self.members, runs, strict=True):
            chosen = open_rows(own, name)
            if len(chosen.rows) > most:
                thinned = chosen.samples.rows[:: math.ceil(len(chosen.rows) / most)]
                chosen = chosen._replace(samples=Samples(thinned, []))  # whose table order needs no sizes of shards
            images, table = score_split(own, member.network, chosen, member.pixels, alter)
            scores[str(member.folder)] = member.calibrate(images.scores)
        mean = np.mean(list(scores.values()), axis=0)
        known = [key for key in counts[0] if all(key in count for count in counts)]
        shared = {key: max(count[key] for count in counts) for key in known}
        members = scores if len(scores) > 1 else {}
        return Result(chosen.split, images._replace(scores=mean), table, shared, members)

    def score_files(self, samples: Files, workers: int, combine: str = "max") -> tuple[Floats, Unreadable]:
        """Scores [N, L] of samples, each the image files of a study or a single file; and unusable files.

        A run on images scores each image, and `combine` computes a study's score. NaN if none of a sample's files can
        be read. Images are prepared as in shards. Reports how many of them the weights were trained on.
        """
        by_image = self.config.fusion is None
        scored = [[file] for file in chain(*samples)] if by_image else samples
        parts = [(member, *_score_files(member, scored, workers)) for member in self.members]
        scores = np.mean([member.calibrate(own) for member, own, _ in parts], axis=0)
        if by_image:
            study = np.repeat(np.arange(len(samples)), list(map(len, samples)))
            nothing = np.zeros((4, len(study)), np.int64)
            rows = study_level(Scored(scores, scores, ~np.isnan(scores), study, *nothing), combine)
            scores = np.where(rows.mask, rows.scores, np.nan)
        return scores, parts[0][2]

    def decide(self, threshold: str, level: str = "image") -> Decision:
        """The calibration of scores at a level, and their thresholds by a rule. Raises DataError if there is none."""
        if lacking := [label for label in LABELS if label not in self.config.labels]:
            say(f"{self.name}: no scores of {', '.join(lacking)}: not learned")
        if self.folder is None:
            if threshold != "none" or level == "study":
                option = "threshold" if level == "image" else "group_by"
                runs = " ".join(f"--run {folder}" for folder in self.configs)
                command = f"python -m train evaluate {runs} --out FOLDER"
                raise DataError(f"`{option}` needs an ensemble's folder; first run: {command}; then `run` FOLDER")
            return Decision(None, [], threshold)
        document = read_calibration(self.folder, self.config, level)
        labels = self.config.labels if threshold != "none" else ()
        limits = {label: document[level][label]["thresholds"][threshold] for label in labels}
        if without := [label for label, limit in limits.items() if limit is None]:
            say(f"{self.folder}: no decisions on {', '.join(without)}: one class in dev")
        values = [np.nan if limit is None else limit for limit in limits.values()]
        rule = threshold + (f">={document['sensitivity']:g}" if threshold == "sensitivity" else "")
        return Decision(document[level], values, rule, document["combine"])

    def calibrate(
        self, run: Run, sensitivity: float = 0.9, combine: str = "max", dev: Scored | None = None
    ) -> dict[str, Any]:
        """The calibration, computed on `dev` if it is missing. Raises DataError on other shards than the run's."""
        path = run.folder / "calibration.json"
        calibration = read_object(path) if path.exists() else {}
        if {"sensitivity": sensitivity, "combine": combine}.items() <= calibration.items():
            return calibration
        if run.shards.digest != run.config.manifest:  # their dev may have patients of the run's train
            first = f"python -m train evaluate --run {run.folder} --sensitivity {sensitivity} --study {combine}"
            how = f"thresholds are chosen on dev of the shards that {run.folder} was trained on; first run: {first}"
            raise DataError(f"{run.shards}: {how} with those")
        dev = self.score(run, "dev").images if dev is None else dev
        calibration = calibrate(run.config.labels, dev, sensitivity, combine)
        write_json(path, calibration)
        return calibration


def score_as(run: Run, folder: Path, config: Config) -> Run:
    """The run in a folder, to score the images of another."""
    same = ("where", "views", "limit", "max_bad", "blank", "dev", "seed")
    return replace(run, folder=folder, config=replace(config, **{name: getattr(run.config, name) for name in same}))


def of_run(run: Run) -> Predictor:
    """The predictor of a single run."""
    return Predictor(str(run.folder), run.folder, {run.folder: run.config}, run.ranks)


def open_predictor(runs: Sequence[Path]) -> Predictor:
    """The run or ensemble of --run. Raises DataError, with the option, for runs that cannot form an ensemble."""
    folder = runs[0] if len(runs) == 1 else None
    runs = runs if folder is None else read_members(folder)
    configs = {member: read_config(member) for member in runs}
    if len(configs) < len(runs):
        raise DataError("`run` names the same run twice")
    first, config = next(iter(configs.items()))
    # The seed decides which patients are held out as dev: with another seed, they are in train.
    same = SAME if config.dev is None else SAME | {"seed": "seed"}
    for member, other in configs.items():
        for field, option in same.items():
            values = getattr(config, field), getattr(other, field)
            if values[0] != values[1]:
                raise DataError(f"{first} and {member} make no ensemble: `{option}` is {values[0]} and {values[1]}")
    return Predictor(" + ".join(map(str, configs)) if folder is None else str(folder), folder, configs)


def open_scoring(predictor: Predictor, out: Path | None, setup: Setup) -> Run:
    """The run that scores shards, into the run's folder or, for an ensemble, `out` or a folder next to its members.

    Calibrates members that are not calibrated. Raises DataError if another run or ensemble uses the folder.
    """
    shards = setup.open()
    runs = [Run(config, shards, folder, setup) for folder, config in predictor.configs.items()]
    if len(runs) == 1:
        return runs[0]
    folder = predictor.folder or out or runs[0].folder.parent / "+".join(run.folder.name for run in runs)[:200]
    path = folder / ENSEMBLE
    best = {os.path.relpath(run.folder, folder): hash_file(run.folder / "best.pt") for run in runs}
    before = (read_object(path).get("members") or {}) if path.exists() else {}
    if (folder / "config.json").exists() or (before and set(before) != set(best)):
        raise DataError(f"{folder} is a run, or an ensemble of others; choose another `out`")
    if before != best:
        folder.mkdir(parents=True, exist_ok=True)
        forget_calibration(folder)
        write_json(path, {"members": best})
    for run in runs:
        if not (run.folder / "calibration.json").exists():
            of_run(run).calibrate(run)
    return replace(runs[0], folder=folder)


def forget_calibration(folder: Path) -> None:
    """Remove the calibration of weights, before they are replaced."""
    if (path := folder / "calibration.json").exists():
        path.unlink()
        sync_folder(folder)


def read_calibration(folder: Path, config: Config, level: str = "image") -> dict[str, Any]:
    """A run's calibration, checked at a level. Raises DataError; if it is missing, with the command that makes it."""
    path = folder / "calibration.json"
    if not path.exists():
        raise DataError(f"{folder}: no {path.name}; first run: python -m train evaluate --run {folder}")
    document = read_object(path)
    try:
        for fit in (document[level][label] for label in config.labels):
            apply_calibration(np.zeros(1), fit)
            [fit["thresholds"][rule] for rule in RULES] + [f"{document['sensitivity']:g}", document["combine"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged, or for other labels than the run's: {error}") from error
    return document


def save_best(run: Run, seen: Seen, weights: Mapping[str, Tensor], epoch: float, score: float) -> None:
    """Write best.pt: everything needed to score images, except the settings in config.json."""
    config, dataset = run.config, run.manifest.dataset
    images = {name: run.manifest.options[name] for name in ImageOptions._fields}
    title, terms = (dataset.get(name, "not stated") for name in ("title", "license"))
    use = "calibrated" if config.adopted else "trained"
    about = {"epoch": epoch, "dev_auroc": score, "images": images, "pixels": dict(run.pixels)}
    about |= {"dataset": dict(dataset), "equalize": config.equalize, "seen": list(seen)}
    about |= {"arch": config.arch, "image_size": config.image_size, "outputs": config.outputs}
    about["terms"] = f"{describe_start(asdict(config))}; {use} on {title}: {terms}"
    save_checkpoint(run.folder / "best.pt", {"weights": dict(weights), **about})


def start_network(run: Run, needed: Sequence[str] = ()) -> nn.Module:
    """The network that a run starts from. Raises CheckpointError if weights do not fit or lack a `needed` output."""
    config = run.config
    network = build_network(config.arch, len(config.outputs), config.shape, bool(config.pretrained))
    if run.start is not None:
        say(f"{run.start.path}: {load_initial(network, run.start, config.outputs, needed)}")
    return fuse(freeze(network) if config.freeze else network, config)


def load_network(folder: Path, config: Config, ranks: Ranks = ALONE) -> Network:
    """The network of a run, on the GPU if there is one. Raises CheckpointError."""
    best = load_checkpoint(folder / "best.pt", ranks)
    network = fuse(build_network(config.arch, len(config.outputs), config.shape), config)
    with refused(folder / "best.pt"):
        network.load_state_dict(best["weights"])
        pixels = {name: float(best["pixels"][name]) for name in ("mean", "std")}
        if not pixels["std"] > 0:
            raise ValueError("pixels")
        about = (pixels, ImageOptions(**best["images"]), best["seen"], best["dataset"])
    network = network.to(find_device()).to(memory_format=torch.channels_last)
    return Network(folder, config, network, *about)


def score_split(
    run: Run, network: nn.Module, chosen: Selected, pixels: Mapping[str, float], alter: Alteration | None = None
) -> tuple[Scored, pa.Table]:
    """A network's scores of the chosen rows, with targets and masks that exclude uncertain cells; and the table rows.

    Excludes unusable images, up to --max-bad. For a run on studies, the rows are those of the studies' first images.
    Each rank scores its share of the rows and gets all scores. `alter` changes the images first. Raises Stopped.
    """
    config, split, rows, ranks = run.config, chosen.split, chosen.rows, run.ranks
    columns, scale, done = config.columns, (pixels["mean"], pixels["std"]), 0
    plan = partial(plan_evaluation, chosen.samples, EVALUATION_BATCH, rank=ranks.rank, ranks=ranks.count)
    bad, scores = np.zeros(len(rows)), np.zeros((len(rows), len(columns)))
    with progress_bar(f"Scoring {split.name}", config.units) as advance:
        for batch in read_batches(run, chosen, chosen.truth, plan):
            if requested():
                break  # `agree` ends all ranks
            start = batch.step.step * EVALUATION_BATCH
            images = batch.images if alter is None else alter(batch.images)
            bad[[start + position for position in batch.bad]] = 1
            inputs = network_inputs(run.device, config.fusion is not None, images, batch.present, batch.projection)
            own = predict_scores(network, columns, [inputs], *scale, run.precision)
            scores[start : start + len(own)] = own
            done += len(batch.target)
            advance(min(done * ranks.count, len(rows)), len(rows))
    ranks.agree()
    chosen.bad.update(ranks.unite(chosen.bad.rows))
    scores, usable = ranks.sum(scores), ranks.sum(bad) == 0
    rows = rows[usable]
    facts = split.table.take(rows)
    target, mask = (cells[rows][:, columns] for cells in chosen.truth)
    return Scored.of(scores[usable], target, mask, facts), facts


def _score_files(member: Network, samples: Files, workers: int) -> tuple[Floats, Unreadable]:
    """As `Predictor.score_files`, for one network."""
    config, device, scale = member.config, find_device(), (member.pixels["mean"], member.pixels["std"])
    columns, precision = config.columns, choose_precision(config.amp)
    read = partial(read_view, config=config, options=member.images)
    scores = np.zeros((len(samples), len(columns)))
    bad: Unreadable = []
    contents: list[int] = []
    with ThreadPoolExecutor(workers) as pool, progress_bar("Scoring", config.units) as advance:
        for start in range(0, len(samples), EVALUATION_BATCH):
            some = samples[start : start + EVALUATION_BATCH]
            files, sizes = list(chain(*some)), list(map(len, some))
            views = list(pool.map(read, files))
            bad += [(file, view.fault) for file, view in zip(files, views, strict=True) if view.fault]
            contents += [view.content for view in views if not view.fault]
            sample, place = np.repeat(np.arange(len(some)), sizes), np.concatenate(list(map(np.arange, sizes)))
            kept, without = choose_usable(sample, place, np.array([not view.fault for view in views]))
            present = np.zeros((len(some), max(sizes)), np.bool_)
            present[sample[kept], place[kept]] = True
            images = np.stack([view.pixels for view in views])[kept, None]
            projection = np.array([view.projection for view in views], np.int8)[kept]
            inputs = network_inputs(device, config.fusion is not None, images, present, projection)
            own = predict_scores(member.network, columns, [inputs], *scale, precision)
            own[without] = np.nan
            scores[start : start + len(some)] = own
            advance(start + len(some), len(samples))
    report_seen(contents, member.seen, member.folder)
    return scores, bad
