"""The `pipeline` command: parse, call, print.

Each command imports what it needs itself, so that `--help` is quick; torch is needed by `show --augmented` alone.
"""

import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.base.errors import DataError, printable
from pipeline.base.workers import count_cpus
from pipeline.console import Checked, Number, Parsed, progress_bar, run_command
from pipeline.images import ENCODINGS, SQUARES
from pipeline.labels import LABELS, VIEWS
from pipeline.look.tables import print_report
from pipeline.policies import BLANK_HELP, UNCERTAIN_HELP, check_blank_policy, parse_uncertain_policy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from pipeline.etl.planning import Options
    from pipeline.etl.shards import RunSummary
    from pipeline.measure.counts import LabelStatistics, Statistics
    from pipeline.sources.chexpert import Source

VARIANTS = 4  # of each augmented image


@click.group(context_settings={"show_default": True})
@click.version_option(package_name="chexpert-pipeline")
def cli() -> None:
    """Turn CheXpert into WebDataset shards with Arrow label tables, and report on its labels."""


@cli.command(epilog="Example: pipeline sample sample && pipeline shards sample shards/sample")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--images", default=2000, type=click.IntRange(min=20), help="Train and valid together.")
@click.option(
    "--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Another seed gives other patients."
)
@click.option(
    "--laterals",
    type=Number(0, 1),
    help="Share of studies with a lateral.",
    show_default="as in CheXpert",
)
@click.option("--valid", default=0.12, type=Number(0.01, 0.9), help="Share of images in valid.csv.")
@click.option("--workers", default=count_cpus, type=click.IntRange(min=1), show_default="all cores")
def sample(out: Path, images: int, seed: int, laterals: float | None, valid: float, workers: int) -> None:
    """Write a synthetic CheXpert to OUT: drawn chest films, for trying things out without patient data."""
    from pipeline.synthetic.sample import write_sample

    done = 0
    with progress_bar("Drawing", "images") as advance:

        def count(finished: int) -> None:
            nonlocal done
            done += finished
            advance(done, images)

        folder = write_sample(
            out, images=images, seed=seed, workers=workers, progress=count, laterals=laterals, valid=valid
        )
    click.echo(f"{folder}: {images:,} synthetic images")


def parse_size(text: str) -> int | None:
    """A number of pixels; None for `original`."""
    if text == "original":
        return None
    if not text.isdecimal() or int(text) < 16:
        raise DataError(f"'{text}' is neither a number of pixels, 16 or more, nor original")
    return int(text)


def parse_folder(text: str) -> Path:
    """The path of a folder, or of one at a URL; what it holds is looked at later."""
    from pipeline.base.store import open_location

    if not text.strip():
        raise DataError("the name is empty; for the folder you are in, write .")
    path = open_location(text)
    if isinstance(path, Path) and path.is_file():
        raise DataError(f"'{path}' is a file")
    return path


def parse_split(text: str) -> tuple[str, Path]:
    """The split's name and the CSV's path of `train=foo.csv`."""
    from pipeline.base.store import open_location

    split, equals, csv = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z0-9_]+", split) or split == "dev":
        raise DataError(f"'{text}' is not like train=foo.csv (dev comes out of train by --dev)")
    return split, open_location(csv)


