"""The commands that look at labels and images: stats, show."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.base.files import write_atomically
from pipeline.console import CACHE_FOLDER, Parsed, PathOrUrl, refuse_usage, say, say_next
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


@click.command(epilog="Example: pipeline stats train.csv --views frontal --by sex --html labels.html")
@click.argument("sources", nargs=-1, required=True, type=PathOrUrl(exists=True))
@click.option("--split", help="Split to count.  [default: all]")
@click.option("--views", default="all", type=click.Choice(VIEWS), help="By the column Frontal/Lateral.")
@click.option(
    "--by", metavar="FACT", help=f"Count each group of images: by {', '.join(NO_GROUP)}, or a fact."
)
@click.option(
    "--facts", multiple=True, metavar="FILE", help="CSV or XLSX with extra columns to join; not for shards."
)
@click.option("--cooccurrence", is_flag=True, help="Count how often two labels are positive together.")
@click.option(
    "--policy",
    type=Parsed(parse_policies, "POLICY"),
    help="Targets under a policy: best,Edema=zeros,blank=ignore.",
)
@click.option("--against", type=PathOrUrl(exists=True), help="Compare with another source.")
@CACHE_FOLDER
@click.option("--against-split", help="Split of that source.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with everything, and images.",
)
@click.option("--format", "format_", default="table", type=click.Choice(["table", "json", "csv"]))
def stats(
    sources: tuple[str | Path, ...],
    split: str | None,
    views: str,
    by: str | None,
    facts: tuple[str, ...],
    cooccurrence: bool,
    policy: tuple[dict[str, str], str] | None,
    against: str | Path | None,
    cache: Path,
    against_split: str | None,
    html: Path | None,
    format_: str,
) -> None:
    """Count positive, uncertain, negative and blank per label in SOURCES (shards, dataset folders or CSVs).

    Shards may be at a URL: s3://bucket/shards. Several are counted together; --by set counts each.
    """
    from pipeline.sources.load import load_table, load_tables
    from pipeline.stream.cache import find_shards

    sections = sum(map(bool, (by, cooccurrence, policy, against)))
    refuse_usage(
        format_ == "csv" and sections > 1,
        "--format csv has room for one of --by, --cooccurrence, --policy and --against",
    )
    refuse_usage(by == "view" and views != "all", f"--by view has one group under --views {views}")
    refuse_usage(
        by == "projection" and views == "lateral",
        "--by projection has one group under --views lateral: laterals have none",
    )
    refuse_usage(against_split and not against, "--against-split needs --against")
    check_output("--html", html, (".html",))
    found = [find_shards(source, cache) for source in sources]
    other = find_shards(against, cache)[0] if against else None
    refuse_usage(
        other and against_split == split and len(found) == 1 and other.samefile(found[0][0]),
        "--against is SOURCE itself; name another --against-split",
    )
    table = load_tables([path for path, _ in found], split, views, [*map(Path, facts)], note=say)
    known = list_variables(table)
    refuse_usage(by not in (None, *known), f"--by {by}: these images can be grouped by {', '.join(known)}")
    report = _build_report(table, by, cooccurrence, policy)
    if other:
        report["against"] = compare_tables(table, load_table(other, against_split, views))
    if html:
        scope = [] if found[0][0].is_file() else [f"split {split}" if split else "all splits"]
        scope.append(f"{views} views")
        if against:
            scope.append(f"against {f'{against_split} of ' if against_split else ''}{_name(against)}")
        title = f"Labels of {', '.join(map(_name, sources))}"
        page = _render_page(title, found, split, views, ", ".join(scope), report, table)
        write_atomically(html, page.encode())
        say(f"{html}: written")
    if format_ == "table":
        print_report(report)
        if all(remote is None for _, remote in found):
            say_next("pipeline", "audit", *sources)
    else:
        click.echo(to_json(report) if format_ == "json" else to_csv(report))


def _build_report(
    table: "pa.Table", by: str | None, cooccurrence: bool, policy: tuple[dict[str, str], str] | None
) -> LabelStatistics:
    statistics = count_labels(table)
    report = start_report(statistics)
    if by:
        report["by"] = count_groups(table, by)
    if cooccurrence:
        report["cooccurrence"] = count_cooccurrence(table)
    if policy:
        report["policy"] = count_targets(statistics, *policy)
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
    title: str,
    found: "Sequence[tuple[Path, Remote | None]]",
    split: str | None,
    views: str,
    scope: str,
    report: LabelStatistics,
    table: "pa.Table",
) -> str:
    from pipeline.look.label_report import find_examples, find_groups, render_label_report
    from pipeline.measure.audit import audit_labels
    from pipeline.measure.covariates import find_covariates
    from pipeline.sources.load import load_tables

    shown = report.copy()
    shown["cooccurrence"] = count_cooccurrence(table)
    sources = [path for path, _ in found]
    alone = len(sources) == 1 and (sources[0] / NAME).is_file()
    examples = find_examples(sources[0], split, views, found[0][1]) if alone else {}
    audited = load_tables(sources, split, views, audited=True)
    cells = evaluation_targets(audited, find_blank(sources))
    audit = audit_labels(audited, *cells, find_covariates(audited), together=False)  # which takes longer
    return render_label_report(title, scope, shown, find_groups(table), examples, audit)


def find_blank(sources: Sequence[Path]) -> str:
    """The policy for blank cells of the first source; zeros where it is no folder of shards."""
    return read_manifest(sources[0]).policies["blank"] if (sources[0] / NAME).is_file() else "zeros"


def check_output(option: str, path: Path | None, suffixes: Collection[str]) -> None:
    """Refuse a file that could not be written at the end, before anything is counted."""
    if path:
        wrong = path.suffix.lower() not in suffixes
        refuse_usage(wrong, f"{option} {path}: the name must end in {' or '.join(suffixes)}")
        refuse_usage(not path.parent.is_dir(), f"{option} {path}: there is no folder {path.parent}")


@click.command(epilog="Example: pipeline show shards --label Edema --state uncertain --out edema.png")
@click.argument("shards", type=PathOrUrl(file_okay=False))
@CACHE_FOLDER
@click.option("--split", default="train")
@click.option(
    "--label",
    metavar="LABEL",
    type=click.Choice(LABELS, case_sensitive=False),
    help="Show images by their state of this label.",
)
@click.option("--state", type=click.Choice(list(STATES)), help="State of --label.", show_default="positive")
@click.option(
    "--where", multiple=True, metavar="CONDITION", help="Only images that meet this: sex=Female, age>=60."
)
@click.option("--n", default=16, type=click.IntRange(1, 400), help="Number of images.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Another seed shows other images.")
@click.option("--augmented", is_flag=True, hidden=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Picture: .png or .jpg."
)
def show(
    shards: str | Path,
    cache: Path,
    split: str,
    label: str | None,
    state: str | None,
    where: tuple[str, ...],
    n: int,
    seed: int,
    augmented: bool,
    out: Path,
) -> None:
    """Draw a contact sheet of images in SHARDS, spread over the split, with their keys and labels."""
    from pipeline.look.sheet import FORMATS, draw_images, find_state, save_sheet, spread_rows
    from pipeline.stream.cache import find_shards
    from pipeline.stream.samples import open_split
    from pipeline.stream.select import select_rows

    refuse_usage(state and not label, "--state needs --label")
    refuse_usage(augmented, "--augmented is a command now: python -m train inputs --shards … --out …")
    check_output("--out", out, FORMATS)
    folder, remote = find_shards(shards, cache)
    opened = open_split(folder, read_manifest(folder), split, remote)
    rows = select_rows(opened.table, where)
    if label:
        state = state or "positive"
        rows = find_state(opened, rows, label, state)
    chosen = spread_rows(rows, n, seed)
    # A sheet that says sex=Female beside keys would tell of patients: it says that there were conditions.
    what = f"{f' {state} for {label}' if label else ''}{' under conditions' if where else ''}"
    title = f"{split}: {len(chosen):,} of {len(rows):,} images{what}, seed {seed}"
    sheet = draw_images(title, opened, chosen)
    save_sheet(sheet, out)
    click.echo(f"{out}: {title}")
