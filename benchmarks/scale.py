"""What sharding and reading cost: of the whole real label table, per image, and of ten million images.

    make bench-scale                                      the table
    .venv/bin/python -m benchmarks.scale stages           CPU time of each stage, on one core
    .venv/bin/python -m benchmarks.scale collection       tables, manifest and an epoch's plan of 10,000,000 rows

table       223,414 real rows (from the torchxrayvision wheel) against tiny synthetic images, hard links of a hundred;
            then 5,000 of them: time, memory per process, and counts against the real ones. Memory is the kernel's own
            peak of resident memory (VmHWM) of the parent, of the worker processes, and of the two short-lived
            processes that plan and finish.
stages      `benchmarks/README.md` draws the conclusions: hours for the full set, cores for a GPU.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg

from pipeline.base.files import write_table
from pipeline.images import ImageOptions, decode_stored, prepare, resize
from pipeline.labels import LABELS, count_rows
from pipeline.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.stream.plan import epoch_order
from pipeline.stream.samples import open_split
from pipeline.synthetic.sample import FOLDER

PIPELINE = Path(sys.executable).with_name("pipeline")
WORKERS = 2
# Height and width of CheXpert's small and full images, and about the bytes of one: 11 and 439 GB by 223,414.
SOURCES = {"small": (320, 390, 49_000), "full": (2320, 2828, 1_965_000)}
IMAGES = 223_414
LINK = 1.25e9  # bytes/s of 10 Gbit/s
PER_SHARD = 1000
# An H100's peak in bf16 without sparsity, FLOP/s (NVIDIA's data sheet), and for networks: 10⁹ multiply-adds of a
# 224-pixel image (torchvision's table), and the share of the peak that training may reach; ResNets reach a fifth,
# DenseNets, which are bound by memory, about half of that. A training step costs six FLOP per multiply-add.
H100 = 989e12
NETWORKS = {"resnet18": (1.81, 0.2), "resnet50": (4.09, 0.2), "densenet121": (2.83, 0.1)}
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


def table() -> None:
    """Print time and memory at 5,000 and at all rows, and compare the counts."""
    lines = read_table()
    memory = {}
    for rows in (5_000, len(lines) - 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source, out = link_films(folder, lines[: rows + 1], draw_films(folder)), folder / "shards"
            command = [PIPELINE, "shards", source, out, "--size", "80", "--workers", WORKERS]
            seconds, memory[rows] = run_and_watch(list(map(str, command)))
            peaks = ", ".join(f"{role} {peak:,.0f} MB" for role, peak in memory[rows].items())
            print(f"{rows:,} rows: {seconds:,.1f} s; peak memory: {peaks}")
            stats = [
                subprocess.run([PIPELINE, "stats", where, *more, "--format", "json"], check=True, capture_output=True)
                for where, more in ((out, []), (source / "train.csv", ["--views", "frontal"]))
            ]
            ours, real = (json.loads(run.stdout) for run in stats)
            print(f"  {ours['images']:,} frontal images; counts equal the table's: {ours == real}")
            manifest = json.loads((out / "manifest.json").read_text())
            for split, entry in manifest["splits"].items():
                print(f"  {split}: {entry['samples']:,} samples, {entry['patients']:,} patients")
    few, many = memory.values()
    for role in ("parent", "worker"):
        print(f"{role}: {many[role] / few[role]:.2f} times the memory for {(len(lines) - 1) / 5000:.0f} times the rows")


def draw_film(height: int, width: int, size: int) -> bytes:
    """A gray JPEG of quality 90 with about `size` bytes: a smooth film with as much grain as that takes."""
    random = np.random.default_rng(0)
    smooth = resize(random.integers(60, 200, (12, 15), np.uint8), height, width).astype(np.float32)
    grain = random.normal(0, 1, (height, width)).astype(np.float32)
    low, high = 0.0, 30.0
    for _ in range(12):
        sigma = (low + high) / 2
        pixels = np.clip(smooth + sigma * grain, 0, 255).astype(np.uint8)
        jpeg: bytes = simplejpeg.encode_jpeg(pixels[..., None], quality=90, colorspace="GRAY")
        low, high = (sigma, high) if len(jpeg) < size else (low, sigma)
    return jpeg


def milliseconds(function: Callable[[], object]) -> float:
    """The median CPU time of a call."""
    times = []
    until = time.perf_counter() + 3
    while time.perf_counter() < until:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def check(image: bytes) -> None:
    """What a shard and its index keep beside the image."""
    hashlib.sha256(image)
    zlib.crc32(image)


def stream(image: bytes, side: int) -> None:
    """A stored image as the stream reads it."""
    zlib.crc32(image)
    resize(decode_stored(image, "jpeg"), side, side)


def stages() -> None:
    """CPU milliseconds per image: of sharding from small and full sources, of streaming what was stored."""
    for name, (height, width, size) in SOURCES.items():
        jpeg = draw_film(height, width, size)
        network = IMAGES * len(jpeg) / LINK
        print(
            f"{name}: {width}×{height}, {len(jpeg):,} bytes; all of them through 10 Gbit/s: {network / 60:.1f} minutes"
        )
        for side in (224, 320):
            options = ImageOptions(side, "no", "jpeg", 95, 50_000_000)
            cost = milliseconds(partial(prepare, jpeg, options))
            image = prepare(jpeg, options).data
            cost += milliseconds(partial(check, image))
            hours = IMAGES * cost / 3.6e6
            print(f"  shards of {side}: {cost:.2f} ms an image, {hours:.2f} core hours; {len(image):,} bytes an image")
            read = milliseconds(partial(stream, image, side))
            print(f"    streamed at {side}: {read:.2f} ms an image, {1000 / read:,.0f} images/s a core; for an H100:")
            for arch, (macs, share) in NETWORKS.items():
                rate = share * H100 / (6e9 * macs * (side / 224) ** 2)
                print(f"      {arch}: {rate * read / 1000:.1f} cores for {rate:,.0f} images/s")


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
    write_manifest(folder, Manifest({}, policies, {}, pixels, {"train": split}, dataset))


def collection(rows: int = 10_000_000) -> None:
    """Sizes of manifest and table; seconds and memory of reading them, of the targets, and of an epoch's plan."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what in (partial(write_collection, rows=rows), plan, start):
            with get_context("spawn").Pool(1) as pool:  # whose peak of memory is its own
                pool.apply(what, (folder,))
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


PARTS = {"table": table, "stages": stages, "collection": collection}


@click.command()
@click.argument("part", default="table", type=click.Choice(list(PARTS)))
def main(part: str) -> None:
    """Print what a part of the work costs."""
    PARTS[part]()


if __name__ == "__main__":
    main()
