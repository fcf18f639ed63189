"""The command line of train.py, and its commands train, cross, sweep and embed: parse, call, print.

Commands import modules that need torch only when they run, so `--help` and usage errors are quick.
"""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model.names import check_arch, published
from model.runs import score_commands
from model.runs.config import SCORED_BY, TRAINED_BY, Config, Setup, check_options, check_runs, is_finished, read_config
from model.runs.score_commands import TRAIN, Place, print_run, repeat
from pipeline import console
from pipeline.base.errors import needs
from pipeline.base.files import check_folder
from pipeline.base.options import option
from pipeline.base.pages import Table, pictures
from pipeline.console import Fields, Several, command, count_of, echo, pictures_option, refuse_usage, say_next

if TYPE_CHECKING:
    from model.runs.run import Run
    from model.runs.sweep import Point

SWEPT = ("lr", "weight_decay", "batch_size", "arch", "uncertain")  # options that a sweep may get more values of later
Train = Callable[..., None]  # train.train


class TrainByDefault(click.Group):
    """A group whose default command is `train`, the only one that runs on several ranks."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command, which imports torch; `pipeline` does not need it."""
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
    cls=TrainByDefault, context_settings={"show_default": True}, epilog="See also: python -m train train --help"
)
def main() -> None:
    """Train networks; evaluate, apply and inspect runs. Default command: train."""


@dataclass(frozen=True, kw_only=True)
class Cross:
    """Options of `cross`."""

    out: Path = option(..., "Folder of the runs and of the page.", group="run")
    runs: tuple[Path, ...] = option((), "Also score this run; may be repeated.", flag="run", group="run", metavar="RUN")
    png: Path | None = pictures_option()


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Options of `embed`."""

    source: str = option(..., argument=True, metavar="RUN_OR_ARCH")
    split: str = option("train", "Split to score; --shards may differ from the training shards.")
    out: Path = option(..., ".arrow or .parquet", type=console.FILE)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Options of `sweep`."""

    sweep: Path = option(..., "Folder; processes and machines that share it share the work.", group="sweep")
    sampler: str = option("grid", "tpe: search between the values given.", choices=("grid", "tpe"), group="sweep")
    trials: int | None = option(None, "With tpe: maximum number of trials.", low=1, group="sweep")
    png: Path | None = pictures_option()


@command("train", Place, Fields(Setup, (*TRAINED_BY, "check")), Config)
@click.pass_obj
def train_command(train: Train, place: Place, setup: Setup, config: Config) -> None:
    """Train a network on shards; the same command continues an interrupted run.

    Example: python -m train --shards shards --run runs/first --lr 1e-4 --weight-decay 1e-2
    """
    if setup.check:
        check_options(config, setup)
        return
    setup = setup.checked()
    if "RANK" in os.environ or not is_finished(config, setup, place.run):
        from model.ranks import join_ranks, listen
        from model.runs.run import open_run

        listen()
        with join_ranks() as ranks:
            train(open_run(config, setup, place.run, ranks))
            if not ranks.is_first:
                return
    print_run(place.run)


@command("cross", Cross, Fields(Setup, TRAINED_BY), Config)
@click.pass_obj
def cross_command(train: Train, given: Cross, setup: Setup, config: Config) -> None:
    """Train on each of several --shards, on all but one, and on all, and score every run on every set.

    Writes the matrix of AUROCs, with intervals, to cross.html. The same command continues where it was stopped.

    Example: python -m train cross --shards shards/nih --shards shards/children --out runs/cross --epochs 15
    """
    refuse_usage(len(setup.shards) < 2, "cross needs --shards twice or more: a set is trained on, another one scored")
    setup = setup.checked()
    check_runs(given.runs)
    from model.ranks import listen
    from model.runs.cross import MACRO, score_runs, tabulate_cross, train_runs, write_cross
    from model.runs.run import open_run

    listen()

    def make(folders: Sequence[str], folder: Path) -> "Run":
        return open_run(config, replace(setup, shards=tuple(folders)), folder)

    runs = train_runs(setup.shards, given.out, make, train, given.runs)
    matrix = score_runs(runs, setup.shards)
    *_, last = runs.values()
    with pictures(given.png):
        write_cross(given.out, matrix, last)
    tabulate_cross(matrix, MACRO).print()
    echo(f"{given.out / 'cross.html'}: the same by label")
    say_next(*TRAIN, "predict", "--run", last.folder, "--out", "scores.csv", "IMAGES")


