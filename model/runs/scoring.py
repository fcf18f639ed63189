"""A trained run → scores and evaluation of a split, or of image files."""

import contextlib
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from model.fusion import UNKNOWN_FRONTAL
from model.predict import InterruptedEvaluationError, predict_scores
from model.runs.config import Config, learnt_columns, read_config
from model.runs.job import (
    Job,
    Selected,
    agree,
    choose_device,
    load_best,
    open_images,
    open_rows,
    result_name,
    selected_splits,
    to_device,
    view_tensors,
)
from model.runs.report import MEANS, render_model_card, render_report
from model.runs.scores import read_frame, read_scores, write_scores
from pipeline.base.errors import DataError
from pipeline.base.files import parse_object, read_object, write_atomically, write_json
from pipeline.console import Advance, progress_bar
from pipeline.images import Gray, ImageError, ImageOptions, decode_stored, prepare, resize
from pipeline.labels import PROJECTIONS, count_rows
from pipeline.measure.compare import combine_views, compare_methods, group_by_views
from pipeline.measure.delong import combine_limits, measure_areas, weigh_labels
from pipeline.measure.evaluate import Scored, assess, calibrate
from pipeline.measure.metrics import averaged_labels, mean_of, report_auroc
from pipeline.policies import check_blank_policy, evaluation_targets
from pipeline.stream.batches import Batch, Labels, stream_evaluation
from pipeline.stream.plan import plan_evaluation
from pipeline.stream.samples import StudyBatch, stream_studies

EVALUATION_BATCH = 64  # images
RESAMPLES = 1000  # of patients, for intervals of AUPRC
TRAIN_SAMPLES = 2000  # that a sweep scores of train
CALIBRATION = "calibration.json"
Scores = npt.NDArray[np.float32]


def finish_run(job: Job) -> None:
    """Choose thresholds on dev, evaluate best.pt on dev and valid, and write report.html and model-card.md."""
    splits = selected_splits(job)
    names: list[str] = [name for name in ("dev", "valid") if name in splits]
    found = {name: score_best(job, name) for name in names}
    if not job.ranks.is_first:
        return
    (job.run / CALIBRATION).unlink(missing_ok=True)  # one of an earlier best.pt
    results = {name: evaluate(job, name, found[name]) for name in names}
    evaluations = {name: evaluation for name, (evaluation, _) in results.items()}
    print_evaluations(evaluations)
    config = asdict(job.config)
    write_report(job, "report.html", results)
    data = {}
    for name in splits:
        split, rows = open_images(job, name)
        data[name] = count_rows(split.table.take(rows))
    card = render_model_card(job.run.name, config, data, evaluations)
    write_atomically(job.run / "model-card.md", card.encode())
    print(f"{job.run / 'report.html'}: the same with curves, intervals and subgroups")


def evaluate(
    job: Job,
    name: str,
    found: tuple[Scored, pa.Table],
    against: Mapping[Path, Path] = MappingProxyType({}),
    sensitivity: float = 0.9,
    combine: str = "max",
    chosen_by: tuple[str, ...] = (),
    shared: Mapping[str, int | None] = MappingProxyType({}),
) -> tuple[dict[str, Any], Scored]:
    """Evaluate what `score_best` found for a split; writes its scores and evaluation into the run.

    `against` are other runs and their scores, as `find_scores` has them. `sensitivity` is what the third threshold
    is to reach on dev, `combine` how a study's score comes from its views: max or mean. `chosen_by` are the conditions
    that chose the images, where they are not the run's own; they and `shared`, as `check_evaluation` counts it, are
    kept in the evaluation. Raises DataError where thresholds would have to be chosen on other shards than the run's.
    """
    config, run = job.config, job.run
    scored, table = found
    result = name_result(job, name, chosen_by)
    write_scores(run / f"scores-{result}.arrow", table, config.labels, scored.scores)
    chosen = {"sensitivity": sensitivity, "combine": combine}
    calibration = read_object(run / CALIBRATION) if (run / CALIBRATION).exists() else {}
    if not chosen.items() <= calibration.items():
        if result_name(config, job.shards, name) != name:  # whose dev may hold patients of the run's train
            raise DataError(
                f"{job.shards}: not the shards that {run} learnt from, on whose dev thresholds are chosen; first run: "
                f"python train.py evaluate --run {run} --sensitivity {sensitivity} --study {combine} with those"
            )
        dev = scored if result == "dev" else score_best(job, "dev")[0]
        calibration = calibrate(config.labels, dev, sensitivity, combine)
        write_json(run / CALIBRATION, calibration)
    unit = "image" if config.fusion is None else "study"
    evaluation = assess(config.labels, scored, calibration, unit=unit, resamples=RESAMPLES)
    evaluation |= shared
    evaluation |= {"chosen_by": list(chosen_by)} if chosen_by else {}
    if against:
        labels, common = shared_labels(config, against), scored
        if labels != config.labels:
            columns = [config.labels.index(label) for label in labels]
            common = scored._replace(
                scores=scored.scores[:, columns],
                target=scored.target[:, columns],
                mask=scored.mask[:, columns],
            )
        if config.fusion is None:
            ((other, path),) = against.items()
            theirs = (str(other), read_scores(path, table["key"], labels))
            compared = assess(labels, common, calibration, unit=unit, against=theirs, resamples=RESAMPLES)
            ours = {mean: compared[f"{mean}_auroc"] for mean in MEANS}
            evaluation["against"] = {"labels": list(labels), "ours": ours, **compared["against"]}
            evaluation["study"]["against"] = compared["study"]["against"]
        else:
            methods: dict[str, pd.DataFrame] = {}
            for other, path in against.items():
                methods |= combine_views(read_frame(path, labels), str(other))
            views = group_by_views(open_images(job, name)[0].table)
            evaluation["methods"] = compare_methods(
                labels, common, f"{run}, {config.fusion} fusion", methods, views
            )
    write_json(run / f"evaluation-{name_comparison(result, against)}.json", evaluation)
    return evaluation, scored


