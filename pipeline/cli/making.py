"""The commands that write and check shards: sample, shards, verify."""

import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.base.errors import DataError, printable
from pipeline.base.files import is_open_to_all
from pipeline.base.store import is_remote, open_location
from pipeline.base.workers import count_cpus, run_alone
from pipeline.console import (
    CACHE_FOLDER,
    Checked,
    Number,
    Parsed,
    PathOrUrl,
    count_of,
    progress_bar,
    refuse_usage,
    say,
    say_next,
)
from pipeline.images import DOUBTS, ENCODINGS, SQUARES
from pipeline.labels import LABELS, VIEWS, find_label
from pipeline.look.tables import print_report
from pipeline.manifest import find_restriction
from pipeline.policies import BLANK_HELP, UNCERTAIN_HELP, check_blank_policy, parse_uncertain_policy

if TYPE_CHECKING:
    from pipeline.etl.planning import Options
    from pipeline.etl.shards import Execution, RunSummary
    from pipeline.sources.source import Source, Terms
    from pipeline.synthetic.shortcuts import Shortcut


def parse_shortcut(text: str) -> "Shortcut":
    """The shortcut of `Pneumonia=marker:0.9`. Raises DataError."""
    from pipeline.synthetic import shortcuts

    return shortcuts.parse_shortcut(text)


WORKERS = click.option("--workers", default=count_cpus, type=click.IntRange(min=1), show_default="all cores")


@click.command(epilog="Example: pipeline sample sample && pipeline shards sample shards/sample")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--images", default=2000, type=click.IntRange(min=20), help="Number of images, train and valid together."
)
@click.option(
    "--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Another seed gives other patients."
)
@click.option(
    "--laterals", type=Number(0, 1), help="Share of studies with a lateral.", show_default="as in CheXpert"
)
@click.option("--valid", default=0.12, type=Number(0.01, 0.9), help="Share of images in valid.csv.")
@click.option(
    "--shortcut",
    "shortcuts",
    multiple=True,
    type=Parsed(parse_shortcut, "LABEL=CUE:STRENGTH"),
    help="Plant a cue (marker, border, corners) in train, tied to a label: Pneumonia=marker:0.9; valid has none.",
)
@WORKERS
def sample(
    out: Path,
    images: int,
    seed: int,
    laterals: float | None,
    valid: float,
    shortcuts: tuple["Shortcut", ...],
    workers: int,
) -> None:
    """Write a synthetic CheXpert to OUT, to try things out without patient data."""
    from pipeline.synthetic.sample import write_sample

    cues = [shortcut.cue for shortcut in shortcuts]
    refuse_usage(len(set(cues)) < len(cues), "--shortcut: a cue can be tied to one label")
    done = 0
    with progress_bar("Drawing", "images") as advance:

        def count(finished: int) -> None:
            nonlocal done
            done += finished
            advance(done, images)

        folder = write_sample(
            out,
            images=images,
            seed=seed,
            workers=workers,
            progress=count,
            laterals=laterals,
            valid=valid,
            shortcuts=shortcuts,
        )
    click.echo(f"{folder}: {images:,} synthetic images")
    say_next("pipeline", "shards", out, Path("shards", out.resolve().name))


def parse_size(text: str) -> int | None:
    """A number of pixels; None for `original`."""
    if text == "original":
        return None
    if not text.isdecimal() or int(text) < 16:
        raise DataError(f"'{text}' is neither a number of pixels, 16 or more, nor original")
    return int(text)


def parse_folder(text: str) -> Path:
    """The path of a folder, or of one at a URL; what it holds is looked at later."""
    if not text.strip():
        raise DataError("the name is empty; for the folder you are in, write .")
    path = open_location(text)
    if isinstance(path, Path) and path.is_file():
        raise DataError(f"'{path}' is a file")
    return path


def parse_split(text: str) -> tuple[str, Path]:
    """The split's name and the CSV's path of `train=foo.csv`."""
    split, equals, csv = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z0-9_]+", split) or split == "dev":
        raise DataError(f"'{text}' is not like train=foo.csv (dev comes out of train by --dev)")
    return split, open_location(csv)


def parse_set(text: str) -> str:
    """The name of a data set. Raises DataError if there is none of that name."""
    from pipeline.sources.sets import SETS

    if text not in SETS:
        raise DataError(f"'{text}' is not a data set; choose from {', '.join(SETS)}")
    return text


