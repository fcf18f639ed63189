"""The whole real label table, sharded end to end: time, memory per process, and counts against the real ones.

    make bench-scale

223,414 real rows (from the torchxrayvision wheel) against tiny drawn images, hard links of a hundred; then
5,000 of them, for comparison. Memory is the kernel's own peak of resident memory (VmHWM) of the parent, of the
worker processes, and of the two short-lived processes that plan and finish.
"""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import simplejpeg

PIPELINE = Path(sys.executable).with_name("pipeline")
WORKERS = 2


def read_table() -> list[str]:
    """Lines of the real train.csv."""
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or spec.origin is None:
        raise click.ClickException("torchxrayvision, a dev dependency, is not installed")
    data = (Path(spec.origin).parent / "data" / "chexpert_train.csv.gz").read_bytes()
    return gzip.decompress(data).decode().splitlines()


def make_source(folder: Path, lines: list[str]) -> Path:
    """A CheXpert folder of these rows; its images are links of a hundred noise films of 96×80."""
    random = np.random.default_rng(0)
    films = []
    for number in range(100):
        pixels = np.repeat(np.repeat(random.integers(0, 256, (10, 12, 1), np.uint8), 8, 0), 8, 1)
        films.append(folder / f"film{number}.jpg")
        films[-1].write_bytes(simplejpeg.encode_jpeg(pixels, quality=90, colorspace="GRAY"))
    source = folder / "CheXpert-v1.0-small"
    for number, line in enumerate(lines[1:]):
        path = folder / line.partition(",")[0]
        if "frontal" in path.name:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(films[number % len(films)], path)
    (source / "train.csv").write_text("\n".join(lines) + "\n")
    return source


def descendants(pid: int) -> list[int]:
    """Processes below a process, from /proc, oldest first."""
    try:
        below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return below + [grandchild for child in below for grandchild in descendants(child)]


def run_and_watch(command: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds, and peak resident memory in MB by role: parent, worker (the largest), plan or finish."""
    peaks: dict[int, float] = {}
    started: list[int] = []
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for pid in (process.pid, *descendants(process.pid)):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                if "VmHWM" in status:
                    peaks[pid] = int(status.split("VmHWM:")[1].split()[0]) / 1024
                    started += [pid] if pid not in started else []
            time.sleep(0.02)
    if process.returncode:
        raise click.ClickException(f"exit code {process.returncode}: {' '.join(command)}")
    seconds = time.perf_counter() - start
    parent, helpers = process.pid, started[1:]
    # In order of birth: resource tracker, fork server, plan, the workers, finish.
    workers = helpers[3 : 3 + WORKERS]
    roles = {"parent": peaks[parent], "worker": max(peaks[pid] for pid in workers)}
    others = [peaks[pid] for pid in helpers if pid not in workers]
    return seconds, roles | {"plan and finish": max(others)}


@click.command()
def main() -> None:
    """Print time and memory at 5,000 and at all rows, and compare the counts."""
    lines = read_table()
    memory = {}
    for rows in (5_000, len(lines) - 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source, out = make_source(folder, lines[: rows + 1]), folder / "shards"
            command = [PIPELINE, "shards", source, out, "--size", "80", "--workers", WORKERS]
            seconds, memory[rows] = run_and_watch(list(map(str, command)))
            peaks = ", ".join(f"{role} {peak:,.0f} MB" for role, peak in memory[rows].items())
            print(f"{rows:,} rows: {seconds:,.1f} s; peak memory: {peaks}")
            stats = [
                subprocess.run(
                    [PIPELINE, "stats", where, *more, "--format", "json"], check=True, capture_output=True
                )
                for where, more in ((out, []), (source / "train.csv", ["--views", "frontal"]))
            ]
            ours, real = (json.loads(run.stdout) for run in stats)
            print(f"  {ours['images']:,} frontal images; counts equal the table's: {ours == real}")
            manifest = json.loads((out / "manifest.json").read_text())
            for split, entry in manifest["splits"].items():
                print(f"  {split}: {entry['samples']:,} samples, {entry['patients']:,} patients")
    few, many = memory.values()
    for role in ("parent", "worker"):
        print(
            f"{role}: {many[role] / few[role]:.2f} times the memory for {(len(lines) - 1) / 5000:.0f} times the rows"
        )


if __name__ == "__main__":
    main()