@cli.command(epilog="Example: pipeline shards ~/CheXpert-v1.0-small shards --size 320 --views frontal")
@click.argument("source", type=Parsed(parse_folder, "folder"))
@click.argument("out", type=Parsed(parse_folder, "folder"))
@click.option(
    "--size",
    default=320,
    type=Parsed(parse_size, "PIXELS|original"),
    help="Shorter side; never enlarged; original: as it is.",
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
    show_default="best, or as the shards there",
    help=UNCERTAIN_HELP,
)
@click.option(
    "--blank",
    metavar="POLICY",
    type=Checked(check_blank_policy),
    show_default="zeros, or as the shards there",
    help=BLANK_HELP,
)
@click.option("--dev", default=0.05, type=Number(0, 1), help="Share of train's patients.")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Decides the dev patients and the order.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="So many images per split: whole patients, at least one."
)
@click.option("--samples-per-shard", default=1000, type=click.IntRange(min=1))
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=Parsed(parse_split, "SPLIT=CSV"),
    help="CSVs of your own, instead of SOURCE's.",
)
@click.option(
    "--root", "roots", multiple=True, type=Parsed(parse_folder, "folder"), help="Another folder of images."
)
@click.option("--max-pixels", default=50_000_000, type=click.IntRange(min=1), help="Reject larger images.")
@click.option(
    "--bits",
    type=click.IntRange(8, 16),
    show_default="as the file says, else 16",
    help="How many bits of a 16-bit PNG hold the picture.",
)
@click.option("--max-bad", default=0.001, type=Number(0, 1), help="Stop above this share of rejects.")
@click.option("--strict", is_flag=True, help="Refuse labels with one class; exit with 3 on any reject.")
@click.option("--workers", default=count_cpus, type=click.IntRange(min=1), show_default="all cores")
@click.option("--scheduler", metavar="URL", help="Work on the Dask cluster there: tcp://host:8786.")
@click.option("--overwrite", is_flag=True, help="Replace the shards in OUT once the new ones are whole.")
@click.option("--repair", is_flag=True, help="Write missing or damaged files of finished shards again.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and which images are missing.")
def shards(
    source: Path,
    out: Path,
    uncertain: str | None,
    blank: str | None,
    splits: tuple[tuple[str, Path], ...],
    roots: tuple[Path, ...],
    max_bad: float,
    strict: bool,
    workers: int,
    scheduler: str | None,
    overwrite: bool,
    repair: bool,
    dry_run: bool,
    **options: Any,
) -> int:
    """Write the CheXpert folder SOURCE as shards to OUT: tars, Arrow tables, and a manifest at the end.

    Raw labels are kept; the policies are recorded as the shards' defaults, which training may override. The
    same command continues a run that was stopped or killed. Both may be s3://bucket/prefix.
    """
    from pipeline.base.workers import run_alone
    from pipeline.etl.planning import Options
    from pipeline.etl.shards import Execution, write_shards
    from pipeline.sources.chexpert import find_source
    from pipeline.sources.load import describe_shards

    if str(out).startswith(("http:", "https:")):
        raise click.UsageError(
            f"{out}: a web server is only read from; write to a folder or s3://bucket/prefix"
        )
    if options["size"] is None and options["square"] != "no":
        raise click.UsageError("--square needs a --size")
    for number, (name, _) in enumerate(splits):
        if name in dict(splits[:number]):
            raise click.UsageError(f"--split {name} is there twice; one CSV makes a split")
    if overwrite and repair:
        raise click.UsageError("--overwrite or --repair, not both")
    found = find_source(source, dict(splits), roots)
    if dry_run:
        return _print_preview(found, Options(**options), max_bad, strict)
    start = time.perf_counter()
    resumed: int | None = None
    with progress_bar("Sharding", "images") as advance:

        def show(done: int, total: int, rejects: int) -> None:
            nonlocal resumed
            resumed = done if resumed is None else resumed
            rate = (done - resumed) / (time.perf_counter() - start)
            advance(done, total, f"{rate:,.0f} images/s  {rejects} rejects")

        run = write_shards(
            found,
            out,
            Options(**options),
            {"uncertain": uncertain, "blank": blank},
            Execution(workers, max_bad, scheduler, strict, overwrite, repair),
            show,
        )
    seconds = time.perf_counter() - start
    described = run_alone(describe_shards, out)
    if strict and described.one_class:
        raise DataError(f"--strict: {'; '.join(described.one_class)}; choose other policies")
    for text in described.one_class:
        click.echo(f"{text} by these policies: it cannot be learnt", err=True)
    _print_run(out, run, seconds, described.views)
    return 3 if strict and run.manifest.rejects else 0


def _print_run(out: Path, run: "RunSummary", seconds: float, views: str) -> None:
    from pipeline.base.store import is_remote

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
    if run.repaired:
        click.echo(f"{out}: written again: {', '.join(run.repaired)}")
        return
    if not run.is_new:
        click.echo(f"{out}: complete already, nothing to do")
        if run.restored:
            click.echo(
                f"{len(run.restored):,} of the rejected images can be used now, such as {run.restored[0]}; "
                "--overwrite writes the shards again with them"
            )
        return
    if run.resumed:
        click.echo(f"{run.resumed:,} images were there already")
    if run.moved:
        click.echo(run.moved)
    if run.stripped:
        click.echo(f"metadata removed from {run.stripped:,} images")
    rate = (images - run.resumed) / seconds
    click.echo(
        f"{out}: written in {seconds:,.1f} s, {rate:,.0f} images/s, "
        f"{run.bytes_in / 1e6:,.1f} MB in, {size / 1e6:,.1f} MB out"
    )
    checks = "" if is_remote(out) else f"pipeline stats {out}, pipeline verify {out}, "
    click.echo(f"next: {checks}python train.py --shards {out} --run RUN")