def parse_name(text: str) -> str:
    """The name of a data set, which stands before its patients' where several sets are read as one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text):
        raise DataError(f"'{text}' is not a name of letters, digits, '.', '_' and '-'")
    return text


def parse_columns(text: str) -> tuple[tuple[str, str], ...]:
    """Our names and a table's, from `path=Image,patient=MRN`."""
    from pipeline.sources import table

    return table.parse_columns(text)


def parse_labels(text: str) -> tuple[str, ...]:
    """The labels of `Edema,pneumonia`. Raises DataError for one that there is not."""
    labels = {name: find_label(name.strip()) for name in text.split(",")}
    if wrong := [name for name, label in labels.items() if label is None]:
        raise DataError(f"'{wrong[0]}' is none of {', '.join(LABELS)}")
    return tuple(label for label in LABELS if label in labels.values())


@contextmanager
def proposing_blanks() -> Iterator[None]:
    """Around reading a set: where its owner must say what blanks mean, the error ends in the command that does."""
    from pipeline.sources.source import UnsaidBlanksError

    try:
        yield
    except UnsaidBlanksError as error:
        words = ["--annotated", ",".join(error.annotated), "--blanks", "not-annotated"]
        raise DataError(f"{error}:\n  {shlex.join(['pipeline', *sys.argv[1:], *words])}") from None


FOLDER = Parsed(parse_folder, "folder")


