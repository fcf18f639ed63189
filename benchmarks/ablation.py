"""What each part of a recipe is worth: AUROC with one part changed at a time, over seeds.

    .venv/bin/python benchmarks/ablation.py recipe --shards shards/nih
    .venv/bin/python benchmarks/ablation.py policies --shards shards/sample

Every row is `train.py` with the options shown, once per seed, in run folders below --runs; finished runs are
not run again. Checkpoints are chosen on dev (but for the predecessor's row), and valid is only reported.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

TRAIN = Path(__file__).parents[1] / "train.py"
NIH = {
    "--arch": "rescnn",
    "--image-size": 224,
    "--lr": 1e-3,
    "--batch-size": 32,
    "--epochs": 30,
    "--augment": "crop",
}
SAMPLE = {"--arch": "rescnn", "--image-size": 128, "--lr": 2e-3, "--batch-size": 32, "--epochs": 12}
# The first row is the recipe, the others change it.
ROWS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "recipe": (
        NIH,
        {
            "the recipe": {},
            "predecessor's recipe": {"--augment": "none", "--ema": 0, "--weight-decay": 0, "--keep": "last"},
            "no augmentation": {"--augment": "none"},
            "affine map without crop": {"--augment": "affine"},
            "no average of the weights": {"--ema": 0},
            "AMP with bf16": {"--amp": "bf16"},
            "resnet18, 12 epochs": {"--arch": "resnet18", "--epochs": 12},
        },
    ),
    "policies": (
        SAMPLE,
        {
            "uncertain best": {},
            "uncertain ignore": {"--uncertain": "ignore"},
            "uncertain zeros": {"--uncertain": "zeros"},
            "uncertain ones": {"--uncertain": "ones"},
            "uncertain multiclass": {"--uncertain": "multiclass"},
            "blank ignore": {"--blank": "ignore"},
        },
    ),
}
SHOWN = ("macro10_auroc", "mean5_auroc")


def run_once(options: dict[str, Any], run: Path) -> None:
    """Train one run, unless it is finished; its CPU seconds are written beside its other files."""
    if (run / "cpu_seconds").exists():
        return
    words = [str(word) for option in (options | {"--run": run}).items() for word in option]
    process = subprocess.Popen([sys.executable, str(TRAIN), *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{run}: train.py failed with {os.waitstatus_to_exitcode(status)}")
    (run / "cpu_seconds").write_text(f"{usage.ru_utime + usage.ru_stime:.0f}\n")


def describe(values: Sequence[float]) -> str:
    """The mean, and the range it is of."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


@click.command()
@click.argument("table", type=click.Choice(list(ROWS)))
@click.option("--shards", required=True)
@click.option("--runs", default="runs/ablation", show_default=True, type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Runs at the same time; they share the cores.")
@click.option("--row", "only", multiple=True, help="These rows alone.  [default: all]")
@click.option("--label", default="Pneumonia", show_default=True, help="Shown beside the macro AUROC.")
def main(
    table: str, shards: str, runs: Path, seeds: int, jobs: int, only: tuple[str, ...], label: str
) -> None:
    """Train all rows of TABLE, and print it."""
    base, rows = ROWS[table]
    for name in only:
        if name not in rows:
            raise click.UsageError(f"--row '{name}' is none of {', '.join(rows)}")
    rows = {name: changes for name, changes in rows.items() if not only or name in only}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    folders = {
        name: [
            runs / f"{table}-{name.replace(' ', '-').replace(chr(39), '')}-{seed}" for seed in range(seeds)
        ]
        for name in rows
    }
    with ThreadPoolExecutor(jobs) as pool:
        started = [
            pool.submit(
                run_once, base | changes | {"--shards": shards, "--seed": seed, "--workers": threads}, folder
            )
            for name, changes in rows.items()
            for seed, folder in enumerate(folders[name])
        ]
        for run in started:
            run.result()
    shown = Table(title=f"{table}: AUROC, mean (range) of {seeds} seeds", title_justify="left")
    for heading in ("", "dev macro", "valid macro", f"valid {label}", "CPU minutes"):
        shown.add_column(heading, justify="right" if heading else "left")
    for name, of_seeds in folders.items():
        dev, valid = (
            [json.loads((run / f"evaluation-{split}.json").read_text()) for run in of_seeds]
            for split in ("dev", "valid")
        )
        seconds = [float((run / "cpu_seconds").read_text()) for run in of_seeds]
        shown.add_row(
            name,
            *(describe([report["macro10_auroc"] for report in reports]) for reports in (dev, valid)),
            describe([report["labels"][label]["auroc"] for report in valid]),
            f"{statistics.mean(seconds) / 60:.1f}",
        )
    Console(width=110).print(shown)
    print("macro: over labels with 10 positives or more")


if __name__ == "__main__":
    main()
