"""Scores of a run, or weights from elsewhere → calibration, evaluations, comparisons and pages."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.runs.config import Assessment, Config, Setup, open_start, parse_choice, read_config
from model.runs.folder import begin_run, record_environment, result_name
from model.runs.overlap import check_seen, list_seen, read_seen
from model.runs.predictor import Predictor, Result, forget_calibration, of_run, save_best, score_as, start_network
from model.runs.report import render_model_card, render_report
from model.runs.run import Run, open_images, open_rows, open_run, selected_splits
from pipeline.base.errors import DataError, SettingError
from pipeline.base.files import parse_object, sync_folder, write_atomically
from pipeline.base.store import read_bytes
from pipeline.console import say
from pipeline.identity import ignore
from pipeline.labels import count_rows
from pipeline.look.pixels import ALTERATIONS, measure_edges
from pipeline.measure.delong import average, combine, measure_areas, weigh_labels
from pipeline.measure.evaluate import Beside, Scored, add_own, combine_views, judge_scores
from pipeline.measure.evaluation import Evaluation, read_evaluation
from pipeline.measure.metrics import Floats
from pipeline.measure.scores import name_files, open_scores, write_scores
from pipeline.stream.samples import find_places

TRAIN_SAMPLES = 2000  # number of train samples that a sweep scores


def finish_run(run: Run) -> dict[str, Evaluation]:
    """Choose thresholds on dev, evaluate best.pt, and write report and card; returns the first rank's evaluations."""
    splits, predictor = selected_splits(run), of_run(run)
    names: list[str] = [name for name in ("dev", "valid") if name in splits]
    results = {name: predictor.score(run, name) for name in names}
    if not run.ranks.is_first:
        return {}
    forget_calibration(run.folder)  # from an earlier best.pt
    evaluations = {name: evaluate(run, predictor, result, Assessment(split=name)) for name, result in results.items()}
    write_report(run, predictor, run.folder / "report.html", evaluations, results)
    data = {}
    for name in results if run.config.adopted else splits:
        split, rows = open_images(run, name)
        data[name] = count_rows(split.table.take(rows))
    described = (describe_settings(run, predictor), data, [*evaluations.values()], run.manifest.dataset)
    card = render_model_card(run.folder.name, *described)
    sync_folder(run.folder)  # the card marks a finished run
    write_atomically(run.folder / "model-card.md", card.encode())
    return evaluations


def adopt_weights(config: Config, setup: Setup, folder: Path) -> None:
    """Write a run of the weights of `setup.init`, with its evaluations on dev and valid; reports labels left out.

    Settings in the weights' file take precedence over defaults. Raises SettingError if neither the file nor an option
    gives one, and DataError if the weights do not fit or saw dev or valid, or if the folder is another run's.
    """
    start = open_start(config, setup.init)
    if start is None:
        raise SettingError("adopt needs the weights of `init`: a file, a run, or published ones")
    file, labels = start.path, [label for label in config.labels if label in start.outputs]
    if not (config.arch or start.arch):
        raise SettingError(f"{file} does not say which network it is for: name it by `arch`")
    if not labels:
        raise SettingError(f"{file}: no output of {', '.join(config.labels)} is known: name them by `init_labels`")
    if lacking := [label for label in config.labels if label not in labels]:
        say(f"{file}: no trained output for {', '.join(lacking)}: left out")
    if not start.scale:
        say(f"{file}: its gray scale is not known: images are scaled by the shards' mean and std")
    # `ignore`, because there is no training.
    config = replace(config, labels=tuple(labels), uncertain="ignore", adopted=str(setup.init))
    run = open_run(config, setup, folder)
    torch.manual_seed(run.config.seed)  # for the unused outputs
    network = start_network(run, run.config.labels)
    seen = list_seen(run, ["dev"])
    begin_run(folder, run.config)
    record_environment(run)
    save_best(run, seen, network.state_dict(), 0.0, math.nan)
    finish_run(run)