@click.command(epilog="Example: pipeline shards ~/CheXpert-v1.0-small shards --size 320 --views frontal")
@click.argument("source", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option(
    "--set",
    "dataset",
    type=Parsed(parse_set, "SET"),
    help="Data set in SOURCE (docs/datasets.md).",
    show_default="by its files",
)
@click.option(
    "--columns",
    type=Parsed(parse_columns, "NAME=COLUMN,…"),
    help="With --set table or webdataset: path=Image,patient=MRN,Edema=edema.",
)
@click.option(
    "--name",
    type=Parsed(parse_name, "NAME"),
    help="Dataset name; required if another hospital's data uses this layout.",
)
@click.option(
    "--annotated",
    type=Parsed(parse_labels, "LABEL,…"),
    help="Labels that were looked for in a set with --name or a table; the others are not annotated.",
)
@click.option(
    "--blanks",
    type=click.Choice(("blank", "not-annotated")),
    show_default="blank",
    help="What an empty cell of such a set means: not mentioned, or not annotated.",
)
@click.option(
    "--size",
    default=320,
    type=Parsed(parse_size, "PIXELS|original"),
    help="Shorter side, never enlarged; original keeps it.",
)
@click.option("--square", default="no", type=click.Choice(SQUARES), help="How an image becomes SIZE×SIZE.")
@click.option(
    "--encoding", default="jpeg", type=click.Choice(ENCODINGS), help="raw: for slow CPUs, 5 times as large."
)
@click.option("--quality", default=95, type=click.IntRange(1, 100), help="JPEG quality of resized images.")
@click.option("--views", default="frontal", type=click.Choice(VIEWS), help="By the column Frontal/Lateral.")
@click.option(
    "--uncertain",
    metavar="POLICY",
    type=Checked(parse_uncertain_policy),
    show_default="best, or as existing shards have it",
    help=UNCERTAIN_HELP,
)
@click.option(
    "--blank",
    metavar="POLICY",
    type=Checked(check_blank_policy),
    show_default="zeros, or as existing shards have it",
    help=BLANK_HELP,
)
@click.option("--dev", default=0.05, type=Number(0, 1), help="Fraction of training patients held out as dev.")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Decides the dev patients and the order.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Most images per split; whole patients, at least one."
)
@click.option("--samples-per-shard", default=1000, type=click.IntRange(min=1))
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=Parsed(parse_split, "SPLIT=CSV"),
    help="CSV (or tars) of a split, instead of SOURCE's own.",
)
@click.option("--root", "roots", multiple=True, type=FOLDER, help="Another folder of images.")
@click.option(
    "--facts", multiple=True, metavar="FILE", help="CSV or XLSX with extra columns, by patient or study."
)
@click.option("--max-pixels", default=50_000_000, type=click.IntRange(min=1), help="Reject larger images.")
@click.option(
    "--bits",
    type=click.IntRange(8, 16),
    show_default="as the file says, else by its levels",
    help="How many bits of a 16-bit PNG hold the picture.",
)
@click.option("--max-bad", default=0.001, type=Number(0, 1), help="Stop above this share of rejects.")
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse labels with one class; exit with 3 on any reject or lost picture.",
)
@WORKERS
@click.option("--scheduler", metavar="URL", help="Run on the Dask cluster at tcp://host:8786.")
@click.option(
    "--dry-run", is_flag=True, help="Print what would be written and which images are missing; write nothing."
)
def shards(
    source: Path,
    out: Path,
    dataset: str | None,
    columns: tuple[tuple[str, str], ...] | None,
    name: str | None,
    annotated: tuple[str, ...] | None,
    blanks: str | None,
    uncertain: str | None,
    blank: str | None,
    splits: tuple[tuple[str, Path], ...],
    roots: tuple[Path, ...],
    facts: tuple[str, ...],
    dry_run: bool,
    **rest: Any,
) -> int:
    """Write the data set in SOURCE as shards to OUT: tars, Arrow tables, and a manifest at the end.

    Raw labels are kept; the policies are recorded as the shards' defaults, which training may override. The
    same command continues a run that was stopped or killed, and restores missing or damaged files of finished
    shards. SOURCE and OUT may be s3://bucket/prefix.
    """
    from pipeline.etl.planning import Options
    from pipeline.etl.shards import Execution, write_shards
    from pipeline.sources.load import describe_shards
    from pipeline.sources.sets import find_source, find_terms

    how = Execution(**{field.name: rest.pop(field.name) for field in fields(Execution)})
    options = Options(**rest)
    refuse_usage(
        str(out).startswith(("http:", "https:")),
        f"{out}: a web server is only read from; write to a folder or s3://bucket/prefix",
    )
    refuse_usage(options.size is None and options.square != "no", "--square needs a --size")
    refuse_usage(
        (dataset == "table" and not columns) or (columns and dataset not in ("table", "webdataset")),
        "--columns goes with --set table, which needs it, or --set webdataset",
    )
    refuse_usage(
        bool(splits) and dataset not in (None, "chexpert", "table", "webdataset"),
        "--split is for CSVs like CheXpert's, --set table or --set webdataset",
    )
    files = [open_location(text) for text in facts]
    found = find_source(source, _collect("--split", splits), roots, dataset, columns or (), files, name or "")
    found = found._replace(annotated=annotated or (), blanks=blanks or "")
    if dry_run:
        with proposing_blanks():
            code = _print_preview(found, options, how)
        say_next("pipeline", *(word for word in sys.argv[1:] if word != "--dry-run"))
        return code
    start = time.perf_counter()
    resumed: int | None = None
    with progress_bar("Sharding", "images") as advance:

        def show(done: int, total: int, rejects: int) -> None:
            nonlocal resumed
            if resumed is None:  # once, and only where something is written
                _warn_of_terms(find_terms(found), out)
            resumed = done if resumed is None else resumed
            rate = (done - resumed) / (time.perf_counter() - start)
            advance(done, total, f"{rate:,.0f} images/s  {rejects} rejects")

        with proposing_blanks():
            run = write_shards(found, out, options, {"uncertain": uncertain, "blank": blank}, how, show)
    seconds = time.perf_counter() - start
    described = run_alone(describe_shards, out, f"counting the labels of {out}")
    if how.strict and described.one_class:
        raise DataError(f"--strict: {'; '.join(described.one_class)}; choose other policies")
    for text in described.one_class:
        say(f"{text} by these policies: it cannot be learned")
    _print_run(out, run, seconds, described.views)
    for note, keys in described.notes.items():
        click.echo(f"{len(keys):,} of the images: {note}; the first is {keys[0]}")
    say_next("pipeline", "verify", out, "--deep")
    return 3 if how.strict and (run.manifest.rejects or not described.notes.keys().isdisjoint(DOUBTS)) else 0


def _warn_of_terms(terms: "Terms", out: Path) -> None:
    """Warn where films that may not be passed on would be written to a place that others may read."""
    restricted = find_restriction(terms._asdict())
    if restricted and is_remote(out):
        say(f"Warning: {out}: make sure that only people bound by the {restricted} can read it")
    elif restricted and is_open_to_all(out):
        say(
            f"Warning: {out}: every user of this machine can read it; only people bound by the {restricted} may: "
            f"chmod o-rx {out}"
        )


