"""The command line of train.py, and its commands train, cross, sweep and embed: parse, call, print.

Each command imports what needs torch itself, so that `--help` and usage errors are quick.
"""

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model.names import check_arch
from model.runs import use
from model.runs.config import (
    MEANS,
    Config,
    is_reported,
    open_start,
    options,
    read_config,
    resolve_config,
)
from model.runs.options import (
    DATA_OPTIONS,
    GroupedCommand,
    InitPath,
    check_folders,
    config_options,
    grouped,
    own_shards_option,
    read_own_shards,
    run_option,
    shared_images_option,
    with_options,
)
from pipeline.base.errors import SettingError, needs
from pipeline.base.files import check_folder, read_object
from pipeline.console import count_of, name_options, refuse_usage, say, say_next

if TYPE_CHECKING:
    from model.runs.job import Job
    from model.runs.sweep import Watch

# Options of which a sweep takes several values.
SWEPT = ("lr", "weight_decay", "batch_size", "arch", "uncertain")
Train = Callable[..., int]  # train.train


class TrainByDefault(click.Group):
    """A group whose command `train` needs not be named, and is the only one for several ranks."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, which imports torch itself; `pipeline` does without."""
        with needs("train"):
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `train` in front of options."""
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["train", *args]
        if args and args[0] != "train" and "RANK" in os.environ:
            raise click.UsageError(f"{args[0]} is for one process: start it without torchrun")
        return super().parse_args(ctx, args)


@click.group(
    cls=TrainByDefault,
    context_settings={"show_default": True},
    epilog="The options of train: python -m train train --help",
)
def main() -> None:
    """Train networks; evaluate, apply and inspect runs. Default command: train."""


JOB_OPTIONS = [
    grouped(
        "network",
        "--init",
        metavar="FILE",
        type=InitPath(path_type=Path, exists=True),
        help="Start from this file, a run, or torchxrayvision's chest X-ray weights (xrv:NAME).",
    ),
    grouped(
        "labels",
        "--teacher",
        metavar="RUN",
        type=click.Path(path_type=Path),
        help="With the policy selftrained: learn from this run's scores.",
    ),
    grouped(
        "labels", "--strict", is_flag=True, help="Refuse labels with one class in train instead of warning."
    ),
    grouped("run", "--wandb", metavar="PROJECT", help="Send the logs to Weights & Biases too."),
]


@main.command(
    "train",
    cls=GroupedCommand,
    epilog="Example: python -m train --shards shards --run runs/first --lr 1e-4 --weight-decay 1e-2",
)
@with_options(run_option, *DATA_OPTIONS, *config_options(), *JOB_OPTIONS)
@click.pass_obj
def train_command(train: Train, /, **given: Any) -> int:
    """Train a network on shards; the same command continues an interrupted run."""
    check_folders(given["shards"])
    config, others = split_options(given)
    if "RANK" not in os.environ and is_finished(config, **others):
        print_run(given["run"])
        return 0
    from model.ranks import join_ranks
    from model.runs.job import StopFlag

    with join_ranks() as ranks:
        job = start_job(config, **others, stop=StopFlag().listen(), ranks=ranks)
        code = train(job)
        if code == 0 and job.ranks.is_first:
            print_run(job.run)
        return code


@main.command(
    "cross",
    cls=GroupedCommand,
    epilog="Example: python -m train cross --shards shards/nih --shards shards/children --out runs/cross --epochs 15",
)
@grouped(
    "run", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the runs and of the page."
)
@with_options(*DATA_OPTIONS, *config_options(), *JOB_OPTIONS)
@click.pass_obj
def cross_command(train: Train, /, out: Path, shards: tuple[str, ...], **given: Any) -> int:
    """Train on each of several --shards, on all but one, and on all, and score every run on every set.

    Writes the matrix of AUROCs, with intervals, to cross.html. The same command continues where it was stopped.
    """
    if len(shards) < 2:
        raise click.UsageError("cross needs --shards twice or more: a set is trained on, another one scored")
    check_folders(shards)
    from model.predict import InterruptedEvaluationError
    from model.runs.cross import score_runs, train_runs, write_cross
    from model.runs.job import StopFlag
    from model.runs.summary import print_cross

    config, others = split_options(given)
    stop = StopFlag().listen()

    def make(folders: Sequence[str], run: Path) -> "Job":
        return start_job(config, folders, run, **others, stop=stop)

    try:
        jobs, code = train_runs(shards, out, make, train)
        if code:
            return code
        found = score_runs(jobs, shards)
    except InterruptedEvaluationError:
        return stop.code
    write_cross(out, found, asdict(config))
    print_cross(found)
    click.echo(f"{out / 'cross.html'}: the same by label")
    *_, last = jobs.values()
    say_next(*use.TRAIN, "predict", "--run", last.run, "--out", "scores.csv", "IMAGES")
    return 0


@main.command(
    "embed",
    cls=GroupedCommand,
    epilog="Example: python -m train embed runs/first --split train --out train.parquet",
)
@click.argument("source", metavar="RUN_OR_ARCH")
@click.option(
    "--split", default="train", help="Split to score; --shards may differ from the training shards."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help=".arrow or .parquet"
)
@with_options(
    own_shards_option,
    *DATA_OPTIONS[1:],
    shared_images_option,
    *config_options(only=("pretrained", "image_size")),
    JOB_OPTIONS[0],
)
def embed_command(source: str, split: str, out: Path, shared_images: bool, **given: Any) -> int:
    """Write the embeddings (input of the last layer) of a split by a run, or by a network with --init or --pretrained.

    A table of keys, patients, labels and embeddings, for models that are fitted on top.
    """
    run = Path(source)
    given["shards"] = given["shards"] or read_own_shards(run)
    config, others = split_options(given)
    started = config.pretrained or others["init"] is not None
    refuse_usage(out.suffix not in (".arrow", ".parquet"), f"--out {out}: it must end in .arrow or .parquet")
    if run.is_dir():
        refuse_usage(started or config.image_size, f"{run} is a run: it has its own weights and image size")
    else:
        refuse_usage(not started, f"{source} is no folder, and a network needs --init or --pretrained")
        config = replace(config, arch=check_arch(source), amp="off", uncertain="ignore", blank="ignore")
    check_folder(out)
    check_folders(given["shards"], [run] if run.is_dir() else [])
    from model.runs.embeddings import embed_split, open_run, start_network, write_embeddings
    from model.runs.job import Job, StopFlag, choose_device
    from pipeline.stream.collection import open_collection
    from pipeline.stream.dataset import open_shards

    where = given["shards"], given["cache"], given["cache_size"]
    shards = open_shards(*where)
    if run.is_dir():
        of_all = replace(read_config(run), where=(), views="all", limit=None)
        collection, stop = open_collection(*where), StopFlag()
        job = Job(of_all, collection, run, *choose_device("off"), given["workers"], stop)
    else:
        job = start_job(config, run=run, **others)
    load = open_run if run.is_dir() else start_network
    encoder = load(replace(job, shared_images=shared_images), split)
    table = embed_split(encoder, shards[split], given["workers"])
    write_embeddings(out, table)
    click.echo(f"{out}: {count_of(len(table), 'image')}, {table['embedding'].type.list_size} features each")
    return 0


def split_options(given: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Divide the options of `train` into its configuration and the others."""
    known = options()
    fields = {name: value for name, value in given.items() if name in known and value is not None}
    return Config(**fields), {name: value for name, value in given.items() if name not in known}


