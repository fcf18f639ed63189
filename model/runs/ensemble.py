"""Several runs as one: an ensemble, whose score is the mean of its members' calibrated scores.

It has a folder like a run's: ensemble.json names the members, with the sha256 of the weights that were evaluated;
calibration.json, evaluation-*.json, scores-*.arrow and report-*.html are as in a run's.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.runs.config import ENSEMBLE, Config, Setup, read_config, read_members
from model.runs.job import Job, MemberRun, StopFlag, choose_device
from model.runs.results import find_calibration, forget_calibration
from model.runs.scoring import Scores, score_files
from pipeline.base.errors import DataError
from pipeline.base.files import hash_file, read_object, write_json
from pipeline.console import say
from pipeline.measure.calibration import RULES, apply_calibration, apply_calibrations
from pipeline.stream.collection import Collection

# What members share, by the option that decides it: without, their scores are not of the same.
SAME = {"unit": "fusion", "manifest": "shards", "dev": "dev"} | {
    name: name for name in ("labels", "blank", "where", "views")
}


class Model(NamedTuple):
    """What scores: a run or an ensemble. Without a folder, nothing was chosen on dev for an ensemble as a whole."""

    name: str
    folder: Path | None
    members: dict[Path, Config]

    @property
    def config(self) -> Config:
        """The first member's."""
        return next(iter(self.members.values()))


class Decision(NamedTuple):
    """What becomes of scores: `calibration` by label, and `limits` [L] that they reach before it (nan: undecided)."""

    calibration: dict[str, Any] | None
    limits: list[float]  # [] without a rule
    rule: str
    combine: str = "max"  # how a study's score is computed from its views


def open_model(runs: Sequence[Path]) -> Model:
    """The run or the ensemble that --run names. Raises DataError, naming the option, for runs that make none."""
    folder = runs[0] if len(runs) == 1 else None
    runs = runs if folder is None else read_members(folder)
    members = {run: read_config(run) for run in runs}
    if len(members) < len(runs):
        raise DataError("`run` names the same run twice")
    first, config = next(iter(members.items()))
    # A dev that is held out is drawn by the seed: another seed's is in this one's train.
    same = SAME if config.dev is None else SAME | {"seed": "seed"}
    for run, other in members.items():
        for field, option in same.items():
            ours, theirs = getattr(config, field), getattr(other, field)
            if ours != theirs:
                raise DataError(f"{first} and {run} make no ensemble: `{option}` is {ours} and {theirs}")
    return Model(" + ".join(map(str, members)) if folder is None else str(folder), folder, members)


def open_scoring(model: Model, out: Path | None, shards: Collection, workers: int, stop: StopFlag) -> Job:
    """The job that scores a run, or an ensemble: into `out`, or else a folder beside its first member.

    Members get a calibration where they have none. Raises DataError for a folder that is another's.
    """
    jobs = [
        Job(config, shards, run, *choose_device(config.amp), Setup(workers=workers), stop)
        for run, config in model.members.items()
    ]
    if len(jobs) == 1:
        return jobs[0]
    folder = model.folder or out or jobs[0].run.parent / "+".join(job.run.name for job in jobs)[:200]
    path = folder / ENSEMBLE
    best = {os.path.relpath(job.run, folder): hash_file(job.run / "best.pt") for job in jobs}
    before = (read_object(path).get("members") or {}) if path.exists() else {}
    if (folder / "config.json").exists() or (before and set(before) != set(best)):
        raise DataError(f"{folder} is a run, or an ensemble of others; choose another `out`")
    if before != best:
        folder.mkdir(parents=True, exist_ok=True)
        forget_calibration(folder)
        write_json(path, {"members": best})
    members = []
    for job in jobs:
        if not (job.run / "calibration.json").exists():
            find_calibration(job, "dev", None, 0.9, "max")
        members.append(MemberRun(job, read_calibration(job.run, job.config.labels)["image"]))
    return replace(jobs[0], run=folder, members=tuple(members))


def read_calibration(run: Path, labels: Sequence[str], level: str = "image") -> dict[str, Any]:
    """What was chosen on dev for a run, checked at a level. Raises DataError, if it is missing with the command."""
    path = run / "calibration.json"
    if not path.exists():
        raise DataError(f"{run}: no {path.name}; first run: python -m train evaluate --run {run}")
    document = read_object(path)
    try:
        for found in (document[level][label] for label in labels):
            apply_calibration(np.zeros(1), found)
            [found["thresholds"][rule] for rule in RULES] + [
                f"{document['sensitivity']:g}",
                document["combine"],
            ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged, or of other labels than the run's: {error}") from error
    return document


def member_calibrations(model: Model) -> list[dict[str, Any] | None]:
    """The calibrations of an ensemble's members; None for a run, whose score is what its network gives."""
    if len(model.members) == 1:
        return [None]
    return [read_calibration(run, config.labels)["image"] for run, config in model.members.items()]


def choose_decision(model: Model, threshold: str, level: str = "image") -> Decision:
    """The calibration of a model's scores at a level, and their thresholds by a rule.

    Raises DataError where dev gave none.
    """
    if model.folder is None:
        if threshold != "none" or level == "study":
            runs = " ".join(f"--run {run}" for run in model.members)
            command = f"python -m train evaluate {runs} --out FOLDER"
            raise DataError(
                f"`{'threshold' if level == 'image' else 'group_by'}` is of an ensemble's folder; first run: "
                f"{command}; then `run` FOLDER"
            )
        return Decision(None, [], threshold)
    document = read_calibration(model.folder, model.config.labels, level)
    chosen, combine = document[level], document["combine"]
    if threshold == "none":
        return Decision(chosen, [], threshold, combine)
    limits = {label: chosen[label]["thresholds"][threshold] for label in model.config.labels}
    without = [label for label, limit in limits.items() if limit is None]
    if without:
        say(f"{model.folder}: no decisions on {', '.join(without)}: one class in dev")
    rule = f"sensitivity>={document['sensitivity']:g}" if threshold == "sensitivity" else threshold
    return Decision(chosen, [np.nan if limit is None else limit for limit in limits.values()], rule, combine)


def score_samples(
    model: Model, samples: Sequence[Sequence[Path]], workers: int
) -> tuple[Scores, list[tuple[Path, str]]]:
    """As `score_files`, by a run or an ensemble."""
    found = []
    for (run, config), fit in zip(model.members.items(), member_calibrations(model), strict=True):
        scores, bad = score_files(run, config, samples, workers)
        found.append(scores if fit is None else apply_calibrations(config.labels, scores, fit))
    return np.mean(found, axis=0), bad
