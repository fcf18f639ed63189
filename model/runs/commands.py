"""The commands of train.py: parse, call, print."""

import gc
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from model.export import Scorer, export_scorer
from model.predict import InterruptedEvaluationError
from model.ranks import join_ranks
from model.runs.config import Config, learnt_columns, options, read_config
from model.runs.folder import load_best
from model.runs.job import Job, StopFlag, choose_device, open_job
from model.runs.options import (
    DATA_OPTIONS,
    GroupedCommand,
    GroupedOption,
    config_options,
    run_option,
    with_options,
    workers_option,
)
from model.runs.overlap import check_evaluation
from model.runs.results import (
    choice_score,
    evaluate,
    find_scores,
    measure_run,
    name_comparison,
    name_result,
    write_report,
)
from model.runs.scoring import score_best, score_files
from model.runs.summary import print_comparison, print_evaluations
from pipeline.base.errors import DataError, SettingError
from pipeline.base.files import read_object, write_csv
from pipeline.console import Checked, Number, say
from pipeline.labels import MOST_VIEWS, VIEWS
from pipeline.manifest import read_manifest
from pipeline.stream.cache import find_shards

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SWEPT = (
    "lr",
    "weight_decay",
    "batch_size",
    "arch",
    "uncertain",
)  # options of which a sweep takes several values
Train = Callable[..., int]  # train.train


class TrainByDefault(click.Group):
    """A group whose command `train` needs not be named, and is the only one for several ranks."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `train` in front of options."""
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["train", *args]
        if args and args[0] != "train" and "RANK" in os.environ:
            raise click.UsageError(f"{args[0]} is for one process: start it without torchrun")
        return super().parse_args(ctx, args)


@click.group(cls=TrainByDefault, context_settings={"show_default": True})
def main() -> None:
    """Train, sweep, evaluate, predict, export. Without a command's name: train."""


JOB_OPTIONS = [
    click.option(
        "--init",
        cls=GroupedOption,
        group="network",
        metavar="FILE",
        type=click.Path(path_type=Path, exists=True),
        help="Start from these weights, or those of a run.",
    ),
    click.option(
        "--teacher",
        cls=GroupedOption,
        group="labels",
        metavar="RUN",
        type=click.Path(path_type=Path),
        help="selftrained: learn from this run's scores.",
    ),
    click.option(
        "--strict",
        cls=GroupedOption,
        group="labels",
        is_flag=True,
        help="Refuse labels with one class in train instead of warning.",
    ),
    click.option(
        "--wandb",
        cls=GroupedOption,
        group="run",
        metavar="PROJECT",
        help="Send the logs to Weights & Biases too.",
    ),
]


@main.command(
    "train",
    cls=GroupedCommand,
    epilog="Example: python train.py --shards shards --run runs/first --lr 1e-4 --weight-decay 1e-2",
)
@with_options(run_option, *DATA_OPTIONS, *config_options(), *JOB_OPTIONS)
@click.pass_obj
def train_command(train: Train, /, **given: Any) -> int:
    """Train a network on shards; the same command continues an interrupted run."""
    with join_ranks() as ranks:
        config, others = split_options(given)
        job = start_job(config, **others, stop=StopFlag().listen(), ranks=ranks)
        code = train(job)
        if code == 0 and job.ranks.is_first:
            print_run(job)
        return code


