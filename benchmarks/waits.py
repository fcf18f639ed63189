"""Measure the CPU seconds that commands take beside their work: medians, beside another checkout.

    make train && make bench-waits ARGS="--against ../before"

Both checkouts read the sample's shards and the finished run of this one. Seconds are user and system of all threads,
so a busy machine hardly matters. The packages must be compiled, as Python leaves them after their first import.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

SHARDS, RUN = Path("shards/sample"), Path("runs/sample")
# What draws a report, without what it imports: the one line that is timed inside.
DRAW = """
import json, pathlib, sys, time
import matplotlib.figure, matplotlib.backends.backend_svg
from model.runs.report import render_report
from pipeline.measure.scores import read_scores
from pipeline import open_shards
from pipeline.measure.evaluate import Scored
from pipeline.measure.evaluation import read_evaluation
from pipeline.policies import evaluation_targets
shards, run = map(pathlib.Path, sys.argv[1:])
evaluations, images = [], {}
for split in ("dev", "valid"):
    table = open_shards(shards)[split].table
    evaluations.append(read_evaluation(run / f"evaluation-{split}.json"))
    scores = read_scores(run / f"scores-{split}.arrow", table["key"])
    images[split] = Scored.of(scores, *evaluation_targets(table, "zeros"), table)
history = [json.loads(line) for line in (run / "metrics.jsonl").open()]
start = time.process_time()
render_report("run", json.loads((run / "config.json").read_text()), history, evaluations, images)
print(time.process_time() - start)
"""
TRAIN = f"--shards {SHARDS} --run {RUN} --arch rescnn --lr 2e-3 --weight-decay 1e-2 --batch-size 32 --epochs 12"
COMMANDS = {  # name → words after `python`, and the CPU seconds they may take
    "pipeline --help": ("-m pipeline --help", 0.4),
    "train.py --help": ("train.py --help", 0.6),
    "pipeline stats": (f"-m pipeline stats {SHARDS}", 1.0),
    "pipeline audit": (f"-m pipeline audit {SHARDS}", 5.0),
    "train.py, finished": (f"train.py {TRAIN} --image-size 128", 2.0),
    "a report's drawing": (f"-c DRAW {SHARDS} {RUN}", 1.5),
    "train.py export": (f"train.py export --run {RUN} --out model.onnx", 8.0),
}


def measure(checkout: Path, words: str) -> float:
    """CPU seconds of one command of a checkout, in a folder of its own with copies of the sample and its run."""
    with tempfile.TemporaryDirectory() as folder:
        for data in (SHARDS, RUN):
            shutil.copytree(data, Path(folder, data))
        script = [str(checkout / word) if word == "train.py" else word for word in words.split()]
        command = [sys.executable, *(DRAW if word == "DRAW" else word for word in script)]
        before = os.times()
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        after = os.times()
    if ran.returncode:
        raise click.ClickException(f"{checkout}: {words}: {ran.stderr.strip()}")
    children = after.children_user + after.children_system - before.children_user - before.children_system
    return float(ran.stdout) if "DRAW" in words else children


@click.command()
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="Another checkout.")
@click.option("--rounds", default=5)
def main(against: Path | None, rounds: int) -> None:
    """Print a table of the medians; exit with 1 where one of this checkout's is above its limit."""
    checkouts = [Path.cwd(), *([against.resolve()] if against else [])]
    slow = False
    for name, (words, limit) in COMMANDS.items():
        taken = [[measure(checkout, words) for checkout in checkouts] for _ in range(rounds)]
        medians = [statistics.median(seconds) for seconds in zip(*taken, strict=True)]
        click.echo(f"{name:20}" + "".join(f"{seconds:8.2f} s" for seconds in medians) + f"   limit {limit:g} s")
        slow |= medians[0] > limit
    sys.exit(slow)


if __name__ == "__main__":
    main()