def _print_preview(source: "Source", options: "Options", max_bad: float, strict: bool) -> int:
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
    if preview.moved:
        click.echo(preview.moved)
    if options.views == "all":
        click.echo(preview.views)
    print_report(start_report(preview.statistics))
    click.echo("dry run: nothing was written")
    missing = sum(len(split.missing) for split in preview.splits.values())
    total = sum(split.kept for split in preview.splits.values())
    if missing > max_bad * total:
        raise DataError(f"{missing:,} of {total:,} images are missing, more than --max-bad {max_bad:.2%}")
    return 3 if strict and missing else 0


@cli.command(epilog="Example: pipeline stats train.csv --views frontal --by sex --plot labels.svg")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--split", help="One split of a folder.  [default: all together]")
@click.option("--views", default="all", type=click.Choice(VIEWS), help="By the column Frontal/Lateral.")
@click.option("--by", type=click.Choice(["view", "sex", "age", "projection"]), help="Per group of images.")
@click.option("--cooccurrence", is_flag=True, help="How often two labels are positive together.")
@click.option(
    "--policy", metavar="POLICY", help="What it makes of the labels: best,Edema=zeros,blank=ignore."
)
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="Compare with another source.")
@click.option("--against-split", help="One split of that source.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the states: .png or .svg."
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write all of it as a page, with images."
)
@click.option("--format", "format_", default="table", type=click.Choice(["table", "json", "csv"]))
def stats(
    source: Path,
    split: str | None,
    views: str,
    by: str | None,
    cooccurrence: bool,
    policy: str | None,
    against: Path | None,
    against_split: str | None,
    plot: Path | None,
    html: Path | None,
    format_: str,
) -> None:
    """Count positive, uncertain, negative and blank per label in SOURCE (shards, CheXpert folder or CSV)."""
    from pipeline.measure import counts as s
    from pipeline.sources.load import load_table

    if format_ == "csv" and sum(map(bool, (by, cooccurrence, policy, against))) > 1:
        raise click.UsageError(
            "--format csv has room for one of --by, --cooccurrence, --policy and --against"
        )
    if by == "view" and views != "all":
        raise click.UsageError(f"--by view has one group under --views {views}")
    if by == "projection" and views == "lateral":
        raise click.UsageError("--by projection has one group under --views lateral: laterals have none")
    if against_split and not against:
        raise click.UsageError("--against-split needs --against")
    if against and against_split == split and against.samefile(source):
        raise click.UsageError("--against is SOURCE itself; name another --against-split")
    _check_output("--plot", plot, (".png", ".svg"))
    _check_output("--html", html, (".html",))
    try:
        policies = s.parse_policies(policy) if policy else None
    except DataError as error:
        raise click.BadParameter(str(error), param_hint="--policy") from None
    table = load_table(source, split, views)
    statistics = s.count_labels(table)
    report = s.start_report(statistics)
    if by:
        report["by"] = s.count_groups(table, by)
    if cooccurrence:
        report["cooccurrence"] = s.count_cooccurrence(table)
    if policies:
        report["policy"] = s.count_targets(statistics, *policies)
        for label, targets in report["policy"]["labels"].items():
            if targets["pos_weight"] is None:
                counts = f"{targets['positives']:,} positives and {targets['negatives']:,} negatives"
                click.echo(f"Warning: {label} is left with one class: {counts}", err=True)
    if against:
        report["against"] = s.compare_tables(table, load_table(against, against_split, views))
    if plot:
        _plot(statistics, report.get("cooccurrence"), plot)
        click.echo(f"{plot}: written", err=True)
    if html:
        scope = [] if source.is_file() else [f"split {split}" if split else "all splits"]
        scope.append(f"{views} views")
        if against:
            scope.append(f"against {f'{against_split} of ' if against_split else ''}{against.resolve().name}")
        _write_page(source, split, views, table, report.copy(), ", ".join(scope), html)
        click.echo(f"{html}: written", err=True)
    if format_ == "json":
        click.echo(s.to_json(report))
    elif format_ == "csv":
        click.echo(s.to_csv(report))
    else:
        print_report(report)