def split_options(given: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The configuration that options of `train` give, and the options that are not part of it."""
    known = options()
    fields = {name: value for name, value in given.items() if name in known and value is not None}
    return Config(**fields), {name: value for name, value in given.items() if name not in known}


def start_job(config: Config, shards: str, run: Path, **others: Any) -> Job:
    """The job of `open_job`. Raises UsageError for options that do not go together."""
    try:
        return open_job(config, shards, run, **others)
    except SettingError as error:
        raise click.UsageError(str(error)) from None


def print_run(job: Job) -> None:
    """Print the evaluations of a run that has ended."""
    paths = {name: job.run / f"evaluation-{name}.json" for name in ("dev", "valid")}
    print_evaluations({name: read_object(path) for name, path in paths.items() if path.exists()})
    click.echo(f"{job.run / 'report.html'}: the same with curves, intervals and subgroups")


def refuse_run(_: click.Context, param: click.Parameter, value: str | None) -> None:
    """Raise UsageError for --run, which a command line of `train` may have brought along."""
    if value is not None:
        raise click.UsageError(
            f"--{param.name} is for one run: those of a sweep are in its folder, by --sweep"
        )


@main.command(
    "sweep",
    cls=GroupedCommand,
    epilog='Example: python train.py sweep --sweep runs/sweep --lr "1e-4 1e-3" --weight-decay "1e-4 1e-2" --epochs 3',
)
@click.option(
    "--sweep",
    "folder",
    cls=GroupedOption,
    group="sweep",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the sweep.",
)
@click.option("--run", hidden=True, expose_value=False, callback=refuse_run)
@click.option(
    "--sampler",
    cls=GroupedOption,
    group="sweep",
    default="grid",
    type=click.Choice(["grid", "tpe"]),
    help="tpe: search between the values.",
)
@click.option("--trials", cls=GroupedOption, group="sweep", type=click.IntRange(1), help="tpe: how many.")
@click.option(
    "--pruner",
    cls=GroupedOption,
    group="sweep",
    default="none",
    type=click.Choice(["none", "median", "halving"]),
    help="Ends poor trials early.",
)
@click.option(
    "--storage",
    cls=GroupedOption,
    group="sweep",
    metavar="URL",
    help="A database for processes on several machines.  [default: SQLite in the folder]",
)
@click.option(
    "--grace",
    cls=GroupedOption,
    group="sweep",
    default=120,
    type=click.IntRange(3),
    help="Seconds until a silent process loses its trial.",
)
@with_options(*DATA_OPTIONS, *config_options(several=SWEPT), *JOB_OPTIONS)
@click.pass_obj
def sweep_command(
    train: Train,
    /,
    folder: Path,
    sampler: str,
    trials: int | None,
    pruner: str,
    storage: str | None,
    grace: int,
    **given: Any,
) -> int:
    """Train with all combinations of the values of --lr, --weight-decay, --batch-size, --arch and --uncertain.

    Several values are separated by spaces or commas; or search between them. Every trial is a run as `train` makes
    it. The same command continues a sweep; started again meanwhile, it shares the work.
    """
    try:
        from model.runs import sweep as s
        from model.runs.sweep_report import write_sweep_report
    except ImportError as error:
        raise DataError(f"{error.name} is missing: pip install '.[sweep]'") from None
    if sampler == "tpe" and trials is None:
        raise click.UsageError("--sampler tpe needs --trials")
    if sampler == "grid" and trials is not None:
        raise click.UsageError("--trials needs --sampler tpe: a grid has as many as combinations")
    stop = StopFlag().listen()
    tried = {name: given.pop(name) for name in SWEPT}
    tried = {name: values for name, values in tried.items() if values is not None}
    base, others = split_options(given)

    def make(point: Mapping[str, Any], run: Path) -> Job:
        return start_job(replace(base, **point), run=run, **others, stop=stop)

    unused = folder / "trials" / "unused"
    point = {name: values[0] for name, values in tried.items()}
    first = make(point, unused)
    # A value that does not go with the options is refused before any point is trained.
    for name, values in tried.items():
        for value in values[1:]:
            make({**point, name: value}, unused)
    shared = {name: value for name, value in asdict(first.config).items() if name not in tried}
    sweep = s.Sweep(
        folder, tried, shared, sampler, trials or 0, pruner, base.epochs, base.seed, grace, storage
    )

    started = False

    def train_point(point: Mapping[str, Any], run: Path, watch: s.Watch) -> s.Outcome | None:
        nonlocal started
        started = True
        job = make(point, run)
        torch.compiler.reset()  # it gives up after several networks in one process
        gc.collect()  # a trial that failed is held by its traceback, and so is its memory
        torch.cuda.empty_cache()
        if train(job, lambda history: watch([summarise(line) for line in history])):
            return None
        try:
            return s.Outcome(**measure_run(job))
        except InterruptedEvaluationError:
            return None

    try:
        done = s.run_sweep(sweep, train_point, stop)
    except BaseException:
        if started:  # an error in one trial: the outcomes of the others deserve a report
            write_sweep_report(sweep, s.list_trials(sweep))
        raise
    found = s.list_trials(sweep)
    write_sweep_report(sweep, found)
    complete, failed = (sum(trial.state == state for trial in found) for state in ("complete", "failed"))
    of_failed = f", {failed} failed" if failed else ""
    click.echo(f"{folder / 'report.html'}: {complete} trials complete{of_failed}")
    return stop.code if not done else 1 if failed and not complete else 0


def summarise(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep keeps of an evaluation; `score` is what trials are compared by."""
    kept = ("epoch", "train_loss", "macro_auroc", "macro10_auroc")
    return {name: line[name] for name in kept} | {"score": choice_score(line)}


@main.command("evaluate", epilog="Example: python train.py evaluate --run runs/first --split valid")
@with_options(run_option, *DATA_OPTIONS)
@click.option("--split", default="valid", help="Of the shards, which may be others than the run's.")
@click.option(
    "--against",
    multiple=True,
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Compare with its scores; a run by studies with those of several.",
)
@click.option(
    "--sensitivity", default=0.9, type=Number(0, 1), help="Sensitivity the third threshold must reach on dev."
)
@click.option(
    "--study", default="max", type=click.Choice(["max", "mean"]), help="A study's score, from its views'."
)
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Score these images instead of those chosen by the run's own conditions: sex=Male.",
)
@click.option("--views", type=click.Choice(VIEWS), show_default="the run's", help="Score these views.")
@click.option("--shared-images", is_flag=True, help="Go on where the run trained on some of the images.")
def evaluate_command(
    shards: str,
    cache: Path,
    cache_size: int,
    run: Path,
    workers: int,
    split: str,
    against: tuple[Path, ...],
    sensitivity: float,
    study: str,
    where: tuple[str, ...],
    views: str | None,
    shared_images: bool,
) -> int:
    """Score the run's best checkpoint on a split.

    The run's own --where and --views choose the images, unless others are given: train on one sex, score the other.
    """
    folder, remote = find_shards(shards, cache, cache_size)
    config, stop = read_config(run), StopFlag().listen()
    device, precision = choose_device(config.amp)
    job = Job(config, folder, remote, run, read_manifest(folder), device, precision, workers, stop)
    chosen_by = (*where, *([] if views is None else [f"{views} views"]))
    scored = replace(job, config=replace(config, where=where or config.where, views=views or config.views))
    try:
        others = find_scores(job, split, against)
        shared = check_evaluation(scored, split, others, shared_images)
        found = score_best(scored, split)
        results = {split: evaluate(job, split, found, others, sensitivity, study, chosen_by, shared)}
    except InterruptedEvaluationError:
        return stop.code
    print_evaluations({split: results[split][0]})
    print_comparison(results[split][0])
    result = name_result(job, split, chosen_by)
    compared = name_comparison(result, others)
    write_report(scored, f"report-{compared}.html", results)
    for file in (f"scores-{result}.arrow", f"evaluation-{compared}.json", f"report-{compared}.html"):
        click.echo(f"{run / file}: written")
    return 0


