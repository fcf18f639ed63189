"""The commands of train.py that score with a run: evaluate, predict, export, adopt, localize.

Modules that need torch are imported only when a command runs.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.runs.config import READ, SCORED_BY, Assessment, Config, Setup, check_runs, read_config
from pipeline import console
from pipeline.base.errors import DataError
from pipeline.base.files import check_folder, hash_file, write_csv, write_json
from pipeline.base.options import option
from pipeline.base.pages import pictures
from pipeline.console import Fields, command, count_of, echo, pictures_option, refuse_usage, say, say_next
from pipeline.labels import MOST_VIEWS
from pipeline.measure.calibration import RULES, Calibration, Fit, apply_calibration, read_fit

if TYPE_CHECKING:
    from model.runs.predictor import Decision, Predictor

TRAIN = ("python", "-m", "train")  # in a clone, and from a wheel
# Settings of `adopt`
ADOPTED = ("arch", "init_labels", "image_size", "labels", "views", "where", "blank", "dev", "seed", "amp", "max_bad")
GROUP_HELP = "Score studies: files of a folder (study), of folders in one (patient), or with the same match of REGEX."
BOXES_HELP = "CSV with key,label,x,y,w,h in pixels of the original images, or CheXlocalize's gt_segmentations JSON."


@dataclass(frozen=True, kw_only=True)
class Place:
    """The run that a command makes or uses."""

    run: Path = option(..., "Folder of the run.", group="run")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs, or the ensemble, that a command uses, and thresholds for decisions on their scores."""

    runs: tuple[Path, ...] = option(..., "Folder of a run or an ensemble; several make one.", flag="run", group="run")
    threshold: str = option("none", "Also write decisions, by thresholds chosen on dev.", choices=(*RULES, "none"))
    png: Path | None = pictures_option()


@command("evaluate", Fields(Runs, ("runs", "png")), Assessment, Fields(Setup, SCORED_BY))
def evaluate_command(given: Runs, how: Assessment, setup: Setup) -> None:
    """Score the run's best checkpoint on a split; of several runs, the mean of their calibrated scores.

    The run's own --where and --views choose the images, unless others are given: train on one sex, score the other.

    Example: python -m train evaluate --run runs/first --split valid
    """
    setup = setup.checked(*given.runs)
    from model.ranks import listen
    from model.runs.predictor import open_predictor, open_scoring
    from model.runs.results import evaluate_split, name_results
    from pipeline.look.judged import print_evaluation

    listen()
    predictor = open_predictor(given.runs)
    alone = f"--out is for several --run: the results of {predictor.name} go into its folder"
    refuse_usage(how.out is not None and predictor.folder is not None, alone)
    run = open_scoring(predictor, how.out, setup)
    with pictures(given.png):
        evaluation = evaluate_split(run, predictor, how)
    print_evaluation(evaluation)
    for path in name_results(run, how):
        echo(f"{path}: written")
    say_next(*TRAIN, "predict", "--run", run.folder, "--out", "scores.csv", "IMAGES")


def print_run(folder: Path) -> None:
    """Print the evaluations of a run that has ended."""
    from pipeline.look.judged import tabulate_auroc, tabulate_verdicts
    from pipeline.measure.evaluation import MEANS, read_evaluation

    paths = [folder / f"evaluation-{name}.json" for name in ("dev", "valid")]
    evaluations = [read_evaluation(path) for path in paths if path.exists()]
    tabulate_auroc(evaluations).print()
    tabulate_verdicts(evaluations[-1]).print()
    name = evaluations[0].best_mean()
    mean = evaluations[0].get("auroc", name)
    if mean.low is not None and mean.low <= 0.5 and not read_config(folder).adopted:
        guess = f"dev AUROC ({MEANS[name]}) is {mean.low:.2f} to {mean.high:.2f}, not distinguishable from chance"
        say(f"{folder}: {guess}: try a lower `lr`, more `epochs` or more images")
    echo(f"{folder / 'report.html'}: the same with curves, intervals and subgroups")
    say_next(*TRAIN, "predict", "--run", folder, "--out", "scores.csv", "IMAGES")


def repeat(option: str, values: Iterable[object]) -> list[object]:
    """The words of a repeated option."""
    return [word for value in values for word in (option, value)]


def check_pattern(text: str) -> None:
    """Raise DataError if the text is not a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise DataError(f"'{text}' is not a regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Options of `predict`."""

    images: tuple[Path, ...] = option(..., argument=True, type=console.EXISTING)
    out: Path = option(..., "CSV to write.", type=console.FILE)
    strict: bool = option(False, "Exit with 3 if an image cannot be read.")
    group_by: str | None = option(
        None, GROUP_HELP, check=check_pattern, metavar="study|patient|REGEX", shown="none; for a run on studies, study"
    )
    heatmaps: Path | None = option(None, "Also write heat maps to this folder.", type=console.FOLDER, metavar="DIR")
    heatmap_labels: int = option(1, "Number of labels per image, by score.", low=1)


