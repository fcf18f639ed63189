"""AUROC over several runs that differ in their seed: mean and range per label, from their run folders.

    python benchmarks/seeds.py runs/nih-*

One run of a small set says little: differences below its spread over seeds are noise.
"""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="valid", show_default=True)
def main(runs: tuple[Path, ...], split: str) -> None:
    """Print mean, lowest and highest AUROC on SPLIT over RUNS."""
    reports = [json.loads((run / f"evaluation-{split}.json").read_text()) for run in runs]
    rows = {label: [report["labels"][label]["auroc"] for report in reports] for label in reports[0]["labels"]}
    counts = {label: result["positives"] for label, result in reports[0]["labels"].items()}
    rows |= {"macro": [report["macro_auroc"] for report in reports]}
    rows |= {"macro, ≥ 10 positives": [report["macro10_auroc"] for report in reports]}
    table = Table(title=f"AUROC on {split}, {len(runs)} runs", title_justify="left")
    table.add_column("label")
    for heading in ("positives", "mean", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for label, values in rows.items():
        if None not in values:
            figures = (sum(values) / len(values), min(values), max(values))
            table.add_row(label, str(counts.get(label, "")), *(f"{figure:.3f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