def check_pattern(text: str) -> None:
    """Raise DataError for what is not a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise DataError(f"'{text}' is not a regular expression: {error}") from None


@main.command("predict", epilog="Example: python train.py predict --run runs/first --out scores.csv films/")
@run_option
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="CSV to write.")
@click.option("--strict", is_flag=True, help="Exit with 3 where an image cannot be read.")
@click.option(
    "--group-by",
    metavar="REGEX",
    type=Checked(check_pattern),
    help="Files in whose paths it finds the same text are one study.  [default: those of a folder]",
)
@workers_option
def predict_command(
    run: Path, images: tuple[Path, ...], out: Path, strict: bool, group_by: str | None, workers: int
) -> int:
    """Score IMAGES (JPEG or PNG files, or folders of them) by the run's best checkpoint.

    A run by studies scores the images of a study together: those of a folder, or as --group-by says.
    """
    files = [file for path in images for file in find_images(path)]
    for path in images:
        for suffix, count in count_others(path).items():
            say(f"{path}: {count:,} {suffix} files skipped: only JPEG and PNG can be read")
    if any(out.exists() and file.samefile(out) for file in files):
        raise click.UsageError(f"--out {out} is one of the images")
    check_folder(out)
    if not files:
        raise DataError(f"{', '.join(map(str, images))}: no .jpg, .jpeg or .png file")
    config = read_config(run)
    if config.fusion is None:
        if group_by is not None:
            raise click.UsageError(f"--group-by is for runs by studies; {run} learnt single images")
        samples = {str(file): [file] for file in files}
    else:
        samples = group_files(files, group_by)
    scores, bad = score_files(run, config, list(samples.values()), workers)
    for file, reason in bad:
        say(f"{file}: {reason}")
    if len(bad) == len(files):
        kept = f"{out} is left as it was" if out.exists() else f"{out} is not written"
        raise DataError(f"none of {len(files):,} images can be read; {kept}")
    cells = [["" if math.isnan(score) else f"{score:.6f}" for score in row] for row in scores.tolist()]
    heading = ["study" if config.fusion else "file", *config.labels]
    write_csv(out, [heading, *([name, *row] for name, row in zip(samples, cells, strict=True))])
    of_studies = f" in {len(samples):,} studies" if config.fusion else ""
    click.echo(f"{out}: scores of {len(files) - len(bad):,} images{of_studies}, {len(bad):,} unusable")
    return 3 if strict and bad else 0


def check_folder(out: Path) -> None:
    """Raise DataError where a file cannot be written for want of a folder: before the work, not after it."""
    if not out.absolute().parent.is_dir():
        raise DataError(f"{out}: there is no folder {out.parent}")


def group_files(files: Iterable[Path], pattern: str | None) -> dict[str, list[Path]]:
    """The files of each study, by its name: their folder, or the text that the pattern finds in their paths.

    Raises DataError where the pattern finds nothing, or more files than a study has views.
    """
    studies: dict[str, list[Path]] = {}
    for file in files:
        match = None if pattern is None else re.search(pattern, str(file))
        if pattern is not None and match is None:
            raise DataError(f"{file}: --group-by '{pattern}' is not in its path")
        studies.setdefault(str(file.parent) if match is None else match[0], []).append(file)
    for name, views in studies.items():
        if len(views) > MOST_VIEWS:
            how = "a study's images must lie in a folder of their own, or name it by --group-by"
            raise DataError(f"{name}: {len(views)} images, of a study there are at most {MOST_VIEWS}; {how}")
    return studies


@main.command("export", epilog="Example: python train.py export --run runs/first --out model.onnx")
@run_option
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help=".onnx or .pt2")
def export_command(run: Path, out: Path) -> int:
    """Write the run's best network for other programs: uint8 images [B, 1, S, S] in, scores [B, L] out.

    Of the L labels that the run has learnt, in their usual order.
    """
    config = read_config(run)
    check_folder(out)
    if config.fusion:
        raise DataError(f"{run}: a network over studies cannot be exported, only one for images")
    network, best = load_best(run, config, torch.device("cpu"))
    scorer = Scorer(network, learnt_columns(config), best["pixels"]["mean"], best["pixels"]["std"])
    try:
        difference = export_scorer(scorer, config.image_size, out)
    except ValueError as error:
        raise DataError(str(error)) from None
    click.echo(f"{out}: checked, within {difference:.1e} of the eager network's logits")
    click.echo(f"its scores: {', '.join(config.labels)}")
    return 0


def find_images(path: Path) -> list[Path]:
    """The file itself, or the image files below a folder, sorted."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def count_others(path: Path) -> dict[str, int]:
    """How many files of each other suffix are below a folder; none for a file."""
    others = (file.suffix.lower() for file in path.rglob("*") if file.is_file())
    counts = Counter(suffix or "other" for suffix in others if suffix not in IMAGE_SUFFIXES)
    return dict(sorted(counts.items()))
