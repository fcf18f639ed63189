"""The stream beside its peers: images/s, memory, time to the first batch, and how well an epoch is shuffled.

    make bench-stream                                   everything
    .venv/bin/python -m benchmarks.stream memory        one part: rates, memory, start or shuffle

rates    Batches of 64 at 224×224 with the 14 labels, on two cores, everyone from the same images (in the page
         cache). Contestants take turns, each turn a fresh process, timed from the tenth batch to the last of a
         pass. Figures are medians over rounds, ratios medians of the rounds' own ratios, because a machine's
         speed drifts. `bare loop` is the limit: the same decoder and resize on two threads, from memory into
         the same two batches over and over. Before it is timed, a peer has to deliver every image of a pass
         once, our labels, and our pixels but for its filter.
memory   Peak resident memory of an epoch of the whole real label table and of 10,000 rows, with tiny images.
start    Seconds to the first batch, in a process that has imported everything and read nothing.
shuffle  Spearman's correlation of an epoch's order with shard number and patient, and shards per batch.

The peers live in an environment of their own (--peers; SPDL needs Debian's ffmpeg).
"""

import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import webdataset

from benchmarks.scale import PIPELINE, descendants, draw_films, draw_frontals, link_films, read_table
from benchmarks.stream_peers import BATCH, SIZE, WARM_UP, WORKERS, read_tars
from pipeline import open_shards
from pipeline.images import decode_into
from pipeline.labels import LABELS, label_states
from pipeline.stream.plan import Rows, epoch_order
from pipeline.synthetic.sample import FOLDER

PARTS = ("rates", "memory", "start", "shuffle")
ROOT = Path(__file__).parents[1]
FEW, MANY = 10_000, 223_414  # rows; the latter are all of the real table
SHARDS = 16  # of the images that rates are measured with: as many for each worker
STRETCH = ("--size", SIZE, "--square", "stretch")
STORED: dict[str, tuple[object, ...]] = {
    "original": ("--size", "original"),
    "224": STRETCH,
    "raw": (*STRETCH, "--encoding", "raw"),
}
# What black and white are, where not 0 and 255.
LEVELS = {
    "webdataset_usual": (0, 1),
    "torchxrayvision": (-1024, 1024),
    "turboloader": (0, 1),
    "turboloader_raw": (0, 1),
}
TOLERANCE = 4.0  # gray levels on average: filters differ

Floats = npt.NDArray[np.float32]


class Contestant(NamedTuple):
    """Who reads which folder."""

    name: str
    folder: str
    run: Callable[[Path], float] | str  # to images/s; a peer's is a function in stream_peers


class Reference(NamedTuple):
    """All samples of some shards: row of each key, images [N, 1, 224, 224], states [N, 14], blank [N, 14]."""

    rows: dict[str, int]
    images: npt.NDArray[np.uint8]
    states: npt.NDArray[np.int8]
    blank: npt.NDArray[np.bool_]


def measure_ours(shards: Path, passes: int, by_study: bool = False) -> float:
    """Images/s of the stream, of images or of studies, on two threads."""
    train = open_shards(shards)["train"]
    samples = train.studies() if by_study else train

    def read() -> Iterator[int]:
        for epoch in range(passes):
            stream = samples.batches(BATCH, SIZE, epoch=epoch, uncertain="multiclass", threads=WORKERS)
            yield from (len(batch.images) for batch in stream)

    counts = read()
    sum(islice(counts, WARM_UP))
    start = time.perf_counter()
    return sum(counts) / (time.perf_counter() - start)


def measure_bare_loop(shards: Path, passes: int) -> float:
    """Images/s of decode and resize alone."""
    contents = [jpeg for _, jpeg, _ in islice(read_tars(shards), 20 * BATCH)]

    def loop(images: npt.NDArray[np.uint8], count: int) -> None:
        for number in range(count):
            decode_into(images[number % BATCH, 0], contents[number % len(contents)], "jpeg")

    def run(count: int) -> float:
        batches = [np.empty((BATCH, 1, SIZE, SIZE), np.uint8) for _ in range(WORKERS)]
        threads = [threading.Thread(target=loop, args=(images, count)) for images in batches]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return WORKERS * count / (time.perf_counter() - start)

    run(WARM_UP * BATCH)
    return run(passes * 50 * BATCH)


