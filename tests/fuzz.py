"""Fuzzing of all that reads files: whatever bytes they hold, the reader makes sound values of them or raises its own
error, in bounded time and memory, and the process lives.

    make fuzz                                 # ten minutes for each of what TARGETS names
    make fuzz FUZZ_SECONDS=60 TARGETS="csv manifest"

Each target runs in a process of its own, under Atheris (libFuzzer with Python's coverage), which ends it at the first
other exception, at 20 seconds or 2 GB for an input. Inputs worth keeping stay in .fuzz/<target>, and a failing one
is there as crash-*, to be given as an argument: tests/fuzz.py csv .fuzz/crash-…
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import _weights_only_unpickler

if __name__ == "__main__":
    import atheris

    watched = atheris.instrument_imports(include=["pipeline", "model", "pydicom"])
else:  # test_hostile feeds the same readers
    watched = contextlib.nullcontext()
with watched:
    import pydicom.pixels

    from model.checkpoint import load_checkpoint, save_checkpoint
    from model.runs.config import read_config
    from pipeline import DataError
    from pipeline.etl.shards import Execution, write_shards
    from pipeline.etl.writing import Options
    from pipeline.images import ENCODINGS, ImageError, ImageOptions, decode_stored, prepare
    from pipeline.labels import LABELS
    from pipeline.manifest import read_manifest, read_table
    from pipeline.measure.scores import read_scores, write_scores
    from pipeline.policies import make_targets, parse_uncertain_policy
    from pipeline.sources.rows import read_images, read_splits
    from pipeline.sources.sets import find_source, read_any_table
    from pipeline.stream.batches import Labels, stream_batches
    from pipeline.stream.plan import plan_evaluation
    from pipeline.stream.samples import find_images, open_split
    from pipeline.synthetic.sample import write_sample

WORK = Path(".fuzz")
LONGEST = 65536  # bytes of an input
SECONDS = int(os.environ.get("FUZZ_SECONDS", "600"))
Target = Callable[[bytes], object]


def make_example(folder: Path) -> Path:
    """Shards of a small sample, a checkpoint and scores: the sound files that inputs are bred from."""
    source = write_sample(folder, 24, 0, workers=1)
    options = Options(48, "no", "jpeg", 95, 1_000_000, "frontal", 0.3, 0, None, 4)
    policies = {"uncertain": "best", "blank": "zeros"}
    write_shards(find_source(source, {}, []), folder / "shards", options, policies, Execution(workers=1, max_bad=0))
    save_checkpoint(folder / "last.pt", {"step": 3, "name": "x", "weights": {"w": torch.ones(3, 2)}, "rate": 1e-3})
    with zipfile.ZipFile(folder / "last.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        (folder / "data.pkl").write_bytes(archive.read(name))
    table = read_table(folder / "shards", read_manifest(folder / "shards").split("valid"))
    write_scores(folder / "scores.arrow", table, ["Edema"], np.full((table.num_rows, 1), 0.5, np.float32))
    (folder / "config.json").write_text(json.dumps({"arch": "rescnn", "lr": 1e-3, "labels": list(LABELS)}))
    seeds = folder / "seeds"
    seeds.mkdir()
    pixels = np.arange(40 * 48, dtype=np.uint8).reshape(40, 48)
    image = Image.fromarray(pixels)
    for name in ("a.jpg", "b.png", "c.bmp", "d.gif", "e.tif"):
        image.save(seeds / name)
    image.save(seeds / "f.jpg", progressive=True)
    image.convert("CMYK").save(seeds / "g.jpg")
    Image.fromarray(pixels.astype(np.uint16) * 200).save(seeds / "h.png")
    np.save(seeds / "i.npy", pixels)
    for film in (Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"):
        if film.stat().st_size < LONGEST:
            (folder / film.name).write_bytes(film.read_bytes())
    return folder / "shards"


def read_csv(path: Path, shards: Path) -> None:
    """A CSV of labels, and the targets made of it."""
    table = read_any_table(path)
    assert len(set(table["key"].to_pylist())) == table.num_rows
    for row in table.to_pylist():
        *folders, patient, study, file = row["path"].split("/")
        assert all(re.fullmatch(r"[\w.-]+", folder) and folder.strip(".") for folder in folders)
        assert re.fullmatch(r"patient\d+/study\d+", f"{patient}/{study}")
        assert re.fullmatch(r"view\d+_(frontal|lateral)\.(?i:jpg|jpeg|png)", file)
        assert len(row["key"]) <= 90  # fits into a tar's header
        assert {row[label] for label in LABELS} <= {1, 0, -1, None}
    target, mask = make_targets(table, parse_uncertain_policy("best"), "zeros", seed=0)
    assert target.shape == mask.shape == (table.num_rows, len(LABELS))
    assert np.isfinite(target[mask]).all()


def read_tar(path: Path, shards: Path) -> None:
    """A tar that another program wrote: its labels, and the images of its samples."""
    source = find_source(path.parent, {}, [], "webdataset", [("patient", "patient"), ("Edema", "labels.Edema")])
    tables, _, _ = read_splits(source, views="all", dev=0, seed=0)
    for table in tables.values():
        assert all(isinstance(content, bytes) for content in read_images(table["file"].to_pylist(), source.roots))


def read_shards(path: Path, shards: Path) -> None:
    """manifest.json beside sound tables and shards."""
    manifest = read_manifest(path.parent)
    for name in manifest.splits:
        open_split(path.parent, manifest, name)


read_sound_manifest = cache(read_manifest)
read_sound_table = cache(lambda shards, name: read_table(shards, read_sound_manifest(shards).split(name)))


def read_samples(path: Path, shards: Path) -> None:
    """A table whose sha256 is the manifest's: somebody made it so. Its rows are read through the stream."""
    manifest = read_sound_manifest(shards)
    split = replace(manifest.split("train"), table_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    opened = open_split(path.parent, replace(manifest, splits={"train": split}), "train")
    labels = Labels(*make_targets(opened.table, parse_uncertain_policy("best"), "zeros", seed=0))
    plan = partial(plan_evaluation, find_images(opened), 4)
    for _ in stream_batches(opened, labels, plan, size=16, threads=1):
        pass


def read_scored(path: Path, shards: Path) -> None:
    """A run's scores, for the images of a sound table."""
    keys = read_sound_table(shards, "valid")["key"]
    assert read_scores(path, keys, ["Edema"]).shape == (len(keys), 1)


def read_pickle(path: Path, shards: Path) -> None:
    """The pickle in an otherwise sound checkpoint."""
    checkpoint, data = path.with_name("last.pt"), path.read_bytes()
    with zipfile.ZipFile(shards.parent / "last.pt") as sound, zipfile.ZipFile(checkpoint, "w") as archive:
        for name in sound.namelist():
            archive.writestr(name, data if name.endswith("/data.pkl") else sound.read(name))
    load_checkpoint(checkpoint)


def read_image(path: Path, shards: Path) -> None:
    """An image of a source, prepared in every encoding and decoded again; and as a shard's own."""
    data = path.read_bytes()
    for encoding in ENCODINGS:
        with contextlib.suppress(ValueError):
            decode_stored(data, encoding)
        try:
            stored = prepare(data, ImageOptions(32, "no", encoding, 95, 100_000))
        except ImageError:
            continue
        pixels = decode_stored(stored.data, encoding)
        assert pixels.dtype == np.uint8
        assert min(pixels.shape) > 0


class Reader(NamedTuple):
    """What reads an input: as the file of that name, beside the other sound files of shards if it needs them."""

    file: str
    seeds: str  # the sound files that inputs are bred from
    read: Callable[[Path, Path], object]  # of the file, and of sound shards
    beside: bool = False


TARGETS = {
    "csv": Reader("train.csv", "../*/*.csv", read_csv),
    "manifest": Reader("manifest.json", "manifest.json", read_shards, beside=True),
    "arrow": Reader("train.arrow", "train.arrow", read_samples, beside=True),
    "scores": Reader("scores.arrow", "../scores.arrow", read_scored),
    "checkpoint": Reader("last.pt", "../last.pt", lambda path, _: load_checkpoint(path)),
    "pickle": Reader("data.pkl", "../data.pkl", read_pickle),
    "config": Reader("config.json", "../config.json", lambda path, _: read_config(path.parent)),
    "tar": Reader("train-000000.tar", "train-*.tar", read_tar),
    "image": Reader("image", "../seeds/*", read_image),
    "dicom": Reader("image", "../*.dcm", read_image),
}


def make_target(name: str, folder: Path, shards: Path) -> Target:
    """The target in an empty folder."""
    reader, path = TARGETS[name], folder / TARGETS[name].file
    if reader.beside:
        shutil.copytree(shards, folder, dirs_exist_ok=True)

    def target(data: bytes) -> None:
        path.write_bytes(data)
        reader.read(path, shards)

    return target


def feed(target: Target, data: bytes) -> str:
    """Read an input: sound, or refused by a message that a terminal prints as it is; returns that."""
    message = ""
    try:
        target(data)
    except DataError as error:
        message = str(error)
    assert message.replace("\n", "").isprintable()
    assert len(message) < 3000
    return message


def fuzz(name: str, arguments: list[str]) -> None:
    """Feed one target until its time is over or it fails; libFuzzer then ends this process."""
    logging.disable()
    unpickler = _weights_only_unpickler.Unpickler
    unpickler.load = atheris.instrument_func(unpickler.load)  # type: ignore[method-assign]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    shards = make_example(folder / "example")
    corpus = WORK / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in sorted(shards.glob(TARGETS[name].seeds)):
        (corpus / f"seed-{seed.name}").write_bytes(seed.read_bytes())
    (folder / "input").mkdir()
    target = make_target(name, folder / "input", shards)

    def read(data: bytes) -> None:
        feed(target, data)

    options = f"-artifact_prefix={WORK}/crash-{name}- -rss_limit_mb=2048 -timeout=20 -max_len={LONGEST}"
    options += f" -print_final_stats=1 -max_total_time={SECONDS}"
    atheris.Setup([sys.argv[0], *options.split(), *(arguments or [str(corpus)])], read)
    atheris.Fuzz()


def main(names: list[str]) -> int:
    """Run the targets one after the other; a line for each. Returns the number of those that failed."""
    failed = 0
    for name in names:
        run = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
        stats = dict(re.findall(r"stat::(\w+): +(\d+)", run.stderr))
        inputs, memory = int(stats.get("number_of_executed_units", 0)), stats.get("peak_rss_mb", "?")
        coverage = re.findall(r"cov: (\d+)", run.stderr)[-1:]
        verdict = "no failure" if run.returncode == 0 else f"FAILED\n{run.stdout[-2000:]}{run.stderr[-1000:]}"
        print(f"{name:10} {inputs:>10,} inputs  {memory:>5} MB  coverage {''.join(coverage)}  {verdict}", flush=True)
        failed += run.returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in TARGETS:
        fuzz(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(main(os.environ.get("TARGETS", "").split() or [*TARGETS]))
