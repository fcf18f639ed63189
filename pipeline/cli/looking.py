"""The commands that look at labels and images: stats, show."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.base.files import write_atomically
from pipeline.base.options import option
from pipeline.command import FILE, PathOrUrl, command
from pipeline.console import echo, refuse_usage, say, say_next
from pipeline.labels import LABELS, STATES, VIEWS
from pipeline.look.tables import print_report
from pipeline.manifest import NAME, read_manifest
from pipeline.measure.counts import (
    NO_GROUP,
    LabelStatistics,
    compare_tables,
    count_cooccurrence,
    count_groups,
    count_labels,
    count_targets,
    list_variables,
    parse_policies,
    start_report,
    to_csv,
    to_json,
)
from pipeline.policies import evaluation_targets

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.stream.cache import Remote


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A command that reads shards at a URL."""

    cache: Path = option(Path(".cache"), "Cache folder of shards from URLs.")


@dataclass(frozen=True, kw_only=True)
class Stats(Cached):
    """What `stats` takes."""

    sources: tuple[Path | str, ...] = option(..., argument=True, type=PathOrUrl(exists=True))
    split: str | None = option(None, "Split to count.  [default: all]")
    views: str = option("all", "By the column Frontal/Lateral.", choices=VIEWS)
    by: str | None = option(
        None, f"Count each group of images: by {', '.join(NO_GROUP)}, or a fact.", metavar="FACT"
    )
    facts: tuple[str, ...] = option(
        (), "CSV or XLSX with extra columns to join; not for shards.", metavar="FILE"
    )
    cooccurrence: bool = option(False, "Count how often two labels are positive together.")
    policy: tuple[Any, ...] = option(
        (), "Targets under a policy: best,Edema=zeros,blank=ignore.", split=parse_policies
    )
    against: Path | str | None = option(None, "Compare with another source.", type=PathOrUrl(exists=True))
    against_split: str | None = option(None, "Split of that source.")
    html: Path | None = option(None, "Write a page with everything, and images.", type=FILE)
    format: str = option("table", choices=("table", "json", "csv"))

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""
        sections = sum(map(bool, (self.by, self.cooccurrence, self.policy, self.against)))
        refuse_usage(
            self.format == "csv" and sections > 1,
            "--format csv has room for one of --by, --cooccurrence, --policy and --against",
        )
        alone = {"view": self.views != "all", "projection": self.views == "lateral"}
        why = ": laterals have none" if self.by == "projection" else ""
        text = f"--by {self.by} has one group under --views {self.views}{why}"
        refuse_usage(alone.get(self.by or "", False), text)
        refuse_usage(self.against_split and not self.against, "--against-split needs --against")
        check_output("--html", self.html, (".html",))


@command("stats", Stats, example="pipeline stats train.csv --views frontal --by sex --html labels.html")
def stats(given: Stats) -> None:
    """Count positive, uncertain, negative and blank per label in SOURCES (shards, dataset folders or CSVs).

    Shards may be at a URL: s3://bucket/shards. Several are counted together; --by set counts each.
    """
    from pipeline.sources.load import load_table, load_tables
    from pipeline.stream.cache import find_shards

    given.check()
    split, views = given.split, given.views
    shards = [find_shards(source, given.cache) for source in given.sources]
    other = find_shards(given.against, given.cache)[0] if given.against else None
    refuse_usage(
        other and given.against_split == split and len(shards) == 1 and other.samefile(shards[0][0]),
        "--against is SOURCE itself; name another --against-split",
    )
    table = load_tables([path for path, _ in shards], split, views, [*map(Path, given.facts)])
    known = list_variables(table)
    refuse_usage(
        given.by not in (None, *known),
        f"--by {given.by}: these images can be grouped by {', '.join(known)}",
    )
    report = _build_report(table, given)
    if other:
        report["against"] = compare_tables(table, load_table(other, given.against_split, views))
    if given.html:
        write_atomically(given.html, _render_page(given, shards, report, table).encode())
        say(f"{given.html}: written")
    if given.format == "table":
        print_report(report)
        if all(remote is None for _, remote in shards):
            say_next("pipeline", "audit", *given.sources)
    else:
        echo(to_json(report) if given.format == "json" else to_csv(report))


def _build_report(table: "pa.Table", given: Stats) -> LabelStatistics:
    statistics = count_labels(table)
    report = start_report(statistics)
    if given.by:
        report["by"] = count_groups(table, given.by)
    if given.cooccurrence:
        report["cooccurrence"] = count_cooccurrence(table)
    if given.policy:
        report["policy"] = count_targets(statistics, *given.policy)
        for label, targets in report["policy"]["labels"].items():
            if targets["pos_weight"] is None:
                counts = f"{targets['positives']:,} positives and {targets['negatives']:,} negatives"
                say(f"Warning: {label} is left with one class: {counts}")
    return report