def start_job(config: Config, shards: Sequence[str], run: Path, **others: Any) -> "Job":
    """The job of `open_job`. Raises UsageError for options that do not go together."""
    from model.runs.job import open_job

    try:
        return open_job(config, shards, run, **others)
    except SettingError as error:
        raise click.UsageError(name_options(str(error))) from None


def is_finished(
    config: Config, shards: Sequence[str], run: Path, cache: Path, cache_size: int, **others: Any
) -> bool:
    """Whether this run is trained and reported already, which is seen here without torch, and said."""
    if not is_reported(run):
        return False
    from pipeline.stream.collection import open_collection

    try:
        collection, start = open_collection(shards, cache, cache_size), open_start(config, others["init"])
        resolved = resolve_config(config, collection, others["teacher"], start)
    except SettingError as error:
        raise click.UsageError(name_options(str(error))) from None
    if resolved != read_config(run):
        return False  # `open_run` says how they differ
    done = json.loads((run / "metrics.jsonl").read_bytes().splitlines()[-1])["step"]
    say(f"{run}: finished, after step {done:,}; another `run` goes on by `init` {run}")
    return True


def print_run(run: Path) -> None:
    """Print the evaluations of a run that has ended."""
    from model.runs.summary import print_evaluations, print_verdicts

    paths = {name: run / f"evaluation-{name}.json" for name in ("dev", "valid")}
    reports = {name: read_object(path) for name, path in paths.items() if path.exists()}
    print_evaluations(reports)
    print_verdicts(reports)
    limits = reports["dev"]["intervals"]["auroc"]
    name = "macro" if limits["macro10"]["low"] is None else "macro10"
    low, high = (limits[name][side] for side in ("low", "high"))
    if low is not None and low <= 0.5:
        guess = f"dev AUROC ({MEANS[name]}) is {low:.2f} to {high:.2f}, not told from guessing"
        say(f"{run}: {guess}: try a lower `lr`, more `epochs` or more images")
    click.echo(f"{run / 'report.html'}: the same with curves, intervals and subgroups")
    say_next(*use.TRAIN, "predict", "--run", run, "--out", "scores.csv", "IMAGES")