# The functions of stream_peers that read our tars, and those that read the files.
TAR_READERS = {
    "webdataset, usual recipe": "webdataset_usual", "webdataset, at its best": "webdataset_best",
    "DALI on the CPU": "dali", "Megatron-Energon": "energon", "TurboLoader": "turboloader", "Grain": "grain",
    "datasets, streaming": "datasets_streaming", "torchcodec, bare loop": "decoder_torchcodec",
}  # fmt: skip
FILE_READERS = {
    "SPDL": "spdl", "LitData": "litdata", "MosaicML streaming": "mosaicml", "datasets, Arrow": "datasets_arrow",
    "torchxrayvision": "torchxrayvision",
}  # fmt: skip


def race(stored: str, passes: int) -> list[Contestant]:
    """Ours, the bare loop, and all that read the same tars."""
    ours = {"ours": measure_ours, "bare loop": measure_bare_loop}
    return [Contestant(name, stored, partial(run, passes=passes)) for name, run in ours.items()] + [
        Contestant(name, stored, peer) for name, peer in TAR_READERS.items()
    ]


RACES = {
    "390×320 JPEG": race("original", 3) + [Contestant(name, FOLDER, peer) for name, peer in FILE_READERS.items()],
    "224×224 JPEG": race("224", 5),
    "390×320 JPEG of all views": [
        Contestant("ours, by study", "studies", partial(measure_ours, passes=3, by_study=True)),
        Contestant("ours, by image", "studies", partial(measure_ours, passes=3)),
    ],
    "224×224 raw": [
        Contestant("ours", "raw", partial(measure_ours, passes=10)),
        Contestant("ours, 224×224 JPEG", "224", partial(measure_ours, passes=5)),
        Contestant("TurboLoader, .tbl", "224", "turboloader_raw"),
    ],
}