@command("embed", Embedding, Fields(Setup, (*SCORED_BY, "init")), Fields(Config, ("pretrained", "image_size")))
def embed_command(given: Embedding, setup: Setup, config: Config) -> None:
    """Write the embeddings (input of the last layer) of a split by a run, or by a network with --init or --pretrained.

    A published chest encoder that `networks` lists needs neither. The table has keys, patients, labels and embeddings,
    for models that are fitted on top.

    Example: python -m train embed runs/first --split train --out train.parquet
    """
    folder, out = Path(given.source), given.out
    refuse_usage(out.suffix not in (".arrow", ".parquet"), f"--out {out}: it must end in .arrow or .parquet")
    check_folder(out)
    if given.source in published() and not folder.exists():
        setup = replace(setup, init=folder)
    started = config.pretrained or setup.init is not None
    if is_run := folder.is_dir():
        refuse_usage(started or config.image_size, f"{folder} is a run: it has its own weights and image size")
    else:
        refuse_usage(not started, f"{folder} is no folder, and a network needs --init or --pretrained")
        arch = "" if setup.init == folder else check_arch(given.source)
        config = replace(config, arch=arch, amp="off", uncertain="ignore", blank="ignore")
    setup = setup.checked(*([folder] if is_run else []))
    from model.runs.explain import embed_split, open_network, write_embeddings
    from model.runs.predictor import load_network
    from model.runs.run import Run, open_run

    run = Run(read_config(folder), setup.open(), folder, setup) if is_run else open_run(config, setup, folder)
    network = load_network(folder, run.config) if is_run else open_network(run)
    table = embed_split(run, given.split, network)
    write_embeddings(out, table)
    echo(f"{out}: {count_of(len(table), 'image')}, {table['embedding'].type.list_size} features each")


@command("networks")
def networks_command() -> None:
    """List published chest encoders, for --init: their input, the sets that they were trained on, and their license.

    Example: python -m train networks
    """
    rows = [[row.name, row.size, row.seen, row.license, row.paper] for row in published().values()]
    Table("Published chest encoders", ("--init", "pixels", "trained on", "license", "paper"), rows).print()


@command("sweep", Search, Fields(Setup, (*TRAINED_BY, "check")), Fields(Config, several=True))
@click.pass_obj
def sweep_command(train: Train, search: Search, setup: Setup, given: "Point") -> int:
    """Train with all combinations of the values of options of `train`, such as --lr, --arch, --uncertain and --seed.

    Separate the values of an option by spaces or commas; --sampler tpe searches between them. Every trial is a run,
    as `train` makes it. The same command continues a sweep; started again while it runs, it shares the work.

    Example: python -m train sweep --sweep runs/sweep --lr "1e-4 1e-3" --weight-decay "1e-4 1e-2" --epochs 3
    """
    together = "--sampler tpe and --trials go together: a grid has as many trials as combinations"
    refuse_usage((search.sampler == "tpe") != (search.trials is not None), together)
    lists = {name: tried for name, tried in given.items() if isinstance(tried, Several)}
    base = Config(**given | {name: tried[0] for name, tried in lists.items()})
    if setup.check:
        check_options(base, setup)
        return 0
    setup = setup.checked()
    with needs("sweep"):
        from model.runs import sweep as sweeps
    from model.ranks import listen
    from model.runs.run import open_run

    listen()
    values: dict[str, tuple[Any, ...]] = {name: (getattr(base, name),) for name in SWEPT if getattr(base, name)}
    values |= {name: tried for name, tried in lists.items() if name in SWEPT or len(tried) > 1}

    def make(point: "Point", folder: Path) -> "Run":
        return open_run(replace(base, **point), setup, folder)

    # Refuse a value that conflicts with the options before any point is trained.
    points: list[Point] = [{}, *({name: value} for name, tried in values.items() for value in tried[1:])]
    run, *_ = [make(point, search.sweep / "trials" / "unused") for point in points]
    for name, tried in lists.items():
        # Without a dev split, the seed decides which patients are dev; only then does `resolve_config` set `dev`.
        alone = name in ("choose_by", "dev", "views") or (name == "seed" and run.config.dev is not None)
        flag, other = f"--{name.replace('_', '-')}", ", or shards with a dev split" if name == "seed" else ""
        text = f"{flag} decides what dev's AUROC is of, by which trials are compared: give one value{other}"
        refuse_usage(alone and len(tried) > 1, text)
    shared = {name: value for name, value in asdict(run.config).items() if name not in values}
    sweep = sweeps.Sweep(search.sweep, values, shared, search.sampler, search.trials or 0)
    sweeps.open_sweep(sweep)  # first, so that a sweep with other options keeps its report
    try:
        sweeps.run_sweep(sweep, lambda point, folder: sweeps.train_run(train, make(point, folder)))
    finally:  # even after an error in one trial: report the others
        trials = sweeps.list_trials(sweep)
        settings = sweeps.compare_settings(run, trials)
        best = [trial.folder for trial in settings[0].trials] if settings else []
        then = [*TRAIN, "predict", *repeat("--run", best), "--out", "scores.csv", "IMAGES"] if best else []
        if len(best) > 1:  # runs with several seeds: their ensemble
            then = [*TRAIN, "evaluate", *repeat("--run", best), "--out", sweep.folder / "ensemble"]
        with pictures(search.png):
            sweeps.write_sweep_report(sweep, trials, settings, shlex.join(map(str, then)))
    sweeps.print_sweep(sweep, trials, settings)
    if settings:
        say_next(*then)
    return 0 if settings or all(trial.state != "failed" for trial in trials) else 1


for each in (train_command, cross_command, embed_command, networks_command, sweep_command, *score_commands.COMMANDS):
    main.add_command(each)