def name_result(job: Job, name: str, chosen_by: Sequence[str] = ()) -> str:
    """What a run's scores of a split are named by, also where other conditions than the run's own chose its images."""
    result = result_name(job.config, job.shards, name)
    return f"{result}-{hashlib.sha256(' '.join(chosen_by).encode()).hexdigest()[:8]}" if chosen_by else result


def name_comparison(result: str, against: Collection[Path]) -> str:
    """What a comparison is named by, apart from the plain evaluation, which would replace it."""
    return f"{result}-against-{'-'.join(other.name for other in against)}"[:200] if against else result


def shared_labels(config: Config, against: Collection[Path]) -> tuple[str, ...]:
    """The labels that a run and all of those it is compared with have learnt. Raises DataError where there is none."""
    labels = [set(read_config(other).labels) for other in against]
    shared = tuple(label for label in config.labels if all(label in of for of in labels))
    if not shared:
        raise DataError(f"--against {', '.join(map(str, against))}: no label that both runs have learnt")
    return shared


def find_scores(job: Job, name: str, against: Sequence[Path]) -> dict[Path, Path]:
    """The scores of a split by other runs: one of the same images or, where the run scores studies, any number.

    Raises DataError for a run that has none, with the command that writes them.
    """
    if len(against) > 1 and job.config.fusion is None:
        raise DataError("--against takes one run beside a run by images; several are for a run by studies")
    found = {}
    for other in against:
        # Of these shards, where they are not those that it learnt from; else of its own, which may be the same images.
        names = (result_name(read_config(other), job.shards, name), name)
        files = [path for one in names if (path := other / f"scores-{one}.arrow").exists()]
        if not files:
            command = f"python train.py evaluate --run {other} --split {name}"
            raise DataError(f"--against {other}: no scores-{name}.arrow; first run: {command}")
        found[other] = files[0]
    return found


def write_report(job: Job, file: str, results: Mapping[str, tuple[dict[str, Any], Scored]]) -> None:
    """Write the page of the splits that `evaluate` gave results for."""
    evaluations = {name: evaluation for name, (evaluation, _) in results.items()}
    images = {name: scored for name, (_, scored) in results.items()}
    path = job.run / "metrics.jsonl"
    history = [parse_object(path, line) for line in path.read_bytes().splitlines()]
    page = render_report(job.run.name, asdict(job.config), history, evaluations, images)
    write_atomically(job.run / file, page.encode())