def repeat_options(config: Config, others: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give a run this configuration, and these other options, where not defaults."""
    values = {
        name: getattr(config, name) for name in options() if getattr(config, name) != getattr(Config(), name)
    }
    values |= {name: others[name] for name in ("init", "teacher") if others[name]} | {
        "shards": others["shards"]
    }
    words = []
    for name, value in values.items():
        several = value if name in ("shards", "where") else [value]
        for one in several:
            text = ",".join(map(str, one)) if isinstance(one, tuple) else str(one)
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    return words


def refuse_run(_: click.Context, param: click.Parameter, value: str | None) -> None:
    """Raise UsageError for --run, which a command line of `train` may have brought along."""
    if value is not None:
        raise click.UsageError(
            f"--{param.name} is for one run: those of a sweep are in its folder, by --sweep"
        )


SWEEP_OPTIONS = [
    grouped(
        "sweep",
        "--sweep",
        "folder",
        type=click.Path(path_type=Path),
        required=True,
        help="Folder of the sweep; processes and machines that share it share the work.",
    ),
    click.option("--run", hidden=True, expose_value=False, callback=refuse_run),
    grouped(
        "sweep",
        "--sampler",
        default="grid",
        type=click.Choice(["grid", "tpe"]),
        help="tpe: search between the values given.",
    ),
    grouped("sweep", "--trials", type=click.IntRange(1), help="With tpe: maximum number of trials."),
    grouped(
        "sweep",
        "--pruner",
        default="none",
        type=click.Choice(["none", "median", "halving"]),
        help="Stop poor trials early.",
    ),
]


@main.command(
    "sweep",
    cls=GroupedCommand,
    epilog='Example: python -m train sweep --sweep runs/sweep --lr "1e-4 1e-3" --weight-decay "1e-4 1e-2" --epochs 3',
)
@with_options(*SWEEP_OPTIONS, *DATA_OPTIONS, *config_options(several=SWEPT), *JOB_OPTIONS)
@click.pass_obj
def sweep_command(
    train: Train, /, folder: Path, sampler: str, trials: int | None, pruner: str, **given: Any
) -> int:
    """Train with all combinations of the values of --lr, --weight-decay, --batch-size, --arch and --uncertain.

    Separate the values of an option by spaces or commas; --sampler tpe searches between them. Every trial is a run,
    as `train` makes it. The same command continues a sweep; started again while it runs, it shares the work.
    """
    if sampler == "tpe" and trials is None:
        raise click.UsageError("--sampler tpe needs --trials")
    if sampler == "grid" and trials is not None:
        raise click.UsageError("--trials needs --sampler tpe: a grid has as many as combinations")
    check_folders(given["shards"])
    with needs("sweep"):
        from model.runs.sweep import Sweep, list_trials, open_sweep, rank, run_sweep
        from model.runs.sweep_report import write_sweep_report
    from model.runs.job import StopFlag
    from model.runs.summary import print_trials

    stop = StopFlag().listen()
    values = {name: tried for name in SWEPT if (tried := given.pop(name)) is not None}
    base, others = split_options(given)

    def make(point: Mapping[str, Any], run: Path) -> "Job":
        return start_job(replace(base, **point), run=run, **others, stop=stop)

    # A value that does not go with the options is refused before any point is trained.
    first = {name: tried[0] for name, tried in values.items()}
    points = [first, *(first | {name: value} for name, tried in values.items() for value in tried[1:])]
    config, *_ = [make(point, folder / "trials" / "unused").config for point in points]
    shared = {name: value for name, value in asdict(config).items() if name not in values}
    sweep = Sweep(folder, values, shared, sampler, trials or 0, pruner)
    open_sweep(sweep)  # a sweep under other options keeps its report
    try:
        done = run_sweep(sweep, partial(train_trial, train, make), stop)
    finally:  # also after an error in one trial: the others deserve a report
        listed = list_trials(sweep)
        write_sweep_report(sweep, listed)
    ranked = rank(listed)
    complete, failed = (sum(trial.state == state for trial in ranked) for state in ("complete", "failed"))
    if complete:
        print_trials(ranked)
    counted = f"{count_of(complete, 'trial')} complete{f', {failed} failed' if failed else ''}"
    click.echo(f"{folder / 'report.html'}: {counted}")
    if complete:
        best = ranked[0]
        click.echo(f"trial {best.number} is the best, in {best.run}; the same once more:")
        words = repeat_options(replace(base, **best.point), others)
        say_next(*use.TRAIN, *words, "--run", "RUN")
    return stop.code if not done else 1 if failed and not complete else 0


def train_trial(
    train: Train, make: Callable[..., "Job"], point: Mapping[str, Any], run: Path, watch: "Watch"
) -> dict[str, Any] | None:
    """Train a point of a sweep in its run folder; returns the run's figures, or None if it was stopped."""
    import torch

    from model.predict import InterruptedEvaluationError
    from model.runs.results import choice_score, measure_run

    job = make(point, run)
    torch.compiler.reset()  # it gives up after several networks in one process
    gc.collect()  # a trial that failed is held by its traceback, and so is its memory
    torch.cuda.empty_cache()

    def report(history: Sequence[Mapping[str, Any]]) -> None:
        watch([(line["epoch"], choice_score(line, job.config.choose_by) or 0.0) for line in history])

    try:
        return None if train(job, report) else measure_run(job)
    except InterruptedEvaluationError:
        return None


for command in (
    use.evaluate_command,
    use.predict_command,
    use.export_command,
    use.inputs_command,
    use.localize_command,
):
    main.add_command(command)