@command("predict", Fields(Runs, ("runs", "threshold")), Prediction, Fields(Setup, ("workers",)))
def predict_command(chosen: Runs, given: Prediction, setup: Setup) -> int:
    """Score IMAGES (JPEG, PNG or DICOM files, or folders of them) by the run's best checkpoint: calibrated scores.

    Of several runs, the mean of their calibrated scores. A run on studies scores the images of a study together;
    --group-by combines scores of images, as evaluate does.

    Example: python -m train predict --run runs/first --out scores.csv images/
    """
    from model.runs.views import find_images, group_files

    out, by = given.out, given.group_by
    check_folder(out)
    files = find_images(given.images)
    same = out.exists() and any(file.exists() and file.samefile(out) for file in files)
    refuse_usage(same, f"--out {out} is one of the images")
    check_runs(chosen.runs)
    from model.runs.predictor import open_predictor

    predictor = open_predictor(chosen.runs)
    config = predictor.config
    combined = by is not None and config.fusion is None  # scores of images
    by_study = by is not None or config.fusion is not None
    alone = "--heatmaps is for single images and one run, not for studies or several networks"
    refuse_usage(given.heatmaps is not None and (by_study or len(predictor.configs) > 1), alone)
    most = math.inf if config.fusion is None else MOST_VIEWS
    samples = group_files(files, by or (None if config.fusion is None else "study"), most)
    decision = predictor.decide(chosen.threshold, "study" if combined else "image")
    raw, bad = predictor.score_files(list(samples.values()), setup.workers, decision.combine)
    for file, reason in bad:
        say(f"{file}: {reason}")
    if len(bad) == len(files):
        kept = f"{out} is left as it was" if out.exists() else f"{out} is not written"
        raise DataError(f"none of {count_of(len(files), 'image')} can be read; {kept}")
    scores, decided = decision.apply(config.labels, raw)
    facts = {"run": predictor.name, "shards": config.manifest, "threshold_rule": decision.rule}
    positive = [f"{label} positive" for label in config.labels[: decided.shape[1]]]
    rows: list[list[object]] = [["study" if by_study else "file", *config.labels, *positive, *facts]]
    for name, values in zip(samples, np.hstack([scores, decided]).tolist(), strict=True):
        rows.append([name, *map(show_number, values), *facts.values()])
    write_csv(out, rows)
    of_studies = f" in {len(samples):,} stud{'y' if len(samples) == 1 else 'ies'}" if by_study else ""
    echo(f"{out}: scores of {count_of(len(files) - len(bad), 'image')}{of_studies}, {len(bad):,} unusable")
    if given.heatmaps is not None:
        from model.runs.explain import write_heatmaps

        (member,) = predictor.members
        count = write_heatmaps(member, files, scores, given.heatmaps, given.heatmap_labels)
        echo(f"{given.heatmaps}: {count_of(count, 'heat map')}")
    if config.fusion is None:
        say_next(*TRAIN, "export", *repeat("--run", chosen.runs), "--out", "model.onnx")
    return 3 if given.strict and bad else 0


