"""Scores of a run → its calibration, evaluations, comparisons and pages."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from model.runs.config import Config, parse_choice, read_config
from model.runs.folder import result_name
from model.runs.job import Job, open_images, open_split, selected_splits
from model.runs.predictor import Predictor, Result, forget_calibration, of_job
from model.runs.report import render_model_card, render_report
from pipeline.base.errors import DataError
from pipeline.base.files import parse_object, write_atomically
from pipeline.console import say
from pipeline.identity import ignore
from pipeline.labels import count_rows
from pipeline.look.pixels import measure_edges
from pipeline.measure.delong import combine, measure_areas, weigh_labels
from pipeline.measure.evaluate import Scored
from pipeline.measure.evaluation import Evaluation, read_evaluation
from pipeline.measure.judge import Beside, add_own, combine_views, judge_scores
from pipeline.measure.metrics import Floats, averaged_labels, mean_of, report_auroc
from pipeline.measure.scores import Scores, open_scores, write_scores
from pipeline.stream.samples import find_places

TRAIN_SAMPLES = 2000  # number of train samples that a sweep scores


def finish_run(job: Job) -> dict[str, Evaluation]:
    """Choose thresholds on dev, evaluate best.pt on dev and valid, and write report.html and model-card.md.

    Returns the evaluations, by split, on the first rank.
    """
    splits = selected_splits(job)
    names: list[str] = [name for name in ("dev", "valid") if name in splits]
    predictor = of_job(job)
    results = {name: predictor.score(job, name) for name in names}
    if not job.ranks.is_first:
        return {}
    forget_calibration(job.run)  # from an earlier best.pt
    evaluations = {name: evaluate(job, predictor, name, results[name]) for name in names}
    write_report(job, predictor, "report.html", evaluations, {name: results[name].images for name in names})
    data = {}
    for name in names if job.config.adopted else splits:
        split, rows = open_images(job, name)
        data[name] = count_rows(split.table.take(rows))
    card = render_model_card(
        job.run.name, describe_settings(job, predictor), data, [*evaluations.values()], job.manifest.dataset
    )
    write_atomically(job.run / "model-card.md", card.encode())
    return evaluations


class How(NamedTuple):
    """Options of `evaluate`: `chosen_by` are conditions that replace the run's conditions.

    `sensitivity` is the sensitivity that the third threshold must reach on dev; `combine`, max or mean, computes a
    study's score from its views. `against` maps other runs to their scores (`find_scores`); `altered` are scores of
    altered images, and `readers` readers' calls, both by name.
    """

    sensitivity: float = 0.9
    combine: str = "max"
    chosen_by: tuple[str, ...] = ()
    against: Mapping[Path, Path] = MappingProxyType({})
    altered: Mapping[str, Floats] = MappingProxyType({})
    readers: Mapping[str, Scores] = MappingProxyType({})


def evaluate(
    job: Job,
    predictor: Predictor,
    name: str,
    result: Result,
    how: How = How(),  # noqa: B008 - immutable
) -> Evaluation:
    """Write a predictor's scores of a split, judge them, and write the evaluation into the job's folder.

    Raises DataError if thresholds would have to be chosen on other shards than the run's.
    """
    config, scored, table = job.config, result.images, result.table
    stem = name_result(job, name, how.chosen_by)
    write_scores(job.run / f"scores-{stem}.arrow", table, config.labels, scored.scores)
    dev = scored if name == "dev" and not how.chosen_by else None
    calibration = predictor.calibrate(job, how.sensitivity, how.combine, dev)
    split = open_split(job, name)
    calls = {name: read.take(read.align(table, say), config.labels) for name, read in how.readers.items()}
    against: dict[str, Floats] = {}
    for other, path in how.against.items():
        against |= read_against(job, name, other, path, result)
    edge = measure_edges(split, find_places(split, table), job.setup.workers)
    evaluated = {"split": name, "unit": config.unit, "labels": list(config.labels)}
    evaluated |= {"chosen_by": list(how.chosen_by)} if how.chosen_by else {}
    beside = Beside(against, calls, result.members, how.altered, edge)
    evaluation = judge_scores(evaluated | dict(result.shared), scored, table, calibration, beside)
    if job.shards.digest != config.manifest:
        compare_with_own(job, scored, evaluation)
    compared = name_comparison(stem, how.against)
    write_atomically(job.run / f"evaluation-{compared}.json", evaluation.to_json())
    return evaluation


def compare_with_own(job: Job, scored: Scored, evaluation: Evaluation) -> None:
    """Compare results on other shards with those on the run's own valid split.

    If there is no comparison, the head's `own` gives the reason. Raises DataError if the run's evaluation is damaged.
    """
    path = job.run / "evaluation-valid.json"
    command, data = f"python -m train evaluate --run {job.run}", job.manifest.dataset.get("title", "")
    evaluation.head |= {"data": data, "manifest": job.shards.digest, "own": ""}
    if not path.exists():
        evaluation.head["own"] = f"{path}: not there, so nothing to compare with; it is written by: {command}"
        say(evaluation.head["own"])
        return
    own = read_evaluation(path)
    if set(own.labels) != set(evaluation.labels):
        raise DataError(f"{path}: of other labels than the run's; first run: {command}")
    add_own(evaluation, scored, own)


def read_against(job: Job, name: str, other: Path, path: Path, result: Result) -> dict[str, Floats]:
    """Another run's scores [N, L] of the same samples; NaN for labels that it was not trained on.

    For studies, both the max and the mean over the scored views. Raises DataError if all labels or an image are
    missing.
    """
    scores, labels = open_scores(path), job.config.labels
    if job.config.fusion is None:
        return {str(other): scores.take_all(result.table, labels)}
    images = open_split(job, name).table
    values = scores.take(scores.align(images, ignore), labels)
    return {f"{other}{how}": views for how, views in combine_views(images, values, result.images).items()}


def name_result(job: Job, name: str, chosen_by: Sequence[str] = ()) -> str:
    """The name of a run's results on a split, including any conditions that replace the run's."""
    result = result_name(job.config, job.shards.digest, name)
    return f"{result}-{hashlib.sha256(' '.join(chosen_by).encode()).hexdigest()[:8]}" if chosen_by else result


def name_comparison(result: str, against: Collection[Path]) -> str:
    """The name of a comparison, so that it does not overwrite the plain evaluation."""
    return f"{result}-against-{'-'.join(other.name for other in against)}"[:200] if against else result


def find_scores(job: Job, name: str, against: Sequence[Path]) -> dict[Path, Path]:
    """Other runs' scores of a split: of one run on images or, if this run scores studies, of any number.

    If a run has none, raises DataError with the command that writes them.
    """
    if len(against) > 1 and job.config.fusion is None:
        raise DataError("`against` takes one run beside a run by images; several are for a run by studies")
    paths = {}
    for other in against:
        # First its scores of these shards; else of the run's shards, which may have the same images.
        names = (result_name(read_config(other), job.shards.digest, name), name)
        files = [path for stem in names if (path := other / f"scores-{stem}.arrow").exists()]
        if not files:
            command = f"python -m train evaluate --run {other} --split {name}"
            raise DataError(f"`against` {other}: no scores-{name}.arrow; first run: {command}")
        paths[other] = files[0]
    return paths


def write_report(
    job: Job, predictor: Predictor, file: str, evaluations: Mapping[str, Evaluation], images: Mapping[str, Scored]
) -> None:
    """Write the report page of evaluated splits; `images` are their scores."""
    path = job.run / "metrics.jsonl"
    trained = len(predictor.configs) == 1 and not job.config.adopted  # an ensemble has no training history
    lines = path.read_bytes().splitlines() if trained else []
    history = [parse_object(path, line) for line in lines]
    settings, dataset = describe_settings(job, predictor), job.manifest.dataset
    page = render_report(job.run.name, settings, history, [*evaluations.values()], images, dataset)
    write_atomically(job.run / file, page.encode())


def describe_settings(job: Job, predictor: Predictor) -> dict[str, object]:
    """A run's configuration; for an ensemble, the members and their configurations: all values if they differ."""
    chosen = {"where": job.config.where, "views": job.config.views}
    configs = [asdict(config) | chosen for config in predictor.configs.values()]
    settings = {
        name: value if all(one[name] == value for one in configs) else "; ".join(str(one[name]) for one in configs)
        for name, value in configs[0].items()
    }
    if job.config.adopted:
        default = {one.name: one.default for one in fields(Config)} | {"uncertain": settings["uncertain"]}
        shown = ("labels", "views", "blank")  # others describe the weights only if they were set
        settings = {name: value for name, value in settings.items() if name in shown or value != default[name]}
    if settings["views"] == "all":  # views in the shards, which may have fewer
        settings["views"] = job.manifest.options.get("views", "all")
    return settings | ({"members": list(map(str, predictor.configs))} if len(configs) > 1 else {})


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


