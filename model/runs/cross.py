"""Train on each set of shards, on all but one, and on all; score every run on every set: does it hold elsewhere?

A network that was trained and tested at one hospital may have learned that hospital. The matrix shows it: a row is what
was trained on, a column is whose patients were scored. All AUROCs of a column are of the same images and of the same
labels, so `less` compares each run with the set's own by paired intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.runs.config import is_reported, read_config
from model.runs.job import Job, open_rows
from model.runs.overlap import check_start
from model.runs.predictor import of_job
from model.runs.report import open_run_templates
from pipeline.base.errors import DataError
from pipeline.base.files import write_atomically, write_json
from pipeline.labels import LABELS
from pipeline.measure.delong import Areas, combine_limits, measure_areas, weigh_labels
from pipeline.measure.metrics import Bools, Floats, count_classes
from pipeline.stream.collection import Collection

Make = Callable[[Sequence[str], Path], Job]  # folders and run → its job
SCORED = ("valid", "test", "dev")  # the split of a set that is scored: the first that it has
MACRO = "macro"
NO_LABEL = "no label has 10 patients of each class in every set that is scored"


def plan_runs(shards: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name → folders of shards of every run: each alone, with three or more all but one, and all."""
    sizes = dict.fromkeys((1, len(shards) - 1, len(shards)))
    return {
        " + ".join(Path(folder).name for folder in chosen): chosen
        for size in sizes
        for chosen in combinations(shards, size)
    }


def train_runs(shards: Sequence[str], out: Path, make: Make, train: Callable[[Job], None]) -> dict[str, Job]:
    """The job of every run, trained, by its name; a run that is finished is not trained again.

    Raises DataError where two folders have one name, and as `check_sets`.
    """
    runs = plan_runs(shards)
    if len({Path(folder).name for folder in shards}) < len(shards):
        raise DataError("`shards`: two folders have the same name; rename one, by which the runs are called")
    # All of them first: folders that share patients or images are refused before hours of training.
    made = {name: make(folders, out / name.replace(" + ", "+")) for name, folders in runs.items()}
    check_sets([made[Path(folder).name] for folder in shards])
    for job in made.values():
        check_start(job)
    for job in made.values():
        if not (is_reported(job.run) and read_config(job.run) == job.config):
            train(job)
    return made


def check_sets(jobs: Sequence[Job]) -> None:
    """Raise DataError, before any run is trained, if a set has no split to score, or if all have no label to score."""
    labels = set(LABELS)
    for job in jobs:
        chosen = open_rows(job, _choose_split(job.shards))
        patient = chosen.split.table["patient"].to_numpy()[chosen.rows]
        target, mask = chosen.truth.target[chosen.rows], chosen.truth.mask[chosen.rows]
        labels &= {
            label
            for column, label in enumerate(LABELS)
            if _has_both(target[:, column], mask[:, column], patient)
        }
    if not labels.intersection(jobs[0].config.labels):
        raise DataError(NO_LABEL)


def score_runs(jobs: Mapping[str, Job], shards: Sequence[str]) -> dict[str, Any]:
    """The matrix: `cells` by set and run, with AUROC, limits and the difference to the set's own run.

    By label and over the `labels` of all runs that have 10 patients of each class in every set (`macro`).
    Raises DataError where there is none, and Stopped.
    """
    alone = {Path(folder).name: jobs[Path(folder).name].shards for folder in shards}
    columns = {name: _choose_split(collection) for name, collection in alone.items()}
    # Sets that share images are refused before training. What the splits of one set share was said when it was opened.
    scored = {
        name: {
            run: of_job(job).score(replace(job, shards=alone[name], shared_images=True), split).images
            for run, job in jobs.items()
        }
        for name, split in columns.items()
    }
    names = [label for label in LABELS if all(label in job.config.labels for job in jobs.values())]
    for runs in scored.values():  # of labels that every set annotates
        for run, found in runs.items():
            learned = jobs[run].config.labels
            columns_of = [learned.index(label) for label in names]
            runs[run] = found._replace(
                **{field: getattr(found, field)[:, columns_of] for field in ("scores", "target", "mask")}
            )
    labels = [
        label
        for column, label in enumerate(names)
        if all(
            _has_both(of[name].target[:, column], of[name].mask[:, column], of[name].patient)
            for name, of in scored.items()
        )
    ]
    if not labels:
        raise DataError(NO_LABEL)
    cells: dict[str, dict[str, Any]] = {}
    for name, runs in scored.items():
        measured = {run: measure_areas(*found[:4]) for run, found in runs.items()}
        cells[name] = {
            run: {
                key: _compare(areas, measured[name], weigh_labels(names, [key] if key in labels else labels))
                for key in (*labels, MACRO)
            }
            for run, areas in measured.items()
        }
    return {
        "runs": {run: [folder.name for folder in job.shards.folders] for run, job in jobs.items()},
        "sets": {
            name: {"split": columns[name], "images": len(runs[name].scores)} for name, runs in scored.items()
        },
        "labels": labels,
        "cells": cells,
    }


def write_cross(out: Path, found: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write cross.json and cross.html; `config` are the settings that all runs share."""
    write_json(out / "cross.json", found)
    page = open_run_templates().get_template("cross.html")
    text = page.render(title=f"Across sets: {out.name}", **found, macro=MACRO, config=config)
    write_atomically(out / "cross.html", text.encode())


def _choose_split(collection: Collection) -> str:
    for split in SCORED:
        if split in collection.manifest.splits:
            return split
    raise DataError(f"{collection}: no split to score on, of {', '.join(SCORED)}; shard it again with `dev`")


def _has_both(target: Floats, known: Bools, patient: npt.NDArray[Any]) -> bool:
    return not count_classes(target[known] == 1, patient[known])["few"]


def _compare(areas: Areas, own: Areas, share: Floats) -> dict[str, Any]:
    """A mean of AUROCs with its limits, and less that of the set's own run."""
    auroc, theirs = (float(share[share > 0] @ which.auroc[share > 0]) for which in (areas, own))
    paired = combine_limits(areas.join(own), np.concatenate([share, -share]))
    return {
        "auroc": auroc,
        **combine_limits(areas, share),
        "less": {
            "difference": auroc - theirs,
            **paired,
            "excludes_zero": paired["low"] > 0 or paired["high"] < 0,
        },
    }
