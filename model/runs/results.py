"""Scores of a run → its calibration, evaluations, comparisons and pages."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model.runs.config import MEANS, Config, parse_choice, read_config
from model.runs.folder import load_best, result_name
from model.runs.job import Job, open_images, open_split, selected_splits
from model.runs.report import render_model_card, render_report
from model.runs.scores import read_frame, read_scores, write_scores
from model.runs.scoring import Result, score_best
from pipeline.base.errors import DataError
from pipeline.base.files import parse_object, read_object, write_atomically, write_json
from pipeline.labels import count_rows
from pipeline.look.pixels import measure_edges
from pipeline.manifest import name_facts
from pipeline.measure.belief import assess_belief
from pipeline.measure.compare import combine_views, compare_methods, group_by_views, measure_gain
from pipeline.measure.covariates import find_covariates, find_strata
from pipeline.measure.delong import combine_limits, measure_areas, weigh_labels
from pipeline.measure.elsewhere import subtract_own, try_recalibration
from pipeline.measure.evaluate import Scored, assess, calibrate, study_level
from pipeline.measure.metrics import averaged_labels, mean_of, report_auroc
from pipeline.measure.readers import Reads, assess_readers
from pipeline.stream.samples import find_places

RESAMPLES = 1000  # of patients, for intervals of AUPRC
TRAIN_SAMPLES = 2000  # that a sweep scores of train


def finish_run(job: Job) -> dict[str, dict[str, Any]]:
    """Choose thresholds on dev, evaluate best.pt on dev and valid, and write report.html and model-card.md.

    Returns the evaluations, by split, on the first rank.
    """
    splits = selected_splits(job)
    names: list[str] = [name for name in ("dev", "valid") if name in splits]
    found = {name: score_best(job, name) for name in names}
    if not job.ranks.is_first:
        return {}
    forget_calibration(job.run)  # of an earlier best.pt
    results = {name: evaluate(job, name, found[name]) for name in names}
    evaluations = {name: evaluation for name, (evaluation, _) in results.items()}
    write_report(job, "report.html", results)
    data = {}
    for name in splits:
        split, rows = open_images(job, name)
        data[name] = count_rows(split.table.take(rows))
    card = render_model_card(job.run.name, describe_settings(job), data, evaluations, job.manifest.dataset)
    write_atomically(job.run / "model-card.md", card.encode())
    return evaluations


def forget_calibration(run: Path) -> None:
    """Remove the calibration of weights that are no more."""
    (run / "calibration.json").unlink(missing_ok=True)


def evaluate(
    job: Job,
    name: str,
    found: Result,
    against: Mapping[Path, Path] = MappingProxyType({}),
    sensitivity: float = 0.9,
    combine: str = "max",
    chosen_by: tuple[str, ...] = (),
    sanity: Mapping[str, Any] = MappingProxyType({}),
    readers: Mapping[str, Reads] = MappingProxyType({}),
) -> tuple[dict[str, Any], Scored]:
    """Evaluate what `score_best` found for a split; writes its scores and evaluation into the run.

    `against` are other runs and their scores, as `find_scores` has them. `sensitivity` is what the third threshold
    is to reach on dev, `combine` how a study's score comes from its views: max or mean. `chosen_by` are the conditions
    that chose the images, where they are not the run's own; they, and `sanity` as `check_sanity` has it, are kept in
    the evaluation. `readers` are what each said of the studies.
    Raises DataError where thresholds would have to be chosen on other shards than the run's.
    """
    config = job.config
    scored, table = found.images, found.table
    result = name_result(job, name, chosen_by)
    write_scores(job.run / f"scores-{result}.arrow", table, config.labels, scored.scores)
    calibration = find_calibration(job, name, None if chosen_by else scored, sensitivity, combine)
    facts = {
        name: table[name].to_numpy().astype(object)
        for name, kind in name_facts(table).items()
        if kind == "string"
    }
    evaluation = assess(
        config.labels, scored, calibration, unit=config.unit, resamples=RESAMPLES, facts=facts
    )
    evaluation |= found.shared
    evaluation["not_annotated"] = list(job.manifest.not_annotated)
    evaluation |= {"chosen_by": list(chosen_by)} if chosen_by else {}
    evaluation |= {"sanity": dict(sanity)} if sanity else {}
    if found.members:
        evaluation["gain"] = measure_gain(config.labels, scored, found.members)
    if readers:
        evaluation["readers"] = assess_readers(config.labels, study_level(scored, combine), readers)
    split = open_split(job, name)
    edge = measure_edges(split, find_places(split, table), job.setup.workers)
    evaluation["belief"] = assess_belief(
        config.labels, scored, find_covariates(table), find_strata(table), edge
    )
    if against and config.fusion is None:
        add_difference(job, evaluation, found, calibration, against)
    elif against:
        add_methods(job, name, evaluation, scored, against)
    if result_name(config, job.shards.digest, name) != name:
        evaluation["elsewhere"] = compare_with_own(job, scored, evaluation)
    write_json(job.run / f"evaluation-{name_comparison(result, against)}.json", evaluation)
    return evaluation, scored


def compare_with_own(job: Job, scored: Scored, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation on other shards is beside the run's own valid, and what recalibration there would give.

    `less_own` is None, with the reason in `note`, where the run has no evaluation of its own valid. Raises DataError
    where that is damaged.
    """
    path = job.run / "evaluation-valid.json"
    found: dict[str, Any] = {
        "data": job.manifest.dataset.get("title", ""),
        "manifest": job.shards.digest,
        "less_own": None,
        "note": None,
        "recalibration": try_recalibration(job.config.labels, scored, evaluation["calibration"]["image"]),
    }
    if path.exists():
        try:
            found["less_own"] = subtract_own(scored, evaluation, read_object(path))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged, or of other labels than the run's: {error}") from error
    else:
        command = f"python -m train evaluate --run {job.run}"
        found["note"] = f"{path}: not there, so nothing to compare with; it is written by: {command}"
    return found


