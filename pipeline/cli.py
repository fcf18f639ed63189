"""The `pipeline` command: parse, call, print.

Each command imports what it needs itself, and none imports torch, so that `--help` is quick.
"""

import os
import time
from pathlib import Path
from typing import Any

import click

from pipeline.console import progress_bar, run_command
from pipeline.labels import BLANK_HELP, UNCERTAIN_HELP, VIEWS


@click.group(context_settings={"show_default": True})
@click.version_option(package_name="chexpert-pipeline")
def cli() -> None:
    """Turn CheXpert into WebDataset shards with Arrow label tables, and report on its labels."""


@cli.command(epilog="Example: pipeline sample sample && pipeline shards sample shards/sample")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--images", default=2000, type=click.IntRange(min=20), help="Train and valid together.")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Another seed gives other patients.")
@click.option("--workers", default=os.cpu_count, type=click.IntRange(min=1), show_default="all cores")
def sample(out: Path, images: int, seed: int, workers: int) -> None:
    """Write a synthetic CheXpert to OUT: drawn chest films, for trying things out without patient data."""
    from pipeline.sample import write_sample

    done = 0
    with progress_bar("Drawing", "images") as advance:

        def count(finished: int) -> None:
            nonlocal done
            done += finished
            advance(done, images)

        folder = write_sample(out, images=images, seed=seed, workers=workers, progress=count)
    click.echo(f"{folder}: {images:,} synthetic images")


@cli.command(epilog="Example: pipeline shards ~/CheXpert-v1.0-small shards --size 320 --views frontal")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--size", default=320, type=click.IntRange(min=16), help="Shorter side, pixels; never enlarged."
)
@click.option("--views", default="frontal", type=click.Choice(VIEWS), help="By the column Frontal/Lateral.")
@click.option("--uncertain", default="best", metavar="POLICY", help=UNCERTAIN_HELP)
@click.option("--blank", default="zeros", metavar="POLICY", help=BLANK_HELP)
@click.option("--dev", default=0.05, type=click.FloatRange(0, 1), help="Share of train's patients.")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Decides the dev patients and the order.")
@click.option("--samples-per-shard", default=1000, type=click.IntRange(min=1))
@click.option("--quality", default=95, type=click.IntRange(1, 100), help="JPEG quality of resized images.")
@click.option("--max-pixels", default=50_000_000, type=click.IntRange(min=1), help="Refuse larger images.")
@click.option("--workers", default=os.cpu_count, type=click.IntRange(min=1), show_default="all cores")
@click.option("--overwrite", is_flag=True, help="Replace shards made with other options or from other CSVs.")
def shards(
    source: Path, out: Path, uncertain: str, blank: str, workers: int, overwrite: bool, **options: Any
) -> None:
    """Write the CheXpert folder SOURCE as shards to OUT: tars, Arrow tables, and a manifest at the end.

    Raw labels are kept; the policies are recorded as the shards' defaults, which training may override.
    """
    from pipeline.labels import check_blank_policy, parse_uncertain_policy
    from pipeline.shards import Options, write_shards

    parse_uncertain_policy(uncertain)
    policies = {"uncertain": uncertain, "blank": check_blank_policy(blank)}
    start = time.perf_counter()
    with progress_bar("Sharding", "images") as advance:
        made = write_shards(source, out, Options(**options), policies, workers, overwrite, advance)
    manifest, is_new = made
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards) / 1e6
        click.echo(
            f"{name:6} {split.samples:8,} images {split.studies:8,} studies {split.patients:7,} patients "
            f"{len(split.shards):4} shards {size:10,.1f} MB"
        )
    if is_new:
        images = sum(split.samples for split in manifest.splits.values())
        seconds = time.perf_counter() - start
        click.echo(f"{out}: written in {seconds:.1f} s, {images / seconds:,.0f} images/s")
    else:
        click.echo(f"{out}: complete already, nothing to do")


@cli.command(epilog="Example: pipeline stats train.csv --views frontal --format json")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--split", help="One split of a folder.  [default: all together]")
@click.option("--views", default="all", type=click.Choice(VIEWS), help="By the column Frontal/Lateral.")
@click.option("--format", "format_", default="table", type=click.Choice(["table", "json", "csv"]))
def stats(source: Path, split: str | None, views: str, format_: str) -> None:
    """Count positive, uncertain, negative and blank per label in SOURCE (shards, CheXpert folder or CSV)."""
    from pipeline.stats import Statistics, count_labels, load_table, to_csv, to_json

    statistics: Statistics = count_labels(load_table(source, split, views))
    if format_ == "json":
        click.echo(to_json(statistics))
    elif format_ == "csv":
        click.echo(to_csv(statistics))
    else:
        _print_statistics(dict(statistics))


def _print_statistics(statistics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    totals = ", ".join(f"{statistics[unit]:,} {unit}" for unit in ("images", "studies", "patients"))
    table = Table(title=totals, title_justify="left")
    table.add_column("label")
    for heading in ("positive", "uncertain", "negative", "blank", "positive %"):
        table.add_column(heading, justify="right")
    for label, counts in statistics["labels"].items():
        *states, share = counts.values()
        table.add_row(label, *(f"{count:,}" for count in states), f"{100 * share:.1f}")
    Console().print(table)


def main() -> None:
    """Run the command; errors become one line and an exit code."""
    run_command(cli)


if __name__ == "__main__":
    main()
