"""Microseconds per image that `pipeline shards` spends on each part of its work, in one process, adding up.

    taskset -c 0 .venv/bin/python -m benchmarks.budget              390×320 to 224 pixels
    taskset -c 0 .venv/bin/python -m benchmarks.budget --large      2828×2320

The shards of a plan are written by `write_shard`, with a clock around each part: medians over rounds. `other` is what
no clock covers. `bare` is the codec alone, in a loop from memory, in turn with it: decode, resize and encode. Within
a shard they take longer, as what lies between two images has driven them out of the processor's caches.
"""

import hashlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click
import simplejpeg
from PIL import Image

from benchmarks.etl import QUALITY, SIZE, codec_loop, make_source
from pipeline import images as codec
from pipeline.etl import writing
from pipeline.etl.planning import Options, PlanTask, count_planned, write_plan
from pipeline.sources.source import Source

CODEC = ("decode", "resize", "encode")
OPTIONS = Options(SIZE, "no", "jpeg", QUALITY, 50_000_000, "frontal", 0.0, 0, None, 1000)


class Clocks:
    """Seconds by part; a part that is within another is taken off it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within = [0.0]

    def start(self) -> float:
        self._within.append(0.0)
        return time.perf_counter()

    def stop(self, part: str, start: float) -> None:
        taken = time.perf_counter() - start
        self.seconds[part] += taken - self._within.pop()
        self._within[-1] += taken

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **options: Any) -> Any:
            start = self.start()
            try:
                return function(*args, **options)
            finally:
                self.stop(part, start)

        return clocked

    def each(self, part: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """`function`, an iterator of whose items each is waited for."""

        def clocked(*args: Any) -> Iterator[Any]:
            following = iter(function(*args))
            take = self.around(part, lambda: next(following, following))
            while (item := take()) is not following:
                yield item

        return clocked


def clock_shards(clocks: Clocks, tasks: list[writing.ShardTask]) -> float:
    """Write the shards; seconds of all."""

    class Hash:
        def __init__(self) -> None:
            self.hash = hashlib.sha256()
            self.update = clocks.around("SHA-256 of the tar", self.hash.update)
            self.hexdigest = self.hash.hexdigest

    @contextmanager
    def open_file(path: Path) -> Iterator[Any]:
        entered = whole(path)
        file = clocks.around("create, flush, rename", entered.__enter__)()
        yield SimpleNamespace(write=clocks.around("write", file.write))
        clocks.around("create, flush, rename", entered.__exit__)(None, None, None)

    module: Any = writing  # with what it imports
    whole = module.atomic_file
    crc = "zlib_ng" if hasattr(module, "zlib_ng") else "zlib"
    functions: list[tuple[Any, str, str]] = [
        (simplejpeg, "decode_jpeg", "decode"),
        (codec, "resize", "resize"),
        (Image.Image, "resize", "resize"),  # of images that are decoded at a smaller scale
        (simplejpeg, "encode_jpeg", "encode"),
        (simplejpeg, "decode_jpeg_header", "JPEG header and markers"),
        (codec, "read_jpeg_facts", "JPEG header and markers"),
        (module, "prepare", "what joins them"),
        (module, "_sample_json", "labels as JSON, tar headers"),
        (module, "tar_member", "labels as JSON, tar headers"),
        (module, "read_planned", "plan, record"),
        (module, "write_json", "plan, record"),
        (module.np, "bincount", "gray levels"),
    ]
    of_crc = SimpleNamespace(crc32=clocks.around("CRC-32", getattr(module, crc).crc32))
    with ExitStack() as stack:
        for place, name, clocked in (
            (module, "hashlib", SimpleNamespace(sha256=Hash)),
            (module, "atomic_file", open_file),
            (module, "read_images", clocks.each("open, check and read", module.read_images)),
            (module, crc, of_crc),
            *((place, name, clocks.around(part, getattr(place, name))) for place, name, part in functions),
        ):
            stack.enter_context(patch.object(place, name, clocked))
        start = time.perf_counter()
        for task in tasks:
            writing.write_shard(task)
        return time.perf_counter() - start


def plan_shards(source: Path, out: Path) -> list[writing.ShardTask]:
    """The shards of a CheXpert folder, to be written into `out`."""
    of = Source({"train": source / "train.csv"}, (source.parent,))
    write_plan(PlanTask(out, of, OPTIONS))
    count = count_planned(out, "train")
    return [writing.ShardTask(out, out, "train", number, of.roots, OPTIONS.image) for number in range(count)]


@click.command()
@click.option("--images", default=4_000, show_default=True, help="A tenth of them where they are large.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--large", is_flag=True, help="Sources of 2828×2320 pixels.")
def main(images: int, rounds: int, large: bool) -> None:
    """Print the budget, and the share that is the codec's."""
    count = images // 10 if large else images
    rows: list[dict[str, float]] = []
    totals, bare = [], []
    with tempfile.TemporaryDirectory() as name:
        source, paths = make_source(Path(name), count, large)
        out = Path(name).resolve() / "out"
        out.mkdir()
        tasks = plan_shards(source.resolve(), out)
        for _ in range(rounds + 1):  # the first warms up
            bare.append(1e6 / codec_loop(paths))
            clocks = Clocks()
            totals.append(clock_shards(clocks, tasks) / count * 1e6)
            rows.append({part: of_part / count * 1e6 for part, of_part in clocks.seconds.items()})
    del totals[0], bare[0], rows[0]
    print(f"{'2828×2320' if large else '390×320'} to {SIZE}, {count:,} images, {rounds} rounds, µs per image")
    middle = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
    total = statistics.median(totals)
    parts = [*CODEC, *sorted(set(middle) - set(CODEC), key=lambda part: -middle[part])]
    for part in parts:
        print(f"  {part:28} {middle[part]:8.1f}")
    print(f"  {'other':28} {total - sum(middle.values()):8.1f}")
    print(f"  {'all':28} {total:8.1f}")
    ratio = statistics.median(one / other for one, other in zip(bare, totals, strict=True))
    print(f"  {'bare':28} {statistics.median(bare):8.1f}   {ratio:.2f} of the speed of the codec alone")


if __name__ == "__main__":
    main()