def write_shards(source: Path, out: Path, *options: object) -> Path:
    command = [PIPELINE, "shards", source, out, "--dev", 0, "--workers", WORKERS, *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return out


def make_images(folder: Path, images: int) -> None:
    """Films of 390×320 under the first real rows of frontals, and their shards in all the ways of STORED."""
    films = draw_frontals(folder)
    header, *lines = read_table()
    # torchxrayvision drops the few frontals that are neither.
    frontals = [line for line in lines if ",Frontal,AP," in line or ",Frontal,PA," in line]
    source = link_films(folder, [header, *frontals[:images]], films)
    for name, options in STORED.items():
        write_shards(source, folder / name, "--samples-per-shard", images // SHARDS, *options)
    everything = link_films(folder / "all", [header, *lines[:images]], films)
    shards = ("--size", "original", "--views", "all", "--samples-per-shard", images // SHARDS)
    write_shards(everything, folder / "studies", *shards)


def make_tiny(folder: Path, rows: int) -> Path:
    """Shards of so many rows of the real table, laterals too, with images of 96×80 pixels."""
    source = link_films(folder, read_table()[: rows + 1], draw_films(folder))
    return write_shards(source, folder / "shards", "--size", "original", "--views", "all")


def run_fresh(function: Callable[..., Any], *arguments: object) -> Any:
    """The function's result, from a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run_peer(peers: Path, folder: Path, action: str, name: str, data: Path, *more: object) -> str:
    """Last line that stream_peers prints. Raises CalledProcessError with its complaint in stderr."""
    command = [peers, "-m", "benchmarks.stream_peers", action, name, data, *more]
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(temporary), "LITDATA_CACHE_DIR": str(temporary)}
    run = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    return run.stdout.strip().rpartition("\n")[2]


def read_reference(shards: Path) -> Reference:
    train = open_shards(shards)["train"]
    rows = {key: row for row, key in enumerate(train.table["key"].to_pylist())}
    images = np.concatenate([batch.images for batch in train.batches(BATCH, SIZE, epoch=None)])
    return Reference(rows, images, *label_states(train.table))


def check_peer(name: str, file: Path, reference: Reference) -> float:
    """How far its pixels are from ours, in gray levels. Raises ClickException where it read something else."""
    with np.load(file) as saved:
        images, labels, keys = saved["images"], saved["labels"], saved["keys"].tolist()
    if sorted(keys) != sorted(reference.rows):
        raise click.ClickException(f"{name} does not read each of {len(reference.rows)} images once")
    rows = [reference.rows[key] for key in keys[:BATCH]]
    black, white = LEVELS.get(name, (0, 255))
    gray = (images.astype(np.float32) - black) / (white - black) * 255
    difference = float(np.abs(gray - reference.images[rows]).mean())
    expected = reference.states[rows].astype(np.float32)
    if name == "torchxrayvision":
        expected = torchxrayvision_labels(expected, reference.blank[rows])
    if not np.array_equal(labels, expected, equal_nan=True):
        raise click.ClickException(f"{name} does not read the labels that we read")
    if difference > TOLERANCE:
        raise click.ClickException(f"{name} reads other pixels: {difference:.1f} gray levels from ours")
    return difference


def torchxrayvision_labels(states: Floats, blank: npt.NDArray[np.bool_]) -> Floats:
    """[B, 13] in its order and with its policy: -1 and blank are NaN, and all are 0 where No Finding is 1."""
    states = np.where(blank | (states == -1), np.nan, states)
    healthy = states[:, LABELS.index("No Finding")] == 1
    for column, label in enumerate(LABELS):
        if label != "Support Devices":
            states[healthy, column] = 0
    return states[:, [LABELS.index(label) for label in sorted(LABELS) if label != "No Finding"]]


def admit(entries: Sequence[Contestant], folder: Path, peers: Path) -> dict[Contestant, str]:
    """Those who can run and deliver what ours does, each with a remark; prints who cannot run, and why."""
    reference = read_reference(folder / entries[0].folder)
    admitted = {}
    for contestant in entries:
        remark = ""
        if isinstance(contestant.run, str):
            file, data = folder / "check.npz", folder / contestant.folder
            try:
                run_peer(peers, folder, "prepare", contestant.run, data)
                run_peer(peers, folder, "check", contestant.run, data, file)
            except (OSError, subprocess.CalledProcessError) as error:
                complaint = getattr(error, "stderr", None) or str(error)
                print(f"  {contestant.name:25} CANNOT RUN HERE: {complaint.strip().splitlines()[-1]}")
                continue
            remark = f"pixels {check_peer(contestant.run, file, reference):.1f} levels from ours"
        admitted[contestant] = remark
    return admitted


def print_rates(folder: Path, peers: Path, images: int, rounds: int) -> None:
    make_images(folder, images)
    for race, entries in RACES.items():
        print(f"{race} to batches of {BATCH}: {images:,} images, {rounds} rounds")
        contestants = admit(entries, folder, peers)
        rates: dict[Contestant, list[float]] = {contestant: [] for contestant in contestants}
        for _ in range(rounds):
            for contestant, of_contestant in rates.items():
                data = folder / contestant.folder
                if isinstance(contestant.run, str):
                    of_contestant.append(float(run_peer(peers, folder, "measure", contestant.run, data)))
                else:
                    of_contestant.append(run_fresh(contestant.run, data))
        ours = rates[entries[0]]
        for contestant, remark in contestants.items():
            ratio = statistics.median(a / b for a, b in zip(ours, rates[contestant], strict=True))
            print(
                f"  {contestant.name:25} {statistics.median(rates[contestant]):7,.0f} images/s   "
                f"ours is {ratio:5.2f} of it   {remark}".rstrip()
            )


def peak_memory() -> float:
    """Peak resident memory in MB of this process and those below it."""
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in (os.getpid(), *descendants(os.getpid()))]
    return sum(int(status.split("VmHWM:")[1].split()[0]) / 1024 for status in statuses)


def watch_epochs(shards: Path, epochs: int) -> list[float]:
    """Peak memory in MB after each epoch."""
    train = open_shards(shards)["train"]
    peaks = []
    for epoch in range(epochs):
        for _ in train.batches(BATCH, SIZE, epoch=epoch, uncertain="multiclass"):
            pass
        peaks.append(peak_memory())
    return peaks


def print_memory(few: Path, many: Path) -> None:
    (small,) = run_fresh(watch_epochs, few, 1)
    (large,) = run_fresh(watch_epochs, many, 1)
    print("peak memory of all processes")
    print(f"  an epoch of {FEW:7,} rows     {small:5,.0f} MB")
    print(f"  an epoch of {MANY:7,} rows     {large:5,.0f} MB   {large / small:.2f} of it")
    peaks = run_fresh(watch_epochs, few, 10)
    print(f"  ten epochs of {FEW:7,} rows   {peaks[-1]:5,.0f} MB   {peaks[-1] / peaks[0]:.2f} of the first one's")


def time_first_batch(shards: Path, share: float) -> float:
    """Seconds from the manifest to the first batch of an epoch of which this share is done."""
    start = time.perf_counter()
    train = open_shards(shards)["train"]
    stream = train.batches(BATCH, SIZE, epoch=0, uncertain="best")
    stream.load_state_dict({"step": int(len(train.samples.rows) // BATCH * share)})
    next(iter(stream))
    return time.perf_counter() - start


def print_start(many: Path, rounds: int) -> None:
    pairs = [[run_fresh(time_first_batch, many, share) for share in (0, 0.5)] for _ in range(rounds)]
    fresh, resumed = np.median(pairs, axis=0)
    print(f"first batch of an epoch of {MANY:,} rows, {rounds} cold processes each")
    print(f"  from the start               {fresh:5.2f} s")
    print(f"  resumed in the middle        {resumed:5.2f} s   {resumed - fresh:+.2f} s")


def webdataset_order(shard_sizes: Sequence[int], seed: int) -> Rows:
    """What WebDataset(shardshuffle=1000).shuffle(5000) yields: its own stages, on row numbers, not tars."""
    ends = np.cumsum(shard_sizes)

    def read(shards: Iterator[int]) -> Iterator[int]:
        for shard in shards:
            yield from range(ends[shard] - shard_sizes[shard], ends[shard])

    shuffles = (webdataset.shuffle(size, seed=seed) for size in (1000, 5000))
    shards = partial(iter, range(len(shard_sizes)))
    return np.array(list(webdataset.DataPipeline(shards, next(shuffles), read, next(shuffles))))


def print_shuffle(many: Path, epochs: int = 10) -> None:
    from scipy.stats import spearmanr  # here: the other parts measure memory

    train = open_shards(many)["train"]
    sizes, split = train.samples.shard_sizes, train.split
    shard = split.shard
    patient = np.array([int(patient.removeprefix("patient")) for patient in split.table["patient"].to_pylist()])
    orders: dict[str, Callable[[int], Rows]] = {
        "ours, windows of 16 shards": partial(epoch_order, sizes, 0),
        "webdataset, buffer of 5,000": partial(webdataset_order, sizes),
        "all at once": lambda epoch: np.random.default_rng(epoch).permutation(len(shard)),
    }
    print(f"order of {len(shard):,} rows in {len(sizes)} shards: |Spearman's ρ|, mean of {epochs} epochs")
    for name, order in orders.items():
        figures = []
        for epoch in range(epochs):
            rows = order(epoch)
            place = np.arange(len(rows))
            batches = np.sort(shard[rows][: len(rows) // BATCH * BATCH].reshape(-1, BATCH), axis=1)
            correlated = [abs(spearmanr(place, values[rows]).statistic) for values in (shard, patient)]
            figures.append((*correlated, 1 + (np.diff(batches) != 0).sum(axis=1).mean()))
        of_shard, of_patient, per_batch = np.mean(figures, axis=0)
        print(
            f"  {name:28} with shard {of_shard:.4f}   with patient {of_patient:.4f}   "
            f"{per_batch:4.1f} shards per batch of {BATCH}"
        )


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option(
    "--peers",
    default=".venv-peers-stream/bin/python",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Python that has peers-stream.txt installed.",
)
@click.option("--images", default=6400, show_default=True, help="Read per turn; a multiple of 128, 1,280 at least.")
@click.option("--rounds", default=5, show_default=True)
def main(parts: tuple[str, ...], peers: Path, images: int, rounds: int) -> None:
    """Print the PARTS (all of them by default)."""
    if images % (WORKERS * BATCH) or images < 2 * WARM_UP * BATCH:
        needed = f"a multiple of {WORKERS * BATCH}, and {2 * WARM_UP * BATCH:,} at least"
        raise click.BadParameter(f"{images} is not {needed}", param_hint="--images")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    parts = parts or PARTS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "rates" in parts:
            print_rates(folder, peers, images, rounds)
        if set(parts) - {"rates"}:
            few, many = make_tiny(folder / "few", FEW), make_tiny(folder / "many", MANY)
        if "memory" in parts:
            print_memory(few, many)
        if "start" in parts:
            print_start(many, rounds)
        if "shuffle" in parts:
            print_shuffle(many)


if __name__ == "__main__":
    main()