def _name(source: str | Path) -> str:
    """The last part of a path or URL."""
    from pipeline.stream.cache import redact

    return Path(redact(str(source))).resolve().name


def _render_page(
    given: Stats,
    shards: "Sequence[tuple[Path, Remote | None]]",
    report: LabelStatistics,
    table: "pa.Table",
) -> str:
    from pipeline.look.label_report import find_examples, find_groups, render_label_report
    from pipeline.measure.audit import audit_labels
    from pipeline.measure.covariates import find_covariates
    from pipeline.sources.load import load_tables

    shown = report.copy()
    shown["cooccurrence"] = count_cooccurrence(table)
    split, views, sources = given.split, given.views, [path for path, _ in shards]
    alone = len(sources) == 1 and (sources[0] / NAME).is_file()
    examples = find_examples(sources[0], split, views, shards[0][1]) if alone else {}
    audited = load_tables(sources, split, views, audited=True)
    cells = evaluation_targets(audited, find_blank(sources))
    audit = audit_labels(audited, *cells, find_covariates(audited), together=False)  # which takes longer
    scope = [] if sources[0].is_file() else [f"split {split}" if split else "all splits"]
    scope.append(f"{views} views")
    if given.against:
        scope.append(
            f"against {f'{given.against_split} of ' if given.against_split else ''}{_name(given.against)}"
        )
    title = f"Labels of {', '.join(map(_name, given.sources))}"
    return render_label_report(title, ", ".join(scope), shown, find_groups(table), examples, audit)


def find_blank(sources: Sequence[Path]) -> str:
    """The policy for blank cells of the first source; zeros where it is no folder of shards."""
    return read_manifest(sources[0]).policies["blank"] if (sources[0] / NAME).is_file() else "zeros"


def check_output(option: str, path: Path | None, suffixes: Collection[str]) -> None:
    """Refuse a file that could not be written at the end, before anything is counted."""
    if path:
        wrong = path.suffix.lower() not in suffixes
        refuse_usage(wrong, f"{option} {path}: the name must end in {' or '.join(suffixes)}")
        refuse_usage(not path.parent.is_dir(), f"{option} {path}: there is no folder {path.parent}")


def refuse_augmented(_: click.Context, param: click.Parameter, value: bool) -> None:
    """Raise UsageError with the command that --augmented has become."""
    refuse_usage(value, f"--{param.name} is a command now: python -m train inputs --shards … --out …")


@dataclass(frozen=True, kw_only=True)
class Show(Cached):
    """What `show` takes."""

    shards: Path | str = option(..., argument=True, type=PathOrUrl(file_okay=False))
    split: str = option("train")
    label: str | None = option(
        None, "Show images by their state of this label.", choices=LABELS, metavar="LABEL"
    )
    state: str | None = option(None, "State of --label.", choices=STATES, shown="positive")
    where: tuple[str, ...] = option(
        (), "Only images that meet this: sex=Female, age>=60.", metavar="CONDITION"
    )
    n: int = option(16, "Number of images.", low=1, high=400)
    seed: int = option(0, "Another seed shows other images.", low=0)
    out: Path = option(..., "Picture: .png or .jpg.", type=FILE)


@click.option("--augmented", is_flag=True, hidden=True, expose_value=False, callback=refuse_augmented)
@command("show", Show, example="pipeline show shards --label Edema --state uncertain --out edema.png")
def show(given: Show) -> None:
    """Draw a contact sheet of images in SHARDS, spread over the split, with their keys and labels."""
    from pipeline.look.sheet import FORMATS, draw_images, find_state, save_sheet, spread_rows
    from pipeline.stream.cache import find_shards
    from pipeline.stream.samples import open_split
    from pipeline.stream.select import select_rows

    out, label = given.out, given.label
    refuse_usage(given.state and not label, "--state needs --label")
    check_output("--out", out, FORMATS)
    folder, remote = find_shards(given.shards, given.cache)
    opened = open_split(folder, read_manifest(folder), given.split, remote)
    rows, state = select_rows(opened.table, given.where), given.state or "positive"
    if label:
        rows = find_state(opened, rows, label, state)
    chosen = spread_rows(rows, given.n, given.seed)
    # A sheet that says sex=Female beside keys would tell of patients: it says that there were conditions.
    what = f"{f' {state} for {label}' if label else ''}{' under conditions' if given.where else ''}"
    title = f"{given.split}: {len(chosen):,} of {len(rows):,} images{what}, seed {given.seed}"
    sheet = draw_images(title, opened, chosen)
    save_sheet(sheet, out)
    echo(f"{out}: {title}")