def _plot(statistics: "Statistics", cooccurrence: dict[str, dict[str, int]] | None, path: Path) -> None:
    from pipeline.look.plots import draw_report, save_figure

    save_figure(draw_report(statistics, cooccurrence), path)


def _write_page(
    source: Path,
    split: str | None,
    views: str,
    table: "pa.Table",
    report: "LabelStatistics",
    scope: str,
    path: Path,
) -> None:
    from pipeline.base.files import write_atomically
    from pipeline.look.label_report import find_examples, find_groups, render_label_report
    from pipeline.manifest import NAME
    from pipeline.measure.counts import count_cooccurrence

    report["cooccurrence"] = count_cooccurrence(table)
    examples = find_examples(source, split, views) if (source / NAME).is_file() else {}
    title = f"Labels of {source.resolve().name}"
    page = render_label_report(title, scope, report, find_groups(table), examples)
    write_atomically(path, page.encode())


def _check_output(option: str, path: Path | None, suffixes: Collection[str]) -> None:
    """Refuse a file that could not be written at the end, before anything is counted."""
    if path and path.suffix.lower() not in suffixes:
        raise click.UsageError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if path and not path.parent.is_dir():
        raise click.UsageError(f"{option} {path}: there is no folder {path.parent}")


@cli.command(epilog="Example: pipeline show shards --label Edema --state uncertain --out edema.png")
@click.argument("shards", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", default="train")
@click.option("--label", metavar="LABEL", type=click.Choice(LABELS), help="Images by its state.")
@click.option(
    "--state",
    type=click.Choice(["positive", "uncertain", "negative", "blank"]),
    help="Of --label.",
    show_default="positive",
)
@click.option("--where", multiple=True, metavar="CONDITION", help="These images alone: sex=Female, age>=60.")
@click.option("--n", type=click.IntRange(1, 400), help="Images.", show_default="16, augmented 6")
@click.option("--seed", default=0, type=click.IntRange(0), help="Another seed shows other images.")
@click.option("--augmented", is_flag=True, help="Each image beside what training makes of it.")
@click.option(
    "--augment", type=click.Choice(["affine", "crop"]), help="As in training.", show_default="affine"
)
@click.option(
    "--image-size", type=click.IntRange(32), help="Side of the input in training.", show_default="320"
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Picture: .png or .jpg."
)
def show(
    shards: Path,
    split: str,
    label: str | None,
    state: str | None,
    where: tuple[str, ...],
    n: int | None,
    seed: int,
    augmented: bool,
    augment: str | None,
    image_size: int | None,
    out: Path,
) -> None:
    """Draw a contact sheet of images in SHARDS, spread over the split, with their keys and labels.

    --augmented shows each image as training reads it, and as its augmentation would change it in the first
    step of the first epochs, were these images the batch.
    """
    from pipeline.look.sheet import FORMATS, draw_images, draw_variants, find_state, save_sheet, spread_rows
    from pipeline.manifest import read_manifest
    from pipeline.stream.batches import open_split
    from pipeline.stream.select import select_rows

    if state and not label:
        raise click.UsageError("--state needs --label")
    if (augment or image_size) and not augmented:
        raise click.UsageError("--augment and --image-size need --augmented")
    _check_output("--out", out, FORMATS)
    manifest = read_manifest(shards)
    opened = open_split(shards, manifest, split)
    rows = select_rows(opened.table, where)
    if label:
        state = state or "positive"
        rows = find_state(opened, rows, label, state)
    chosen = spread_rows(rows, n or (6 if augmented else 16), seed)
    # A sheet that says sex=Female beside keys would tell of patients: it says that there were conditions.
    what = f"{f' {state} for {label}' if label else ''}{' under conditions' if where else ''}"
    title = f"{split}: {len(chosen):,} of {len(rows):,} images{what}, seed {seed}"
    if augmented:
        kind = augment or "affine"
        title += f", augmented ({kind})"

        def vary(images: "npt.NDArray[np.uint8]") -> "list[npt.NDArray[np.uint8]]":
            return [_augment(images, manifest.pixels, seed, epoch, kind) for epoch in range(VARIANTS)]

        sheet = draw_variants(title, opened, chosen, image_size or 320, vary)
    else:
        sheet = draw_images(title, opened, chosen)
    save_sheet(sheet, out)
    click.echo(f"{out}: {title}")


def _augment(
    images: "npt.NDArray[np.uint8]", pixels: Mapping[str, float], seed: int, epoch: int, kind: str
) -> "npt.NDArray[np.uint8]":
    """Images uint8 [B, H, W] as the first step of an epoch would see them, back in gray levels."""
    import torch

    from model.augment import AUGMENTATIONS, augment

    mean, std = pixels["mean"], pixels["std"]
    inputs = augment(torch.from_numpy(images)[:, None], mean, std, seed, epoch, 0, AUGMENTATIONS[kind])
    levels: npt.NDArray[np.uint8] = (inputs * std + mean).round().clamp(0, 255)[:, 0].byte().numpy()
    return levels


@cli.command(epilog="Example: pipeline verify shards --deep")
@click.argument("shards", type=click.Path(path_type=Path, file_okay=False))
@click.option("--deep", is_flag=True, help="Decode every image too, and compare every json with its row.")
@click.option("--workers", default=count_cpus, type=click.IntRange(min=1), show_default="all cores")
def verify(shards: Path, deep: bool, workers: int) -> None:
    """Check every file of SHARDS against the manifest, and every tar against its table.

    One line for each problem, on stdout; exit code 1 where there is any.
    """
    from pipeline.etl.verify import PRINTED, verify_shards

    start = time.perf_counter()
    with progress_bar("Verifying", "shards") as advance:
        report = verify_shards(shards, deep, workers, advance)
    for warning in report.warnings:
        click.echo(f"Warning: {printable(warning)}", err=True)
    for file, lines in report.problems.items():
        click.echo(printable("\n".join(lines[:PRINTED])))
        if len(lines) > PRINTED:
            click.echo(f"{shards / file}: and {len(lines) - PRINTED:,} more")
    if report.problems:
        problems = sum(map(len, report.problems.values()))
        repair = (
            f"; write these again by `pipeline shards SOURCE {shards} --repair`, with the options used before"
        )
        raise click.ClickException(
            f"{shards}: {problems:,} problems in {len(report.problems)} files{'' if report.indexed else repair}"
        )
    click.echo(
        f"{shards}: all is well: {report.splits} splits, {report.shards:,} shards, {report.samples:,} samples, "
        f"{report.bytes / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s"
    )


@cli.command(epilog="Example: pipeline index ~/wds --csv ~/CheXpert-v1.0-small/train.csv")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--csv",
    "csvs",
    metavar="[SPLIT=]FILE",
    multiple=True,
    help="A CheXpert CSV for all, or one per split.  [default: labels in each json]",
)
@click.option("--split", metavar="NAME", help="Of all shards.  [default: their names up to the last -]")
@click.option("--workers", default=count_cpus, type=click.IntRange(min=1), show_default="all cores")
def index(folder: Path, csvs: tuple[str, ...], split: str | None, workers: int) -> None:
    """Write tables and a manifest for WebDataset shards in DIR that other programs made.

    The labels are those in each sample's json, in our layout or with the columns of CheXpert's CSV; or those of
    --csv, joined by the patient, study and view in a sample's key or json. Images are JPEGs, PNGs or .npy files of
    uint8 [height, width], all of one kind, and each is decoded once. The tars stay as they are.
    """
    from pipeline.etl.adopt import write_index

    csv = _parse_csvs(csvs)
    with progress_bar("Indexing", "shards") as advance:
        manifest = write_index(folder, csv, split, workers, advance)
    for name, entry in manifest.splits.items():
        click.echo(
            f"{name:6} {entry.samples:8,} samples {entry.patients:7,} patients {len(entry.shards):4} shards"
        )
    click.echo(f"{folder}: indexed")


def _parse_csvs(texts: tuple[str, ...]) -> Path | dict[str, Path] | None:
    """The CSV of all splits, or those of each: `labels.csv`, or `train=a.csv` and `valid=b.csv`."""
    csvs: dict[str, Path] = {}
    for text in texts:
        match = re.fullmatch(r"([a-z0-9_-]+)=(.+)", text)
        if match is None and len(texts) == 1:
            return Path(text)
        if match is None:
            raise click.UsageError(f"--csv {text}: with several, each is like train=FILE")
        if match[1] in csvs:
            raise click.UsageError(f"--csv {match[1]} is there twice; one CSV makes a split")
        csvs[match[1]] = Path(match[2])
    return csvs or None


def main() -> None:
    """Run the command; errors become one line and an exit code."""
    run_command(cli)


if __name__ == "__main__":
    main()