def _collect(option: str, values: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """The CSV of each split."""
    csvs: dict[str, Path] = {}
    for split, csv in values:
        refuse_usage(split in csvs, f"{option} {split} given twice: a split takes one CSV")
        csvs[split] = csv
    return csvs


def _print_run(out: Path, run: "RunSummary", seconds: float, views: str) -> None:
    images = size = 0
    for name, split in run.manifest.splits.items():
        bytes_out = sum(shard.bytes for shard in split.shards)
        images, size = images + split.samples, size + bytes_out
        click.echo(
            f"{name:6} {split.samples:8,} images {split.studies:8,} studies {split.patients:7,} patients "
            f"{len(split.shards):4} shards {bytes_out / 1e6:10,.1f} MB"
        )
    if views:
        click.echo(views)
    if run.manifest.rejects:
        click.echo(f"rejected images: {len(run.manifest.rejects):,}, see {out / 'rejects.csv'}")
    if not run.is_new:
        if run.manifest.rejects:
            click.echo("to try rejected images again, write to a new folder")
        restored = f"restored: {', '.join(run.restored)}"
        click.echo(f"{out}: {restored if run.restored else 'complete already, nothing to do'}")
        return
    if run.resumed:
        click.echo(f"{run.resumed:,} images were there already")
    for text in filter(None, (run.moved, *run.notes)):
        click.echo(text)
    if run.stripped:
        click.echo(f"metadata removed from {run.stripped:,} images")
    rate = (images - run.resumed) / seconds
    click.echo(
        f"{out}: written in {seconds:,.1f} s, {rate:,.0f} images/s, "
        f"{run.bytes_in / 1e6:,.1f} MB in, {size / 1e6:,.1f} MB out"
    )


def _print_preview(source: "Source", options: "Options", how: "Execution") -> int:
    """Say what would be written; returns the exit code that the same images would lead to."""
    from pipeline.etl.preview import preview_shards
    from pipeline.measure.counts import start_report

    preview = preview_shards(source, options)
    for name, split in preview.splits.items():
        dropped = [f"{count:,} by --{why}" for why, count in split.dropped._asdict().items() if count]
        click.echo(
            f"{name:6} {split.rows:8,} rows, {split.kept:,} kept, dropped: {', '.join(dropped) or 'none'}; "
            f"{split.shards:,} shards, about {split.bytes / 1e6:,.1f} MB"
        )
        if split.missing:
            click.echo(f"       {len(split.missing):,} images are missing, for example {split.missing[0]}")
    for text in filter(None, (preview.moved, *preview.notes)):
        click.echo(text)
    if options.views == "all":
        click.echo(preview.views)
    print_report(start_report(preview.statistics))
    click.echo("dry run: nothing was written")
    missing = sum(len(split.missing) for split in preview.splits.values())
    total = sum(split.kept for split in preview.splits.values())
    if missing > how.max_bad * total:
        raise DataError(f"{missing:,} of {total:,} images are missing, more than --max-bad {how.max_bad:.2%}")
    return 3 if how.strict and missing else 0


@click.command(epilog="Example: pipeline verify shards --deep")
@click.argument("shards", type=PathOrUrl(file_okay=False))
@CACHE_FOLDER
@click.option("--deep", is_flag=True, help="Decode every image too, and compare every JSON with its row.")
@WORKERS
def verify(shards: str | Path, cache: Path, deep: bool, workers: int) -> None:
    """Check every file of SHARDS (a folder or URL) against the manifest, and every tar against its table.

    One line for each problem, on stdout; exit code 1 where there is any.
    """
    from pipeline.etl.verify import PRINTED, verify_shards
    from pipeline.stream.cache import find_shards, redact

    start, name = time.perf_counter(), redact(str(shards))
    folder, remote = find_shards(shards, cache)
    with progress_bar("Verifying", "shards") as advance:
        report = verify_shards(folder, deep, workers, advance, remote.path if remote else None)
    for warning in report.warnings:
        say(f"Warning: {printable(warning)}")
    for file, lines in report.problems.items():
        click.echo(printable("\n".join(lines[:PRINTED])))
        if len(lines) > PRINTED:
            click.echo(f"{name.rstrip('/')}/{file}: and {len(lines) - PRINTED:,} more")
    if report.problems:
        problems = count_of(sum(map(len, report.problems.values())), "problem")
        files = count_of(len(report.problems), "file")
        again = "" if remote else "; to restore them, run the command that wrote them again"
        raise click.ClickException(f"{name}: {problems} in {files}{again}")
    click.echo(
        f"{name}: all is well: {report.splits} splits, {report.shards:,} shards, {report.samples:,} samples, "
        f"{report.bytes / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s"
    )
    say_next(
        *(
            ("python", "-m", "train", "--run", "RUN", "--shards", name)
            if remote
            else ("pipeline", "audit", name)
        )
    )
