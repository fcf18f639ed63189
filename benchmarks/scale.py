"""What sharding and reading cost: of CheXpert's whole table, and of ten million images.

    make bench-scale                                      the table
    .venv/bin/python -m benchmarks.scale collection       tables, manifest and an epoch's plan of 10,000,000 rows

full        223,414 real rows (from the torchxrayvision wheel), and as many synthetic images of 390×320, hard links of
            400; two steps are also killed halfway and run again. Beside them the plain Pillow script, and the
            notebook that holds all images as NumPy arrays.
"""

import contextlib
import gzip
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from PIL import Image

from pipeline.base.files import write_table
from pipeline.etl.writing import Options
from pipeline.labels import LABELS, count_rows
from pipeline.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.stream.plan import epoch_order
from pipeline.stream.samples import open_split
from pipeline.synthetic.sample import FOLDER, write_sample

PIPELINE = Path(sys.executable).with_name("pipeline")
IMAGES = 223_414
SIZE, QUALITY, PROCESSES = 224, 95, 2  # of the contestants of `etl`
PER_SHARD = 1000
Result = TypeVar("Result")


def read_table() -> list[str]:
    """Lines of the real train.csv."""
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or spec.origin is None:
        raise click.ClickException("torchxrayvision, a dev dependency, is not installed")
    data = (Path(spec.origin).parent / "data" / "chexpert_train.csv.gz").read_bytes()
    return gzip.decompress(data).decode().splitlines()


def draw_films(folder: Path) -> list[Path]:
    """A hundred JPEGs of noise of 96×80 pixels."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    films = [folder / f"film{number}.jpg" for number in range(100)]
    for film in films:
        pixels = np.repeat(np.repeat(random.integers(0, 256, (10, 12, 1), np.uint8), 8, 0), 8, 1)
        film.write_bytes(simplejpeg.encode_jpeg(pixels, quality=90, colorspace="GRAY"))
    return films


def draw_frontals(folder: Path) -> list[Path]:
    """Synthetic frontals of 390×320, about 29 kB each."""
    drawn = write_sample(folder / "sample", images=500, seed=1, workers=2)
    return [path for path in sorted(drawn.rglob("*frontal.jpg")) if Image.open(path).size == (390, 320)]


def link_films(folder: Path, lines: Sequence[str], films: Sequence[Path]) -> Path:
    """A CheXpert folder of these lines of the real table, header first; its images are hard links of the films."""
    source = folder / FOLDER
    for number, line in enumerate(lines[1:]):
        path = folder / line.partition(",")[0]
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


def watch(command: Sequence[object], seconds: float = math.inf) -> tuple[float, float]:
    """Run a command, killed after some seconds: the seconds it took, and the peak of all its processes' memory, MB.

    Memory is proportional (PSS): pages that processes share count once.
    """
    peak, start = 0.0, time.perf_counter()
    words = list(map(str, command))
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while process.poll() is None:
            if time.perf_counter() - start > seconds:
                os.killpg(process.pid, signal.SIGKILL)
            total = 0
            for pid in (process.pid, *descendants(process.pid)):
                with contextlib.suppress(OSError):  # it has ended
                    memory = re.search(r"Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
                    total += int(memory[1]) if memory else 0
            peak = max(peak, total / 1024)
            time.sleep(0.1)
    if process.returncode and math.isinf(seconds):
        raise click.ClickException(f"exit code {process.returncode}: {' '.join(words)}")
    return time.perf_counter() - start, peak


def full(rows: int) -> None:
    """Print seconds and memory of each step with the real table, and what is left to do after a kill halfway."""
    lines = read_table()[: rows + 1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = link_films(folder, lines, draw_frontals(folder)[:400])
        paths, shards, run = [folder / line.partition(",")[0] for line in lines[1:]], folder / "shards", folder / "run"
        convert = [PIPELINE, "shards", source, shards, "--views", "all", "--workers", PROCESSES]
        python = [sys.executable, "-m"]
        train = [*python, "train", "--shards", shards, "--run", run, "--arch", "rescnn", "--image-size", 64]
        batches = f"open_shards({str(shards)!r})['train'].batches(64, 224, epoch=0)"
        read = f"from pipeline import open_shards\nfor _ in {batches}: pass"
        steps: dict[str, tuple[list[object], Path | None]] = {
            "shards of all views, 320 pixels": (convert, shards / "manifest.json"),
            "verify --deep": ([PIPELINE, "verify", shards, "--deep"], None),
            "stats": ([PIPELINE, "stats", shards], None),
            "the stream of train at 224 pixels": ([sys.executable, "-c", read], None),
            "an epoch of rescnn at 64 pixels, with its report": ([*train, "--epochs", 1], run / "metrics.jsonl"),
        }
        for step, (command, result) in steps.items():
            seconds, peak = watch(command)
            print(f"  {step}: {seconds:,.1f} s, {rows / seconds:,.0f} images/s, {peak:,.0f} MB", flush=True)
            if result is not None:
                made = result.read_bytes()
                shutil.rmtree(result.parent)
                watch(command, seconds / 2)
                seconds, _ = watch(command)
                equal = result.read_bytes() == made
                print(f"    killed halfway: {seconds:,.1f} s more; {result.name} is equal: {equal}", flush=True)
        start = time.perf_counter()
        run_pillow(source, paths, folder / "pillow")
        print(f"  a Pillow script to {SIZE} pixels: {time.perf_counter() - start:,.1f} s")
        with get_context("spawn").Pool(1) as pool:
            size = pool.apply(fill_arrays, (paths[:1000],))
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        print(f"  NumPy arrays in memory: {size / 1e6:.2f} MB an image: {most / 1e9:,.0f} GB hold {most / size:,.0f}")


def convert_with_pillow(task: tuple[Path, Path]) -> None:
    """The script everybody writes first."""
    source, target = task
    image = Image.open(source).convert("L")
    scale = SIZE / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    image.resize(shape, Image.Resampling.LANCZOS).save(target, quality=QUALITY)


def run_pillow(source: Path, paths: list[Path], out: Path) -> None:
    out.mkdir()
    tasks = [(path, out / f"{number:06d}.jpg") for number, path in enumerate(paths)]
    with get_context("spawn").Pool(PROCESSES) as pool:
        pool.map(convert_with_pillow, tasks, chunksize=50)


def fill_arrays(paths: Sequence[Path]) -> float:
    """Bytes of memory per image of the usual notebook: RGB images of 320 pixels in a list, then in one array."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = [np.asarray(Image.open(path).convert("RGB").resize((320, 320)), np.float32) / 255 for path in paths]
    np.stack(images)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(paths)