def find_calibration(
    job: Job, name: str, scored: Scored | None, sensitivity: float, combine: str
) -> dict[str, Any]:
    """The run's calibration for these settings, chosen on dev where it is not there yet.

    `scored` are the scores of the split, where all of its images were scored: those of dev are not scored again.
    Raises DataError where thresholds would have to be chosen on other shards than the run's.
    """
    path = job.run / "calibration.json"
    chosen = {"sensitivity": sensitivity, "combine": combine}
    calibration = read_object(path) if path.exists() else {}
    if not chosen.items() <= calibration.items():
        if (
            result_name(job.config, job.shards.digest, name) != name
        ):  # whose dev may hold patients of the run's train
            command = (
                f"python -m train evaluate --run {job.run} --sensitivity {sensitivity} --study {combine}"
            )
            raise DataError(
                f"{job.shards}: not the shards that {job.run} learned from, on whose dev thresholds are chosen; "
                f"first run: {command} with those"
            )
        dev = scored if name == "dev" and scored is not None else score_best(job, "dev").images
        calibration = calibrate(job.config.labels, dev, sensitivity, combine)
        write_json(path, calibration)
    return calibration


def add_difference(
    job: Job,
    evaluation: dict[str, Any],
    found: Result,
    calibration: dict[str, Any],
    against: Mapping[Path, Path],
) -> None:
    """Add the paired differences from another run by images, on the labels that both have learned."""
    scored, table = found.images, found.table
    ((other, path),) = against.items()
    labels, common = choose_common(job.config, scored, against)
    theirs = (str(other), read_scores(path, table["key"], labels))
    compared = assess(labels, common, calibration, unit="image", against=theirs, resamples=RESAMPLES)
    ours = {mean: compared[f"{mean}_auroc"] for mean in MEANS}
    evaluation["against"] = {"labels": list(labels), "ours": ours, **compared["against"]}
    evaluation["study"]["against"] = compared["study"]["against"]


def add_methods(
    job: Job, name: str, evaluation: dict[str, Any], scored: Scored, against: Mapping[Path, Path]
) -> None:
    """Add what other ways of scoring studies come to: by the views' scores of other runs."""
    labels, common = choose_common(job.config, scored, against)
    methods: dict[str, Any] = {}
    for other, path in against.items():
        methods |= combine_views(read_frame(path, labels), str(other))
    views = group_by_views(open_split(job, name).table)
    ours = f"{job.run}, {job.config.fusion} fusion"
    evaluation["methods"] = compare_methods(labels, common, ours, methods, views)


def choose_common(
    config: Config, scored: Scored, against: Collection[Path]
) -> tuple[tuple[str, ...], Scored]:
    """The labels that a run and all runs it is compared with have learned, and its scores for these labels.

    Raises DataError if there is none.
    """
    learned = [set(read_config(other).labels) for other in against]
    labels = tuple(label for label in config.labels if all(label in of for of in learned))
    if not labels:
        raise DataError(f"`against` {', '.join(map(str, against))}: no label that both runs have learned")
    columns = [config.labels.index(label) for label in labels]
    return labels, scored._replace(
        scores=scored.scores[:, columns], target=scored.target[:, columns], mask=scored.mask[:, columns]
    )