def evaluate_split(run: Run, predictor: Predictor, how: Assessment) -> Evaluation:
    """Score a split, under other conditions if `how` has any, judge the scores, and write the files of `name_results`.

    Raises DataError as `check_seen` does, also for the runs to compare with, and for unusable files of scores.
    """
    split = how.split
    config = replace(run.config, where=how.where or run.config.where, views=how.views or run.config.views)
    scored = replace(run, config=config)
    readers = {name: open_scores(path, calls=True) for name, path in name_files(how.readers).items()}
    if len({*how.against}) > 1 and config.fusion is None:
        raise DataError("`against` takes one run to compare with a run on images; a run on studies takes several")
    others = {}
    for folder in how.against:
        own = read_config(folder)
        # First its scores of these shards; else of its own shards, which may have the same images.
        names = (result_name(own, run.shards.digest, split), split)
        paths = [path for name in names if (path := folder / f"scores-{name}.arrow").exists()]
        if not paths:
            first = f"python -m train evaluate --run {folder} --split {split}"
            raise DataError(f"`against` {folder}: no scores-{split}.arrow; first run: {first}")
        others[folder] = open_scores(paths[0])
        check_seen(score_as(scored, folder, own), split, read_seen(folder))
    if split != "dev" or run.shards.digest != config.manifest:
        predictor.calibrate(run, how.sensitivity, how.study)  # before the split is scored
    result = predictor.score(scored, split)
    table, against = result.table, dict[str, Floats]()
    calls = {name: reader.take(reader.align(table, say), config.labels) for name, reader in readers.items()}
    for folder, scores in others.items():
        if config.fusion is None:
            against[str(folder)] = scores.take_all(table, config.labels)
            continue
        images = result.split.table
        combined = combine_views(images, scores.take(scores.align(images, ignore), config.labels), result.images)
        against |= {f"{folder}{views}": studies for views, studies in combined.items()}
    level = round(run.manifest.pixels["mean"])  # train's mean gray level, which covers parts
    altered = {
        name: predictor.score(scored, split, partial(alter, level)).images.scores
        for name, alter in (ALTERATIONS if how.sanity else {}).items()
    }
    evaluation = evaluate(run, predictor, result, how, Beside(against, calls, result.members, altered))
    write_report(scored, predictor, name_results(run, how)[2], {split: evaluation}, {split: result})
    return evaluation


def evaluate(
    run: Run, predictor: Predictor, result: Result, how: Assessment, beside: Beside | None = None
) -> Evaluation:
    """Write a predictor's scores of a split, judge them, and write the evaluation into the run's folder.

    On other shards than the run's, compares with the run's own valid split; without it, the head's `own` says why.
    Raises DataError if thresholds would have to be chosen on other shards, or if valid's evaluation is damaged.
    """
    config, scored, table = run.config, result.images, result.table
    scores_path, path, _ = name_results(run, how)
    write_scores(scores_path, table, config.labels, scored.scores)
    dev = scored if how.split == "dev" and not how.conditions else None
    calibration = predictor.calibrate(run, how.sensitivity, how.study, dev)
    edge = measure_edges(result.split, find_places(result.split, table), run.setup.workers)
    evaluated = {"split": how.split, "unit": config.unit, "labels": list(config.labels)}
    evaluated |= {"chosen_by": list(how.conditions)} if how.conditions else {}
    beside = (beside or Beside())._replace(edge=edge)
    evaluation = judge_scores(evaluated | dict(result.shared), scored, table, calibration, beside)
    if run.shards.digest != config.manifest:
        own, head = run.folder / "evaluation-valid.json", evaluation.head
        head |= {"data": run.manifest.dataset.get("title", ""), "manifest": run.shards.digest, "own": ""}
        if own.exists():
            add_own(evaluation, scored, read_evaluation(own))
        else:
            first = f"python -m train evaluate --run {run.folder}"
            head["own"] = f"{own} is missing, so there is no comparison with it; first run: {first}"
            say(head["own"])
    write_atomically(path, evaluation.to_json())
    return evaluation


def name_results(run: Run, how: Assessment) -> tuple[Path, Path, Path]:
    """The files of scores, evaluation and report: other conditions and comparisons do not overwrite the plain ones."""
    name = result_name(run.config, run.shards.digest, how.split)
    if how.conditions:
        name += f"-{hashlib.sha256(' '.join(how.conditions).encode()).hexdigest()[:8]}"
    compared = f"{name}-against-{'-'.join(folder.name for folder in how.against)}"[:200] if how.against else name
    evaluation, report = f"evaluation-{compared}.json", f"report-{compared}.html"
    return run.folder / f"scores-{name}.arrow", run.folder / evaluation, run.folder / report


