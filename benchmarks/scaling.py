"""What sharding and reading cost per image, and what a collection of ten million images costs to plan.

    .venv/bin/python -m benchmarks.scaling stages         # CPU time of each stage, on one core
    .venv/bin/python -m benchmarks.scaling collection     # tables, manifest and an epoch's plan of 10,000,000 rows

`benchmarks/README.md` draws the conclusions: hours for the full set, cores for a GPU.
"""

import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg

from pipeline.base.files import write_table
from pipeline.images import ImageOptions, decode_stored, prepare, resize
from pipeline.labels import LABELS, count_rows
from pipeline.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.stream.plan import epoch_order
from pipeline.stream.samples import open_split

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


@click.group()
def main() -> None:
    """Print what the chosen part of the work costs."""


@main.command()
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
            print(
                f"  shards of {side}: {cost:.2f} ms an image, {hours:.2f} core hours; {len(image):,} bytes an image"
            )
            read = milliseconds(partial(stream, image, side))
            print(
                f"    streamed at {side}: {read:.2f} ms an image, {1000 / read:,.0f} images/s a core; for an H100:"
            )
            for arch, (macs, share) in NETWORKS.items():
                rate = share * H100 / (6e9 * macs * (side / 224) ** 2)
                print(f"      {arch}: {rate * read / 1000:.1f} cores for {rate:,.0f} images/s")


def write_collection(folder: Path, rows: int) -> None:
    """Manifest and table of `rows` drawn samples, and empty files as large as their shards."""
    random = np.random.default_rng(0)
    numbers = np.arange(rows)
    patients = pa.array(numbers // 3).cast(pa.string())
    names = pa.compute.binary_join_element_wise("patient", patients, "")
    columns: dict[str, pa.Array] = {
        "key": pa.compute.binary_join_element_wise(
            names, pa.array(numbers % 3).cast(pa.string()), "_study1_view"
        ),
        "patient": names,
        "study": pa.array(numbers % 3, pa.int32()),
        "view": pa.array(np.full(rows, "frontal")),
        "sex": pa.array(np.where(numbers % 2, "Male", "Female")),
        "age": pa.array(numbers % 90, pa.int16()),
        "projection": pa.array(np.full(rows, "AP")),
    }
    for label in LABELS:
        states: npt.NDArray[np.int8] = random.integers(-1, 2, rows, np.int8)
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


@main.command()
@click.option("--rows", default=10_000_000, show_default=True)
def collection(rows: int) -> None:
    """Sizes of manifest and table; seconds and memory of reading them, of the targets, and of an epoch's plan."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write = [
            sys.executable,
            "-c",
            "from benchmarks.scaling import *; write_collection(Path(sys.argv[1]), int(sys.argv[2]))",
        ]
        subprocess.run([*write, folder, str(rows)], check=True)
        for file in ("manifest.json", "train.arrow"):
            print(f"{file}: {(folder / file).stat().st_size / 1e6:,.1f} MB for {rows:,} rows")
        for what in ("plan", "start"):
            subprocess.run([sys.executable, "-m", "benchmarks.scaling", what, folder], check=True)


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
def plan(folder: Path) -> None:
    """The plan of an epoch alone."""
    sizes = [
        shard["samples"]
        for shard in json.loads((folder / "manifest.json").read_bytes())["splits"]["train"]["shards"]
    ]
    report("start of the process", None)
    start = time.perf_counter()
    order = epoch_order(sizes, seed=0, epoch=0)
    report("plan of an epoch", time.perf_counter() - start)
    assert len(order) == sum(sizes)  # noqa: S101


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
def start(folder: Path) -> None:
    """What a rank does before its first batch."""
    report("start of the process", None)
    begin = time.perf_counter()
    split = open_split(folder, read_manifest(folder), "train")
    report("manifest, table and its hash, stat of every shard", time.perf_counter() - begin)
    begin = time.perf_counter()
    make_targets(split.table, parse_uncertain_policy("best"), "zeros", 0)
    report("targets and masks of all rows", time.perf_counter() - begin)


def report(what: str, seconds: float | None) -> None:
    """A line with the peak of the process's memory up to now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    took = "" if seconds is None else f"{seconds:.2f} s, "
    print(f"  {what}: {took}peak memory {peak:,.0f} MB")


if __name__ == "__main__":
    main()
