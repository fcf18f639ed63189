"""The commands that write and check shards: sample, shards, verify."""

import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline import console
from pipeline.base.errors import DataError
from pipeline.base.files import is_open_to_all
from pipeline.base.options import option
from pipeline.base.store import is_remote, open_location
from pipeline.base.workers import count_cpus, run_alone
from pipeline.cli.looking import Cached
from pipeline.console import command, count_of, echo, name_options, progress_bar, refuse_usage, say, say_next
from pipeline.etl.shards import Execution, write_shards
from pipeline.etl.writing import Options, preview_split
from pipeline.images import DOUBTS
from pipeline.labels import parse_labels
from pipeline.look.label_report import print_report
from pipeline.manifest import concat_labels, describe_notes, find_restriction
from pipeline.measure.counts import count_labels, describe_views
from pipeline.policies import BLANK_HELP, UNCERTAIN_HELP, check_blank_policy, parse_uncertain_policy
from pipeline.sources.sets import OWN, SETS, describe_shards, find_source, find_terms
from pipeline.sources.table import guess_command, parse_columns
from pipeline.sources.words import parse_values
from pipeline.synthetic.sample import Shortcut, parse_shortcut, write_sample

if TYPE_CHECKING:
    from pipeline.etl.shards import RunSummary
    from pipeline.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What `sample` takes."""

    out: Path = option(..., argument=True, type=console.FOLDER)
    images: int = option(2000, "Number of images, train and valid together.", low=20)
    seed: int = option(0, "Another seed gives other patients.", low=0, high=2**63 - 1)
    laterals: float | None = option(None, "Share of studies with a lateral.", low=0, high=1, shown="as in CheXpert")
    valid: float = option(0.12, "Share of images in valid.csv.", low=0.01, high=0.9)
    shortcuts: tuple[Shortcut, ...] = option(
        (),
        "Plant a cue (marker, border, corners) in train, tied to a label: Pneumonia=marker:0.9; valid has none.",
        parse=parse_shortcut,
        metavar="LABEL=CUE:STRENGTH",
        flag="shortcut",
    )
    workers: int = option(count_cpus, low=1, shown="all cores")


@command("sample", Drawing, example="pipeline sample sample && pipeline shards sample shards/sample")
def sample(given: Drawing) -> None:
    """Write a synthetic CheXpert to OUT, to try things out without patient data."""
    cues = [shortcut.cue for shortcut in given.shortcuts]
    refuse_usage(len(set(cues)) < len(cues), "--shortcut: a cue can be tied to one label")
    with progress_bar("Writing", "images") as advance:
        folder = write_sample(progress=advance, **vars(given))
    echo(f"{folder}: {given.images:,} synthetic images")
    say_next("pipeline", "shards", given.out, Path("shards", given.out.resolve().name))


def parse_source(text: str, is_folder: bool = False) -> Path:
    """A path of this machine or URL; what is there is checked later, but that a folder is no file."""
    if not text.strip():
        raise DataError("the name is empty; for the folder you are in, write .")
    path = open_location(text)
    if is_folder and not is_remote(path) and path.is_file():
        raise DataError(f"'{path}' is a file")
    return path


def parse_split(text: str) -> tuple[str, Path]:
    """The split's name and the CSV's path of `train=foo.csv`."""
    split, equals, csv = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z0-9_]+", split) or split == "dev":
        raise DataError(f"'{text}' is not like train=foo.csv (dev comes out of train by --dev)")
    return split, open_location(csv)


def check_name(text: str) -> None:
    """Raise DataError for a name that cannot be a prefix of patients' names if several sets are read as one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text):
        raise DataError(f"'{text}' is not a name of letters, digits, '.', '_' and '-'")