def write_collection(folder: Path, rows: int) -> None:
    """Manifest and table of `rows` drawn samples, and empty files as large as their shards."""
    random = np.random.default_rng(0)
    numbers = np.arange(rows)
    patients = pc.binary_join_element_wise("patient", pa.array(numbers // 3).cast(pa.string()), "")
    studies = pa.array(numbers % 3).cast(pa.string())
    columns: dict[str, pa.Array] = {
        "key": pc.binary_join_element_wise(patients, studies, "_study1_view"),
        "patient": patients,
        "study": pa.array(numbers % 3, pa.int32()),
        "view": pa.array(np.full(rows, "frontal")),
        "sex": pa.array(np.where(numbers % 2, "Male", "Female")),
        "age": pa.array(numbers % 90, pa.int16()),
        "projection": pa.array(np.full(rows, "AP")),
    }
    for label in LABELS:
        states = random.integers(-1, 2, rows, np.int8)
        columns[label] = pa.array(states, mask=random.random(rows, np.float32) < 0.7)
    columns |= {
        "shard": pa.array(numbers // PER_SHARD, pa.int32()),
        "offset": pa.array((numbers % PER_SHARD) * 25_600 + 512),
        "length": pa.array(np.full(rows, 24_000), pa.int32()),
        "crc": pa.array(np.zeros(rows), pa.uint32()),
    }
    table = pa.table(columns)
    digest = write_table(folder / "train.arrow", table)
    shards = []
    for number in range(rows // PER_SHARD):
        shard = Shard(f"train-{number:06d}.tar", PER_SHARD, PER_SHARD * 25_600 + 1024, "0" * 64)
        with (folder / shard.file).open("wb") as file:
            file.truncate(shard.bytes)
        shards.append(shard)
    split = Split(**count_rows(table), table="train.arrow", table_sha256=digest, shards=tuple(shards))
    policies = {"uncertain": "best", "blank": "zeros"}
    dataset = {"name": "scaling", "patients": "scaling"}
    pixels = {"mean": 0.0, "std": 1.0}
    write_manifest(folder, Manifest(asdict(Options()), policies, {}, pixels, {"train": split}, dataset))


def collection(rows: int = 10_000_000) -> None:
    """Sizes of manifest and table; seconds and memory of reading them, of the targets, and of an epoch's plan."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for work in (partial(write_collection, rows=rows), plan, start):
            with get_context("spawn").Pool(1) as pool:  # whose peak of memory is its own
                pool.apply(work, (folder,))
        for file in ("manifest.json", "train.arrow"):
            print(f"{file}: {(folder / file).stat().st_size / 1e6:,.1f} MB for {rows:,} rows")


def plan(folder: Path) -> None:
    """The plan of an epoch alone."""
    shards = json.loads((folder / "manifest.json").read_bytes())["splits"]["train"]["shards"]
    sizes = [shard["samples"] for shard in shards]
    report("start of the process", lambda: None)
    report("plan of an epoch", lambda: epoch_order(sizes, seed=0, epoch=0))


def start(folder: Path) -> None:
    """What a rank does before its first batch."""
    report("start of the process", lambda: None)
    manifest, policy = read_manifest(folder), parse_uncertain_policy("best")
    split = report("table and its hash, stat of every shard", lambda: open_split(folder, manifest, "train"))
    report("targets and masks of all rows", lambda: make_targets(split.table, policy, "zeros", 0))


def report(what: str, work: Callable[[], Result]) -> Result:
    """What work gives; prints the seconds that it takes, and the peak of the process's memory after it."""
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  {what}: {seconds:.2f} s, peak memory {peak:,.0f} MB", flush=True)
    return result


PARTS = ("full", "collection")


@click.command()
@click.argument("part", default="full", type=click.Choice(PARTS))
@click.option("--rows", default=IMAGES, show_default=True, help="Rows of the real table, for full.")
def main(part: str, rows: int) -> None:
    """Print what a part of the work costs."""
    full(rows) if part == "full" else collection()


if __name__ == "__main__":
    main()