def show_number(value: float) -> str:
    """A score with 9 significant digits; near 1 with 17, so that rounding creates no ties. "" for NaN."""
    return "" if math.isnan(value) else f"{value:.{9 if value < 0.999 else 17}g}"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Options of `export`."""

    out: Path = option(..., ".onnx or .pt2", type=console.FILE)


@command("export", Fields(Runs, ("runs", "threshold")), Export)
def export_command(chosen: Runs, given: Export) -> None:
    """Write the run's best network for other programs: uint8 images [B, 1, H, W] in, calibrated scores [B, L] out.

    Of several runs, one network for all. With --threshold also decisions, bool [B, L]. The L labels are those that the
    run learned, in their usual order.

    Example: python -m train export --run runs/first --out model.onnx
    """
    check_folder(given.out)
    check_runs(chosen.runs)
    from model.export import Reading, Scorer, export_scorer
    from model.runs.predictor import open_predictor

    predictor = open_predictor(chosen.runs)
    config = predictor.config
    if config.fusion:
        raise DataError(f"{predictor.name}: only networks for images can be exported, not for studies")
    if len({member.shape for member in predictor.configs.values()}) > 1:
        raise DataError(f"{predictor.name}: the members have different `image_size`, so one file cannot hold them")
    decision = predictor.decide(chosen.threshold)

    def read_fits(fits: Mapping[str, Calibration] | None) -> list[Fit | None]:
        return [] if fits is None else [read_fit(fits[label]) for label in config.labels]

    members = []
    for member in predictor.members:
        scale, fits = (member.pixels["mean"], member.pixels["std"]), read_fits(member.calibration)
        members.append(Reading(member.network, config.columns, *scale, fits))
    scorer = Scorer(members, read_fits(decision.calibration), decision.limits)
    difference = export_scorer(scorer, config.shape, given.out, describe_export(predictor, decision))
    echo(f"{given.out}: checked, within {difference:.1e} of the eager network's logits")
    echo(f"its scores: {', '.join(config.labels)}")
    if given.out.suffix == ".onnx":
        say_next("python", given.out.with_name("score.py"), given.out, "IMAGES")


def describe_export(predictor: "Predictor", decision: "Decision") -> dict[str, str]:
    """The metadata of an exported network, as text. Thresholds apply to its scores."""
    from model.runs.folder import describe_start
    from pipeline.look.judge_report import WARNING

    config, members, calibration = predictor.config, predictor.members, decision.calibration or {}
    dataset = members[-1].dataset
    thresholds: dict[str, dict[str, float | None]] = {rule: {} for rule in RULES}
    for label, fit in calibration.items():
        for rule, limit in fit["thresholds"].items():
            thresholds[rule][label] = None if limit is None else float(apply_calibration(np.array([limit]), fit)[0])
    return {
        "labels": json.dumps(config.labels),
        "image_size": json.dumps(config.shape),
        "images": json.dumps(members[-1].images._asdict()),
        "run": predictor.name,
        "shards": config.manifest,
        "normalization": json.dumps([dict(member.pixels) for member in members]),
        "member_calibrations": json.dumps([member.calibration for member in members]),
        "calibration": json.dumps(calibration),
        "thresholds": json.dumps(thresholds),
        "threshold_rule": decision.rule,
        "dataset": dataset.get("title", "not stated"),
        "license": dataset.get("license", "not stated"),
        "started_from": "; ".join(dict.fromkeys(describe_start(asdict(item)) for item in predictor.configs.values())),
        "use": WARNING,
    }


@command("adopt", Place, Fields(Setup, (*READ, "workers", "init")), Fields(Config, ADOPTED))
def adopt_command(place: Place, setup: Setup, config: Config) -> None:
    """Make a run of the weights of --init without training: calibrated on dev, and evaluated on dev and valid.

    Labels that the weights have no output for are left out.

    Example: python -m train adopt --init xrv:densenet121-res224-all --shards shards --run runs/xrv
    """
    setup = setup.checked()
    from model.runs.results import adopt_weights

    adopt_weights(config, setup, place.run)
    print_run(place.run)


@dataclass(frozen=True, kw_only=True)
class Localization:
    """Options of `localize`."""

    boxes: Path = option(..., BOXES_HELP, type=console.EXISTING_FILE)
    splits: tuple[str, ...] = option(("valid",), "Split of the shards; several are pooled.", flag="split")


@command("localize", Place, Localization, Fields(Setup, (*READ, "shared_images")))
def localize_command(place: Place, given: Localization, setup: Setup) -> None:
    """Measure how often the run's heat maps hit what readers marked, and how much they overlap.

    Baselines: chance, and the average heat map of other patients.

    Example: python -m train localize --run runs/first --boxes boxes.csv --split valid
    """
    folder, splits, boxes = place.run, given.splits, given.boxes
    setup = setup.checked(folder)
    from model.ranks import listen
    from model.runs.explain import draw_cells, tabulate_localization
    from model.runs.folder import result_name
    from model.runs.run import Run
    from pipeline.measure.localization import measure_localization, read_marks

    listen()
    run = Run(read_config(folder), setup.open(), folder, setup)
    marks = read_marks(boxes)
    cells = list(draw_cells(run, splits, marks))
    if not cells:
        raise DataError(f"{boxes}: no cell of {', '.join(splits)} in {run.shards} that this run learned")
    results = measure_localization(cells)
    path = folder / f"localization-{result_name(run.config, run.shards.digest, '+'.join(splits))}.json"
    write_json(path, {"splits": list(splits), "boxes": hash_file(boxes)} | results)
    tabulate_localization(results).print()
    echo(f"{path}: {len(cells):,} of the {sum(map(len, marks.values())):,} cells in {boxes}")
    if run.shards.digest == run.config.manifest and not {"train", "dev"}.isdisjoint(splits):
        say("Warning: the run was trained on train, and dev chose its weights: it has seen these images")
    say_next(*TRAIN, "evaluate", "--run", folder, *repeat("--shards", setup.shards), "--split", splits[0], "--sanity")


COMMANDS = (adopt_command, evaluate_command, predict_command, export_command, localize_command)