def measure_run(job: Job) -> dict[str, Any]:
    """A finished run's dev macro AUROC, by which its checkpoint was chosen, and what it compares with.

    `same` (on dev), `train` (on a part of it) and `valid`, with its limits `low` and `high`, are over the same `labels`
    (their number): those that dev's macro is over and that have both classes in all of these.
    """
    names = job.config.labels
    network, best = load_best(job.run, job.config, job.device)
    chosen = open_rows(job, "train")
    part = chosen.thin(math.ceil(len(chosen.rows) / TRAIN_SAMPLES))
    scored = {"train": score_split(job, network, part, best["pixels"])[0]}
    if "valid" in selected_splits(job):
        scored["valid"] = score_split(job, network, open_rows(job, "valid"), best["pixels"])[0]
    labels = {name: report_auroc(names, *found[:3])["labels"] for name, found in scored.items()}
    labels["dev"] = read_object(job.run / "evaluation-dev.json")["labels"]
    means = averaged_labels(labels["dev"])
    same = [
        name
        for name in means["macro10"] or means["macro"]
        if all(of[name]["auroc"] is not None for of in labels.values())
    ]
    figures = {split: mean_of(of, same, "auroc") for split, of in labels.items()}
    limits: dict[str, float | None] = dict.fromkeys(("low", "high"))
    if "valid" in scored:
        limits = combine_limits(measure_areas(*scored["valid"][:4]), weigh_labels(names, same))
    return {
        "dev": best["dev_auroc"],
        "labels": len(same),
        "same": figures["dev"],
        "train": figures["train"],
        "valid": figures.get("valid"),
        **limits,
    }


def score_best(job: Job, name: str) -> tuple[Scored, pa.Table]:
    """What best.pt makes of a split, and the rows of its table."""
    network, best = load_best(job.run, job.config, job.device, job.ranks)
    return score_split(job, network, open_rows(job, name), best["pixels"])


def score_split(
    job: Job, network: nn.Module, chosen: Selected, pixels: Mapping[str, float]
) -> tuple[Scored, pa.Table]:
    """A network's scores of the chosen rows, with targets and masks that leave the uncertain cells out.

    And those rows of the table. Images that are unusable, as far as --max-bad allows it, are in neither.
    A run by studies scores these, and the rows are those of their first images.
    Each rank scores its share of the rows, and all get the scores of all.
    """
    config, split, rows = job.config, chosen.split, chosen.rows
    columns = learnt_columns(config)
    labels = Labels(*evaluation_targets(split.table, check_blank_policy(job.manifest.policies["blank"])))
    reading: dict[str, Any] = {
        "size": config.image_size,
        "threads": job.workers,
        "max_bad": int(config.max_bad * len(chosen.images)),
    }
    sharing: dict[str, Any] = {"rank": job.ranks.rank, "ranks": job.ranks.count}
    batches: Iterable[Batch | StudyBatch]
    if chosen.studies is None:
        batches = stream_evaluation(
            split, labels, batch_size=EVALUATION_BATCH, rows=rows, **sharing, **reading
        )
    else:
        plan = partial(plan_evaluation, len(rows), EVALUATION_BATCH, **sharing)
        batches = stream_studies(plan, split, chosen.studies, labels, **reading)
    bad, ours = np.zeros(len(rows)), np.zeros(len(rows), bool)

    def samples(advance: Advance) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            start = batch.step.step * EVALUATION_BATCH
            bad[[start + position for position in batch.bad]] = 1
            ours[start : start + len(batch.images)] = True
            yield view_tensors(batch, job.device)
            advance(min(int(ours.sum()) * job.ranks.count, len(rows)), len(rows))

    with (
        progress_bar(f"Scoring {split.name}", "images" if chosen.studies is None else "studies") as advance,
        contextlib.suppress(InterruptedEvaluationError),
    ):
        found = predict_scores(
            network,
            columns,
            samples(advance),
            pixels["mean"],
            pixels["std"],
            job.precision,
            should_stop=job.stop,
        )
    agree(job)
    if job.stop.code:
        raise InterruptedEvaluationError
    scores = np.zeros((len(rows), len(columns)))
    scores[ours] = found
    scores = job.ranks.sum(scores).astype(np.float32)
    usable = job.ranks.sum(bad) == 0
    rows = rows[usable]
    facts = split.table.take(rows)
    scored = Scored(
        scores[usable],
        labels.target[rows][:, columns],
        labels.mask[rows][:, columns],
        facts["patient"].to_numpy(),
        facts["study"].to_numpy(),
        facts["sex"].to_numpy(),
        pc.fill_null(facts["age"], -1).to_numpy(),
        pc.fill_null(facts["projection"], "").to_numpy(),
    )
    return scored, facts