def measure_run(job: Job) -> dict[str, float | None]:
    """A finished run's AUROC on dev, which chose the checkpoint, and AUROCs to compare.

    Those are on dev, part of train, and valid (with limits), over the labels that chose the checkpoint and have both
    classes in all three; `same_labels` is their number.
    """
    names = job.config.labels
    predictor = of_job(job)
    scored = {"train": predictor.score(job, "train", most=TRAIN_SAMPLES).images}
    if "valid" in selected_splits(job):
        scored["valid"] = predictor.score(job, "valid").images
    labels: dict[str, Any] = {name: report_auroc(names, *images[:4])["labels"] for name, images in scored.items()}
    chosen_on = read_evaluation(job.run / "evaluation-dev.json")
    labels["dev"] = {
        name: {"auroc": row.value, "few": row.few} for name in names for row in [chosen_on.get("auroc", name)]
    }
    means = averaged_labels(labels["dev"])
    chosen = parse_choice(job.config.choose_by) or means["macro10"] or means["macro"]
    same = [name for name in chosen if all(rows[name]["auroc"] is not None for rows in labels.values())]
    figures = {split: mean_of(rows, same, "auroc") for split, rows in labels.items()}
    limits: dict[str, float | None] = dict.fromkeys(("low", "high"))
    if "valid" in scored:
        limits = combine(measure_areas(*scored["valid"][:4]), weigh_labels(names, same))
    return {
        "dev_auroc": mean_of(labels["dev"], chosen, "auroc"),
        "same_labels": len(same),
        "dev_same_auroc": figures["dev"],
        "train_auroc": figures["train"],
        "valid_auroc": figures.get("valid"),
        "valid_low": limits["low"],
        "valid_high": limits["high"],
    }