def write_report(
    run: Run, predictor: Predictor, file: Path, evaluations: Mapping[str, Evaluation], results: Mapping[str, Result]
) -> None:
    """Write the report page of evaluated splits."""
    settings, data = describe_settings(run, predictor), run.manifest.dataset.get("title", "")
    images = {name: result.images for name, result in results.items()}
    page = render_report(run.folder.name, settings, read_history(run.folder), [*evaluations.values()], images, data)
    write_atomically(file, page.encode())


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none for an ensemble or a run that was not trained. Raises DataError."""
    path = folder / "metrics.jsonl"
    return [parse_object(path, line) for line in read_bytes(path).splitlines()] if path.exists() else []


def describe_settings(run: Run, predictor: Predictor) -> dict[str, object]:
    """A run's configuration; for an ensemble, the members and their configurations: all values if they differ."""
    chosen = {"where": run.config.where, "views": run.config.views}
    settings: dict[str, object] = {}
    for name in vars(run.config):
        values = [chosen.get(name, getattr(config, name)) for config in predictor.configs.values()]
        same = all(value == values[0] for value in values)
        settings[name] = values[0] if same else "; ".join(map(str, values))
    if run.config.adopted:
        default = {setting.name: setting.default for setting in fields(Config)} | {"uncertain": settings["uncertain"]}
        shown = ("labels", "views", "blank")  # others describe the weights only if they were set
        settings = {name: value for name, value in settings.items() if name in shown or value != default[name]}
    if settings["views"] == "all":  # views in the shards, which may have fewer
        settings["views"] = run.manifest.options["views"]
    return settings | ({"members": list(map(str, predictor.configs))} if len(predictor.configs) > 1 else {})


def choice_score(line: Mapping[str, Any], choose_by: str) -> float | None:
    """The AUROC that chooses the checkpoint, from a line of metrics.jsonl: the mean over the labels of `choose_by`.

    None if one of them has one class. `all` means the labels with 10 patients of each class, if any: on the real dev
    split these are all labels; on a small one, the others would add only noise.
    """
    if labels := parse_choice(choose_by):
        areas = [line["labels"][label] for label in labels]
        return None if None in areas else sum(areas) / len(areas)
    score: float | None = line["macro10_auroc"]
    return line["macro_auroc"] if score is None else score


def read_scored(run: Run, folder: Path, name: str) -> Scored:
    """The scores that a run has written of a split, with truth, for the samples of a run; NaN for samples without."""
    chosen = open_rows(run, name)
    table, written = chosen.split.table.take(chosen.rows), open_scores(folder / f"scores-{name}.arrow")
    scores = written.take(written.align(table, ignore), run.config.labels)
    cells = np.ix_(chosen.rows, np.array(run.config.columns))
    return Scored.of(scores, chosen.truth.target[cells], chosen.truth.mask[cells], table)


def measure_run(run: Run) -> dict[str, float | None]:
    """A finished run's AUROC on dev, which chose the checkpoint, and AUROCs of dev, part of train and valid to compare.

    These are over the labels that chose the checkpoint and have both classes in all three: `same_labels` of them.
    """
    names = run.config.labels
    scored = {"train": of_run(run).score(run, "train", most=TRAIN_SAMPLES).images}
    for split in {"dev", "valid"} & {*selected_splits(run)}:
        images = read_scored(run, run.folder, split)
        scored[split] = images.take(~np.isnan(images.scores).any(axis=1))
    areas = {split: measure_areas(*images[:4]) for split, images in scored.items()}
    means = average(names, areas["dev"])
    chosen = parse_choice(run.config.choose_by) or means["macro10"] or means["macro"]
    undefined = np.any([np.isnan(each.value) for each in areas.values()], axis=0)
    same = [name for name in chosen if not undefined[names.index(name)]]
    figures = {split: combine(each, weigh_labels(names, same)) for split, each in areas.items()}
    valid = figures.get("valid", dict.fromkeys(("value", "low", "high")))
    measured = {"dev_auroc": combine(areas["dev"], weigh_labels(names, chosen))["value"], "same_labels": len(same)}
    measured |= {"dev_same_auroc": figures["dev"]["value"], "train_auroc": figures["train"]["value"]}
    return measured | {"valid_auroc": valid["value"], "valid_low": valid["low"], "valid_high": valid["high"]}