def score_files(
    run: Path, config: Config, samples: Sequence[Sequence[Path]], workers: int
) -> tuple[Scores, list[tuple[Path, str]]]:
    """Scores [N, L] by best.pt of samples: image files one by one or, for a run by studies, a study's together.

    NaN where none of a sample's files can be read; and which files cannot, and why. An image takes the way it
    would take through shards: the same resize, encoding and decoding. A view is a lateral if its name says so,
    else a frontal that may be AP or PA.
    """
    device, precision = choose_device(config.amp)
    network, best = load_best(run, config, device)
    options = ImageOptions(**best["images"])
    bad: list[tuple[Path, str]] = []
    usable = np.ones(len(samples), bool)

    def read(file: Path) -> Gray | str:
        try:
            stored = prepare(file.read_bytes(), options).data
            return resize(decode_stored(stored, options.encoding), config.image_size, config.image_size)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except ImageError as error:
            return str(error)

    def batches(advance: Advance) -> Iterator[tuple[Tensor, ...]]:
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(samples), EVALUATION_BATCH):
                some = samples[start : start + EVALUATION_BATCH]
                shape = len(some), max(map(len, some))
                images = np.zeros((*shape, 1, config.image_size, config.image_size), np.uint8)
                present, projection = np.zeros(shape, bool), np.zeros(shape, np.int8)
                places = [(row, view) for row, files in enumerate(some) for view in range(len(files))]
                files = [some[row][view] for row, view in places]
                for place, file, pixels in zip(places, files, pool.map(read, files), strict=True):
                    if isinstance(pixels, str):
                        bad.append((file, pixels))
                    else:
                        images[place], present[place] = pixels, True
                        lateral = "lateral" in file.name.lower()
                        projection[place] = PROJECTIONS.index("lateral") if lateral else UNKNOWN_FRONTAL
                usable[start : start + len(some)] = present.any(axis=1)
                if config.fusion is None:
                    yield (to_device(images[:, 0], device),)
                else:
                    arrays = images[present], present, projection
                    yield tuple(to_device(array, device) for array in arrays)
                advance(start + len(some), len(samples))

    pixels = best["pixels"]
    with progress_bar("Scoring", "images" if config.fusion is None else "studies") as advance:
        scores = predict_scores(
            network, learnt_columns(config), batches(advance), pixels["mean"], pixels["std"], precision
        )
    scores[~usable] = np.nan
    return scores, bad


def print_evaluations(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of AUROC for one or more splits: per label with its positives and negatives, means with intervals."""
    table = Table(title="AUROC", title_justify="left")
    table.add_column("label")
    for split in reports:
        table.add_column(split, justify="right")
        table.add_column("pos / neg", justify="right")
    for name in next(iter(reports.values()))["labels"]:
        labels = [report["labels"][name] for report in reports.values()]
        cells = [
            (
                show(label["auroc"]),
                f"{'few ' if label['few'] else ''}{label['positives']} / {label['negatives']}",
            )
            for label in labels
        ]
        table.add_row(name, *(text for cell in cells for text in cell))
    table.add_section()
    for name, title in MEANS.items():
        limits = [report["intervals"]["auroc"][name] for report in reports.values()]
        cells = [
            (
                show(report[f"{name}_auroc"]),
                f"{show(of['low'])}-{show(of['high'])}" if of["low"] is not None else "",
            )
            for report, of in zip(reports.values(), limits, strict=True)
        ]
        table.add_row(title, *(text for cell in cells for text in cell))
    Console().print(table)


def print_comparison(evaluation: Mapping[str, Any]) -> None:
    """A table of what --against asked for: a run by images beside another, or the methods that score studies."""
    table = Table(title="Compared on the same patients", title_justify="left")
    table.add_column("")
    for title in ("AUROC", "difference [95 %]"):
        table.add_column(title, justify="right")
    if "against" in evaluation:
        compared = evaluation["against"]
        if len(compared["labels"]) < len(evaluation["labels"]):
            table.caption = f"over the {len(compared['labels'])} labels that both runs have learnt"
        for name, title in MEANS.items():
            table.add_row(title, show(compared["ours"][name]), show_difference(compared["auroc"][name]))
    for group, found in evaluation.get("methods", {}).items():
        ours, *others = found["methods"].items()
        if ours[1]["auroc"] is not None:
            table.add_section()
            table.add_row(f"{group}: {found['studies']:,} studies")
            table.add_row(ours[0], show(ours[1]["auroc"]))
            for name, method in others:
                less = show_difference(method["first_less_this"]["mean"])
                table.add_row(name, show(method["auroc"]), less)
    if table.row_count:
        Console().print(table)


def show_difference(less: Mapping[str, Any]) -> str:
    """The first one's figure less this one's, with its interval."""
    if less["difference"] is None:
        return "–"
    limits = "" if less["low"] is None else f" [{less['low']:+.3f}, {less['high']:+.3f}]"
    return f"{less['difference']:+.3f}{limits}"


def show(value: float | None) -> str:
    """A figure with three places; an undefined one as a dash."""
    return "–" if value is None else f"{value:.3f}"