BLANKS = ("blank", "not-annotated")
policy_option = partial(option, None, metavar="POLICY")
parse_folder = partial(parse_source, is_folder=True)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The data set that `shards` reads, and its output folder."""

    source: Path = option(..., argument=True, parse=parse_source)
    out: Path | None = option(None, argument=True, parse=parse_folder)
    dataset: str | None = option(
        None, "Data set in SOURCE (docs/data.md).", choices=tuple(SETS), flag="set", metavar="SET", shown="by its files"
    )
    columns: tuple[tuple[str, str], ...] = option(
        (),
        "With --set table or webdataset: path=Image,patient=MRN,Edema=edema.",
        split=parse_columns,
        metavar="NAME=COLUMN,…",
    )
    values: tuple[tuple[str, int | None], ...] = option(
        (),
        "What words in such label columns mean: yes=1,no=0,maybe=-1; Edema:yes=1 for a label's own.",
        split=parse_values,
        metavar="WORD=STATE,…",
    )
    name: str = option("", "Dataset name; required if another hospital's data uses this layout.", check=check_name)
    annotated: tuple[str, ...] = option(
        (),
        "Labels that were looked for in a set with --name or a table; the others are not annotated.",
        split=parse_labels,
        metavar="LABEL,…",
    )
    blanks: str = option(
        "", "What an empty cell of such a set means: not mentioned, or not annotated.", choices=BLANKS, shown="blank"
    )
    uncertain: str | None = policy_option(
        UNCERTAIN_HELP, check=parse_uncertain_policy, shown="best, or as existing shards have it"
    )
    blank: str | None = policy_option(
        BLANK_HELP, check=check_blank_policy, shown="zeros, or as existing shards have it"
    )
    splits: tuple[tuple[str, Path], ...] = option(
        (), "CSV (or tars) of a split, instead of SOURCE's own.", parse=parse_split, metavar="SPLIT=CSV", flag="split"
    )
    roots: tuple[Path, ...] = option((), "Another folder of images.", parse=parse_folder, metavar="FOLDER", flag="root")
    facts: tuple[str, ...] = option(
        (), "CSV or XLSX with extra columns, by patient or study; or your own table itself.", metavar="FILE"
    )
    guess: bool = option(False, "Print the command for a table of your own, its columns guessed; do nothing else.")
    dry_run: bool = option(False, "Print what would be written and which images are missing; write nothing.")

    def find_source(self) -> tuple["Source", Path]:
        """The data set, and the folder of its shards.

        Raises UsageError for options that do not go together, and DataError as the library does.
        """
        if self.out is None:
            raise click.UsageError("Missing argument 'OUT'.")
        is_web = str(self.out).startswith(("http:", "https:"))
        refuse_usage(is_web, f"{self.out}: a web server is only read from; write to a folder or s3://bucket/prefix")
        csvs, is_own = dict(self.splits), self.dataset in OWN
        if self.dataset == "table" and not self.columns:
            raise click.UsageError(f"--set table needs --columns, such as: {name_options(guess_command(self.source))}")
        is_named = self.columns or self.values
        refuse_usage(is_named and not is_own, "--columns and --values go with --set table or webdataset")
        has_csvs = is_own or self.dataset in (None, "chexpert")
        refuse_usage(csvs and not has_csvs, "--split is for CSVs like CheXpert's, --set table or --set webdataset")
        refuse_usage(len(csvs) < len(self.splits), "--split: a split takes one CSV")
        files = [open_location(text) for text in self.facts]
        source = find_source(self.source, csvs, self.roots, self.dataset, self.columns, files, self.name)
        return source._replace(annotated=self.annotated, blanks=self.blanks, values=self.values), self.out


@command(
    "shards",
    Sharding,
    Options,
    Execution,
    example="pipeline shards ~/CheXpert-v1.0-small shards --size 320 --views frontal",
)
def shards(given: Sharding, options: Options, how: Execution) -> int:
    """Write the data set in SOURCE as shards to OUT: tars, Arrow tables, and a manifest at the end.

    Raw labels are kept; the policies are recorded as the shards' defaults, which training may override. The
    same command continues a run that was stopped or killed, and restores missing or damaged files of finished
    shards. SOURCE and OUT may be s3://bucket/prefix. For a table of your own, start with: pipeline shards TABLE --guess
    """
    if given.guess:
        echo(name_options(guess_command(given.source)))
        return 0
    refuse_usage(options.size is None and options.square != "no", "--square needs a --size")
    source, out = given.find_source()
    if given.dry_run:
        code = _print_preview(source, options, how)
        say_next("pipeline", *(word for word in sys.argv[1:] if word != "--dry-run"))
        return code
    start = time.perf_counter()
    resumed: int | None = None
    with progress_bar("Sharding", "images") as advance:

        def show(done: int, total: int, rejects: int) -> None:
            nonlocal resumed
            if resumed is None:  # once, and only if something is written
                _warn_of_terms(source, out)
                resumed = done
            rate = (done - resumed) / (time.perf_counter() - start)
            advance(done, total, f"{rate:,.0f} images/s  {rejects} rejects")

        policies = {"uncertain": given.uncertain, "blank": given.blank}
        run = write_shards(source, out, options, policies, how, show)
    seconds = time.perf_counter() - start
    views, one_class, repeats, notes = run_alone(describe_shards, out, f"counting the labels of {out}")
    if how.strict and one_class:
        raise DataError(f"--strict: {'; '.join(one_class)}; choose other policies")
    for text in one_class:
        say(f"{text} by these policies: it cannot be learned")
    for text in repeats:
        say(f"Warning: {text}")
    _print_run(out, run, seconds, views)
    for text in describe_notes(notes):
        echo(text)
    say_next("pipeline", "verify", out, "--deep")
    return 3 if how.strict and (run.manifest.rejects or not notes.keys().isdisjoint(DOUBTS)) else 0


def _warn_of_terms(source: "Source", out: Path) -> None:
    """Warn if images that may not be shared would be written to a place that others can read."""
    restricted = find_restriction(find_terms(source)._asdict())
    if restricted and is_remote(out):
        say(f"Warning: {out}: make sure that only people bound by the {restricted} can read it")
    elif restricted and is_open_to_all(out):
        who = f"every user of this machine can read it; only people bound by the {restricted} may"
        say(f"Warning: {out}: {who}: chmod o-rx {out}")


def _print_run(out: Path, run: "RunSummary", seconds: float, views: str) -> None:
    images = size = 0
    for name, split in run.manifest.splits.items():
        stored = sum(shard.bytes for shard in split.shards)
        images, size = images + split.samples, size + stored
        samples = f"{split.samples:8,} images {split.studies:8,} studies {split.patients:7,} patients"
        echo(f"{name:6} {samples} {len(split.shards):4} shards {stored / 1e6:10,.1f} MB")
    if views:
        echo(views)
    if run.manifest.rejects:
        echo(f"rejected images: {len(run.manifest.rejects):,}, see {out / 'rejects.csv'}")
    if not run.is_new:
        if run.manifest.rejects:
            echo("to try rejected images again, write to a new folder")
        restored = f"restored: {', '.join(run.restored)}"
        echo(f"{out}: {restored if run.restored else 'complete already, nothing to do'}")
        return
    if run.resumed:
        echo(f"{run.resumed:,} images were there already")
    for text in run.notes:
        echo(text)
    if run.stripped:
        echo(f"metadata removed from {run.stripped:,} images")
    rate = (images - run.resumed) / seconds
    volume = f"{run.bytes_in / 1e6:,.1f} MB in, {size / 1e6:,.1f} MB out"
    echo(f"{out}: written in {seconds:,.1f} s, {rate:,.0f} images/s, {volume}")


def _print_preview(source: "Source", options: Options, how: Execution) -> int:
    """Print what would be written; returns the exit code of the real run."""
    tables, omitted, notes = options.read_splits(source)
    missing, total = 0, sum(map(len, tables.values()))
    for name, table in tables.items():
        absent, count, size = preview_split(table, source, options)
        dropped = ", ".join(f"{number:,} by --{why}" for why, number in omitted[name].items() if number) or "none"
        rows = f"{len(table) + sum(omitted[name].values()):8,} rows, {len(table):,} kept, dropped: {dropped}"
        echo(f"{name:6} {rows}; {count:,} shards, about {size / 1e6:,.1f} MB")
        if absent:
            echo(f"       {len(absent):,} images are missing, for example {absent[0]}")
        missing += len(absent)
    for text in notes:
        echo(text)
    table = concat_labels([*tables.values()])
    if options.views == "all":
        echo(describe_views(table))
    print_report(count_labels(table))
    echo("dry run: nothing was written")
    if missing > how.max_bad * total:
        raise DataError(f"{missing:,} of {total:,} images are missing, more than --max-bad {how.max_bad:.2%}")
    return 3 if how.strict and missing else 0


@dataclass(frozen=True, kw_only=True)
class Verification(Cached):
    """What `verify` takes."""

    shards: Path | str = option(..., argument=True, type=console.PathOrUrl(file_okay=False))
    deep: bool = option(False, "Decode every image too, and compare every JSON with its row.")
    workers: int = option(count_cpus, low=1, shown="all cores")


@command("verify", Verification, example="pipeline verify shards --deep")
def verify(given: Verification) -> None:
    """Check every file of SHARDS (a folder or URL) against the manifest, and every tar against its table.

    One line for each problem, on stdout; exit code 1 if there are any.
    """
    from pipeline.etl.verify import PRINTED, verify_shards
    from pipeline.stream.cache import find_shards, redact

    start, name = time.perf_counter(), redact(str(given.shards))
    folder, remote = find_shards(given.shards, given.cache)
    with progress_bar("Verifying", "shards") as advance:
        report = verify_shards(folder, given.deep, given.workers, advance, remote.path if remote else None)
    for warning in report.warnings:
        say(f"Warning: {warning}")
    for file, lines in report.problems.items():
        echo("\n".join(lines[:PRINTED]))
        if len(lines) > PRINTED:
            echo(f"{name.rstrip('/')}/{file}: and {len(lines) - PRINTED:,} more")
    if report.problems:
        problems = count_of(sum(map(len, report.problems.values())), "problem")
        again = "" if remote else "; to restore them, run the command that wrote them again"
        raise click.ClickException(f"{name}: {problems} in {count_of(len(report.problems), 'file')}{again}")
    splits = report.manifest.splits
    written = [shard for split in splits.values() for shard in split.shards]
    samples, size = (sum(getattr(shard, unit) for shard in written) for unit in ("samples", "bytes"))
    sizes = f"{len(splits)} splits, {len(written):,} shards, {samples:,} samples, {size / 1e6:,.1f} MB"
    echo(f"{name}: OK: {sizes} in {time.perf_counter() - start:.1f} s")
    say_next(*(("python", "-m", "train", "--run", "RUN", "--shards", name) if remote else ("pipeline", "audit", name)))