def name_result(job: Job, name: str, chosen_by: Sequence[str] = ()) -> str:
    """What a run's scores of a split are named by, also where other conditions than the run's own chose its images."""
    result = result_name(job.config, job.shards.digest, name)
    return f"{result}-{hashlib.sha256(' '.join(chosen_by).encode()).hexdigest()[:8]}" if chosen_by else result


def name_comparison(result: str, against: Collection[Path]) -> str:
    """What a comparison is named by, apart from the plain evaluation, which would replace it."""
    return f"{result}-against-{'-'.join(other.name for other in against)}"[:200] if against else result


def find_scores(job: Job, name: str, against: Sequence[Path]) -> dict[Path, Path]:
    """The scores of a split by other runs: one of the same images or, where the run scores studies, any number.

    Raises DataError for a run that has none, with the command that writes them.
    """
    if len(against) > 1 and job.config.fusion is None:
        raise DataError("`against` takes one run beside a run by images; several are for a run by studies")
    found = {}
    for other in against:
        # Of these shards, where they are not those that it learned from; else of its own, which may be the same images.
        names = (result_name(read_config(other), job.shards.digest, name), name)
        files = [path for one in names if (path := other / f"scores-{one}.arrow").exists()]
        if not files:
            command = f"python -m train evaluate --run {other} --split {name}"
            raise DataError(f"`against` {other}: no scores-{name}.arrow; first run: {command}")
        found[other] = files[0]
    return found


def write_report(job: Job, file: str, results: Mapping[str, tuple[dict[str, Any], Scored]]) -> None:
    """Write the page of the splits that `evaluate` gave results for."""
    evaluations = {name: evaluation for name, (evaluation, _) in results.items()}
    images = {name: scored for name, (_, scored) in results.items()}
    path = job.run / "metrics.jsonl"
    lines = [] if job.members else path.read_bytes().splitlines()  # an ensemble was not trained as a whole
    history = [parse_object(path, line) for line in lines]
    settings = describe_settings(job)
    page = render_report(job.run.name, settings, history, evaluations, images, job.manifest.dataset)
    write_atomically(job.run / file, page.encode())


def describe_settings(job: Job) -> dict[str, Any]:
    """A run's configuration; of an ensemble, its members and theirs: all values where they differ."""
    configs = [asdict(member.job.config) for member in job.members] or [asdict(job.config)]
    settings = {
        name: value
        if all(one[name] == value for one in configs)
        else "; ".join(str(one[name]) for one in configs)
        for name, value in configs[0].items()
    }
    if settings["views"] == "all":  # of the shards, which may hold fewer
        settings["views"] = job.manifest.options.get("views", "all")
    return settings | ({"members": [str(member.job.run) for member in job.members]} if job.members else {})


def choice_score(line: Mapping[str, Any], choose_by: str) -> float | None:
    """The AUROC a checkpoint is chosen by, of a line of metrics.jsonl: the mean over the labels of `choose_by`.

    None where one of them has one class. `all` are the labels with 10 patients of each class, if there are any: on the
    real dev split these are all labels; on a small one the others would add chance alone.
    """
    if labels := parse_choice(choose_by):
        areas = [line["labels"][label] for label in labels]
        return None if None in areas else sum(areas) / len(areas)
    score: float | None = line["macro10_auroc"]
    return line["macro_auroc"] if score is None else score


def measure_run(job: Job) -> dict[str, Any]:
    """A finished run's AUROC on dev, by which its checkpoint was chosen, and what it compares with.

    `same` (on dev), `train` (on a part of it) and `valid`, with its limits `low` and `high`, are over the same `labels`
    (their number): those that the first is over and that have both classes in all of these.
    """
    names = job.config.labels
    scored = {"train": score_best(job, "train", most=TRAIN_SAMPLES).images}
    if "valid" in selected_splits(job):
        scored["valid"] = score_best(job, "valid").images
    labels = {name: report_auroc(names, *found[:4])["labels"] for name, found in scored.items()}
    labels["dev"] = read_object(job.run / "evaluation-dev.json")["labels"]
    means = averaged_labels(labels["dev"])
    same = [
        name
        for name in parse_choice(job.config.choose_by) or means["macro10"] or means["macro"]
        if all(of[name]["auroc"] is not None for of in labels.values())
    ]
    figures = {split: mean_of(of, same, "auroc") for split, of in labels.items()}
    limits: dict[str, float | None] = dict.fromkeys(("low", "high"))
    if "valid" in scored:
        limits = combine_limits(measure_areas(*scored["valid"][:4]), weigh_labels(names, same))
    return {
        "dev": load_best(job.run, job.config, job.device)[1]["dev_auroc"],
        "labels": len(same),
        "same": figures["dev"],
        "train": figures["train"],
        "valid": figures.get("valid"),
        **limits,
    }
