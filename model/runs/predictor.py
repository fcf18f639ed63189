"""The networks of a run or an ensemble, with everything needed to score images.

predictor = open_predictor([Path("runs/first")])
predictor.score(run, "valid").images.scores                        # [N, L] of a split of the run's shards
predictor.score_files([[Path("image.png")]], workers=4)            # [1, L] of files, and the unreadable ones
predictor.decide("youden")                                         # calibration and thresholds

An ensemble's score is the mean of its members' calibrated scores. Its folder resembles a run's: ensemble.json lists the
members with the sha256 of their evaluated weights; calibration.json, evaluation-*.json, scores-*.arrow and
report-*.html are as in a run's folder.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from model.checkpoint import load_checkpoint, refused
from model.networks import build_network
from model.predict import choose_precision, find_device, network_inputs, predict_scores
from model.ranks import ALONE, Ranks, requested
from model.runs.config import ENSEMBLE, Config, Setup, learned_columns, name_outputs, read_config, read_members
from model.runs.folder import fuse
from model.runs.overlap import Seen, check_seen, report_seen
from model.runs.run import Run, Selected, open_rows, read_batches
from model.runs.views import read_view
from pipeline.base.errors import DataError
from pipeline.base.files import hash_file, read_object, sync_folder, write_json
from pipeline.console import Advance, progress_bar, say
from pipeline.images import ImageOptions
from pipeline.labels import LABELS
from pipeline.measure.calibration import RULES, Calibration, apply_calibration, apply_calibrations
from pipeline.measure.evaluate import Scored, calibrate, study_level
from pipeline.measure.metrics import Floats
from pipeline.stream.batches import choose_usable
from pipeline.stream.plan import Samples, plan_evaluation

EVALUATION_BATCH = 64  # images
Alteration = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]  # of images [N, 1, H, W]
Unreadable = list[tuple[Path, str]]  # files, with the reason
# Settings that members must share, and their options: otherwise their scores are not comparable.
SAME = {"unit": "fusion", "manifest": "shards", "dev": "dev"} | {
    name: name for name in ("labels", "blank", "where", "views")
}


class Result(NamedTuple):
    """Scores of a split, the rows of its table, and its overlap with the training data.

    `members` maps the folders of an ensemble's members to their calibrated scores [N, L].
    """

    images: Scored
    table: pa.Table
    shared: Mapping[str, int]
    members: Mapping[str, Floats]


class Decision(NamedTuple):
    """How scores are used: `calibration` by label, and thresholds `limits` [L] of raw scores (nan: undecided)."""

    calibration: Mapping[str, Calibration] | None
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
    calibration: Mapping[str, Calibration] | None

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
        several = len(self.configs) > 1  # members of an ensemble, whose calibrated scores are averaged
        networks = []
        for folder, config in self.configs.items():
            fit = read_calibration(folder, config.labels)["image"] if several else None
            networks.append(load_network(folder, config, fit, self.ranks))
        return networks

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
                chosen = replace(chosen, samples=Samples(thinned, []))  # whose table order needs no sizes of shards
            images, table = score_split(own, member.network, chosen, member.pixels, alter)
            scores[str(member.folder)] = member.calibrate(images.scores)
        mean = np.mean(list(scores.values()), axis=0)
        known = [key for key in counts[0] if all(key in count for count in counts)]
        shared = {key: max(count[key] for count in counts) for key in known}
        return Result(images._replace(scores=mean), table, shared, scores if len(scores) > 1 else {})

    def score_files(
        self, samples: Sequence[Sequence[Path]], workers: int, combine: str = "max"
    ) -> tuple[Floats, Unreadable]:
        """Scores [N, L] of samples, each the image files of a study or a single file; and unusable files.

        A run on images scores each image, and `combine` computes a study's score. NaN if none of a sample's files can
        be read. Images are resized, encoded and decoded as they would be in shards. Reports how many of them the
        weights were trained on.
        """
        by_image = self.config.fusion is None
        scored = [[file] for files in samples for file in files] if by_image else samples
        parts = [(member, *_score_files(member, scored, workers)) for member in self.members]
        scores = np.mean([member.calibrate(own) for member, own, _ in parts], axis=0)
        if by_image:
            study = np.repeat(np.arange(len(samples)), list(map(len, samples)))
            nothing = np.zeros((4, len(study)), np.int64)
            rows = study_level(Scored(scores, scores, ~np.isnan(scores), study, *nothing), combine)
            scores = np.where(rows.mask, rows.scores, np.nan)
        return scores, parts[0][2]

    def decide(self, threshold: str, level: str = "image") -> Decision:
        """The calibration of scores at a level, and their thresholds by a rule.

        Reports labels without scores, because they were not learned. Raises DataError if there is no calibration.
        """
        if lacking := [label for label in LABELS if label not in self.config.labels]:
            say(f"{self.name}: no scores of {', '.join(lacking)}: not learned")
        if self.folder is None:
            if threshold != "none" or level == "study":
                option = "threshold" if level == "image" else "group_by"
                runs = " ".join(f"--run {folder}" for folder in self.configs)
                command = f"python -m train evaluate {runs} --out FOLDER"
                raise DataError(f"`{option}` needs an ensemble's folder; first run: {command}; then `run` FOLDER")
            return Decision(None, [], threshold)
        document = read_calibration(self.folder, self.config.labels, level)
        chosen, combine = document[level], document["combine"]
        if threshold == "none":
            return Decision(chosen, [], threshold, combine)
        limits = {label: chosen[label]["thresholds"][threshold] for label in self.config.labels}
        if without := [label for label, limit in limits.items() if limit is None]:
            say(f"{self.folder}: no decisions on {', '.join(without)}: one class in dev")
        rule = f"sensitivity>={document['sensitivity']:g}" if threshold == "sensitivity" else threshold
        values = [np.nan if limit is None else limit for limit in limits.values()]
        return Decision(chosen, values, rule, combine)

    def calibrate(
        self, run: Run, sensitivity: float = 0.9, combine: str = "max", dev: Scored | None = None
    ) -> dict[str, Any]:
        """The calibration for these settings, computed on dev if missing; `dev` are the scores, if known.

        Raises DataError if thresholds would have to be chosen on other shards than the run's.
        """
        path = run.folder / "calibration.json"
        chosen = {"sensitivity": sensitivity, "combine": combine}
        calibration = read_object(path) if path.exists() else {}
        if chosen.items() <= calibration.items():
            return calibration
        if run.shards.digest != run.config.manifest:  # their dev may have patients of the run's train
            command = f"python -m train evaluate --run {run.folder} --sensitivity {sensitivity} --study {combine}"
            raise DataError(
                f"{run.shards}: thresholds are chosen on dev of the shards that {run.folder} was trained on; "
                f"first run: {command} with those"
            )
        dev = self.score(run, "dev").images if dev is None else dev
        calibration = calibrate(run.config.labels, dev, sensitivity, combine)
        write_json(path, calibration)
        return calibration


def score_as(run: Run, folder: Path, config: Config) -> Run:
    """The run in a folder, to score the images of another."""
    chosen = {name: getattr(run.config, name) for name in ("where", "views", "limit", "max_bad", "dev", "seed")}
    return replace(run, folder=folder, config=replace(config, **chosen))


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
            value, other_value = getattr(config, field), getattr(other, field)
            if value != other_value:
                raise DataError(f"{first} and {member} make no ensemble: `{option}` is {value} and {other_value}")
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


def read_calibration(folder: Path, labels: Sequence[str], level: str = "image") -> dict[str, Any]:
    """A run's calibration, checked at a level. Raises DataError; if it is missing, with the command that makes it."""
    path = folder / "calibration.json"
    if not path.exists():
        raise DataError(f"{folder}: no {path.name}; first run: python -m train evaluate --run {folder}")
    document = read_object(path)
    try:
        for fit in (document[level][label] for label in labels):
            apply_calibration(np.zeros(1), fit)
            [fit["thresholds"][rule] for rule in RULES] + [f"{document['sensitivity']:g}", document["combine"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged, or for other labels than the run's: {error}") from error
    return document


def load_network(
    folder: Path, config: Config, calibration: Mapping[str, Calibration] | None = None, ranks: Ranks = ALONE
) -> Network:
    """The network of a run, on the GPU if there is one. Raises CheckpointError."""
    best = load_checkpoint(folder / "best.pt", ranks)
    network = fuse(build_network(config.arch, len(name_outputs(config)), config.shape), config)
    with refused(folder / "best.pt"):
        network.load_state_dict(best["weights"])
        pixels = {name: float(best["pixels"][name]) for name in ("mean", "std")}
        if not pixels["std"] > 0:
            raise ValueError("pixels")
        about = (pixels, ImageOptions(**best["images"]), best["seen"], best["dataset"], calibration)
    network = network.to(find_device()).to(memory_format=torch.channels_last)
    return Network(folder, config, network, *about)


def score_split(
    run: Run, network: nn.Module, chosen: Selected, pixels: Mapping[str, float], alter: Alteration | None = None
) -> tuple[Scored, pa.Table]:
    """A network's scores of the chosen rows, with targets and masks that exclude uncertain cells; and the table rows.

    Excludes unusable images, up to --max-bad. For a run on studies, the rows are those of the studies' first images.
    Each rank scores its share of the rows and gets all scores. `alter` changes the images of each batch.
    Raises Stopped.
    """
    config, split, rows = run.config, chosen.split, chosen.rows
    columns = learned_columns(config)
    plan = partial(plan_evaluation, chosen.samples, EVALUATION_BATCH, rank=run.ranks.rank, ranks=run.ranks.count)
    batches = read_batches(run, chosen, chosen.truth, plan)
    bad, scored = np.zeros(len(rows)), np.zeros(len(rows), bool)

    def samples(advance: Advance) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            if requested():
                return
            start = batch.step.step * EVALUATION_BATCH
            bad[[start + position for position in batch.bad]] = 1
            scored[start : start + len(batch.target)] = True
            images = batch.images if alter is None else alter(batch.images)
            yield network_inputs(run.device, config.fusion is not None, images, batch.present, batch.projection)
            advance(min(int(scored.sum()) * run.ranks.count, len(rows)), len(rows))

    with progress_bar(f"Scoring {split.name}", config.units) as advance:
        own_scores = predict_scores(network, columns, samples(advance), pixels["mean"], pixels["std"], run.precision)
    run.ranks.agree()
    scores = np.zeros((len(rows), len(columns)))
    scores[scored] = own_scores
    scores = run.ranks.sum(scores)
    chosen.bad.update(run.ranks.unite(chosen.bad.rows))
    usable = run.ranks.sum(bad) == 0
    rows = rows[usable]
    facts = split.table.take(rows)
    target, mask = (cells[rows][:, columns] for cells in chosen.truth)
    return Scored.of(scores[usable], target, mask, facts), facts


def _score_files(member: Network, samples: Sequence[Sequence[Path]], workers: int) -> tuple[Floats, Unreadable]:
    """As `Predictor.score_files`, for one network."""
    config = member.config
    device, precision = find_device(), choose_precision(config.amp)
    read = partial(read_view, config=config, options=member.images)
    bad: Unreadable = []
    contents: list[int] = []
    usable = np.ones(len(samples), bool)

    def batches(advance: Advance) -> Iterator[tuple[Tensor, ...]]:
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(samples), EVALUATION_BATCH):
                some = samples[start : start + EVALUATION_BATCH]
                files, sizes = list(chain(*some)), list(map(len, some))
                views = list(pool.map(read, files))
                bad.extend((file, view.fault) for file, view in zip(files, views, strict=True) if view.fault)
                contents.extend(view.content for view in views if not view.fault)
                sample = np.repeat(np.arange(len(some)), sizes)
                place = np.concatenate([np.arange(size) for size in sizes])
                kept, without = choose_usable(sample, place, np.array([not view.fault for view in views]))
                usable[[start + position for position in without]] = False
                present = np.zeros((len(some), max(sizes)), np.bool_)
                present[sample[kept], place[kept]] = True
                images = np.stack([view.pixels for view in views])[kept, None]
                projection = np.array([view.projection for view in views], np.int8)[kept]
                yield network_inputs(device, config.fusion is not None, images, present, projection)
                advance(start + len(some), len(samples))

    with progress_bar("Scoring", config.units) as advance:
        columns, scale = learned_columns(config), (member.pixels["mean"], member.pixels["std"])
        scores = predict_scores(member.network, columns, batches(advance), *scale, precision)
    scores[~usable] = np.nan
    report_seen(contents, member.seen, member.folder)
    return scores, bad
