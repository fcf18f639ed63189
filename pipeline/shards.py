"""A CheXpert folder → tar shards, an Arrow index per split, and the manifest (format: shards/README.md).

Three steps, each a pure function in processes of its own, so that the parent stays small at any size:
    plan    CSVs → the rows of every shard, as `.partial/<split>.plan` (Arrow, one record batch per shard)
    write   one shard's rows + images → its tar, and `.partial/<shard>.json`: what the index needs of it
    finish  all of these → the Arrow tables, rejects.csv, and the manifest, last

A shard is a pure function of its rows and options, so the bytes do not depend on the number of workers, nor on
how often the run was killed and started again: finished shards are kept, anything else is done anew.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import DataError
from pipeline.cluster import PACKAGES, run_on_cluster
from pipeline.images import ENCODINGS, ImageError, ImageOptions, gray_statistics, prepare
from pipeline.labels import (
    LABELS,
    describe_one_class,
    make_targets,
    one_class_labels,
    parse_uncertain_policy,
)
from pipeline.manifest import (
    NAME,
    Manifest,
    Shard,
    Split,
    atomic_file,
    claimed,
    count_rows,
    read_manifest,
    read_table,
    write_atomically,
    write_csv,
    write_manifest,
    write_table,
)
from pipeline.source import (
    Source,
    describe_moved,
    divide_rows,
    read_images,
    read_splits,
    refuse_dark_images,
)
from pipeline.store import (
    check_access,
    is_remote,
    list_files,
    make_folder,
    named_failures,
    open_to_read,
    remove_folder,
)
from pipeline.tar import BLOCK, END, tar_member
from pipeline.workers import report_item, run_alone, run_tasks

PARTIAL = ".partial"  # inside the output folder, until the run is finished
REJECTS = "rejects.csv"
STARTED = "options.json"  # in there: what the run was asked for
POLICIES = {"uncertain": "best", "blank": "zeros"}  # where none are given
STALE = "stale.json"  # in there: names of files that --overwrite removes
_OURS = re.compile(r"(?P<split>[a-z0-9_]+)(-\d{6}\.tar|\.arrow)|rejects\.csv")


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards; meanings and defaults are those of `pipeline shards --help`."""

    size: int | None
    square: str
    encoding: str
    quality: int
    max_pixels: int
    views: str
    dev: float
    seed: int
    limit: int | None
    samples_per_shard: int
    bits: int | None = None

    @property
    def image(self) -> ImageOptions:
        """The part that concerns a single image."""
        return ImageOptions(self.size, self.square, self.encoding, self.quality, self.max_pixels, self.bits)


class PlanTask(NamedTuple):
    """All that planning needs."""

    out: Path
    source: Source
    options: Options
    policies: Mapping[str, str]


class Plan(NamedTuple):
    """Rows per split, the labels of train that the policies leave with one class, and images in other folders.

    As `one_class_labels` and `describe_moved` have them.
    """

    rows: dict[str, int]
    one_class: list[tuple[str, int, int]]
    moved: str | None


class ShardTask(NamedTuple):
    """All that a worker needs to write one shard."""

    out: Path
    split: str
    number: int
    roots: tuple[Path, ...]
    options: ImageOptions

    @property
    def file(self) -> str:
        """The shard's file name."""
        return f"{self.split}-{self.number:06d}.tar"

    def __str__(self) -> str:
        return str(self.out / self.file)


class Reject(NamedTuple):
    """An image that did not get into its shard."""

    split: str
    key: str
    file: str
    reason: str


class ShardSummary(NamedTuple):
    """What the parent needs to know of a finished shard."""

    samples: int
    bytes_in: int
    bytes_out: int
    stripped: int
    rejects: tuple[Reject, ...]


class RunSummary(NamedTuple):
    """Totals of a run; `is_new` is False where the shards were there already."""

    manifest: Manifest
    is_new: bool
    bytes_in: int
    stripped: int
    resumed: int  # samples in shards that an earlier run had finished
    one_class: list[tuple[str, int, int]]
    moved: str | None  # as in `Plan`


Progress = Callable[[int, int, int], None]  # images done, images in all, rejects


def write_shards(
    source: Source,
    out: Path,
    options: Options,
    policies: Mapping[str, str | None],
    *,
    workers: int,
    scheduler: str | None = None,
    max_bad: float,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, rejects: None,
) -> RunSummary:
    """Write `source` into `out`, or continue where an earlier run of the same options stopped.

    In so many worker processes, or on the Dask cluster of a `scheduler`; `out` may be a path of `pipeline.store`.
    A policy of None is that of the shards there, else the default.
    Raises DataError for bad input, more than the share `max_bad` of unusable images, or `out` holding shards
    of other options or CSVs without `overwrite`; and, if `strict`, a label left with one class.
    """
    check_access(out)
    hashes = {split: _sha256(csv) for split, csv in source.csvs.items()}
    # Shards of all views made before their studies lay together are other shards.
    unit = {"unit": "study"} if options.views == "all" else {}
    said = {name: value for name, value in asdict(options).items() if name != "bits" or value is not None}
    with named_failures(out, "cannot be written"):
        chosen = _choose_policies(out, policies, overwrite)
        wanted = {"options": said | unit, "policies": chosen, "sources": hashes}
        run = Run(out, source, options, chosen, wanted, workers, scheduler, max_bad, strict)
        if not overwrite and (found := _find_finished(run)) is not None:
            return found
        make_folder(out)
        with nullcontext() if is_remote(out) else claimed(out):
            # Once more: another process may have finished them before it gave the folder back.
            if not overwrite and (found := _find_finished(run)) is not None:
                return found
            _make_room(run, overwrite)
            return _write_all(run, progress)


@dataclass(frozen=True)
class Run:
    """What `write_shards` was asked for; `wanted` is what of it the manifest records."""

    out: Path
    source: Source
    options: Options
    policies: Mapping[str, str]
    wanted: dict[str, dict[str, Any]]
    workers: int
    scheduler: str | None
    max_bad: float
    strict: bool

    @property
    def started(self) -> dict[str, dict[str, Any]]:
        """What must not change until the run is finished: the versions decide its bytes, too."""
        return self.wanted | {"versions": {name: version(name) for name in (*PACKAGES, "chexpert-pipeline")}}


def _choose_policies(out: Path, given: Mapping[str, str | None], overwrite: bool) -> dict[str, str]:
    """Those given, of the others those of the shards that are there, finished or begun, else the defaults."""
    there: Mapping[str, str] = {}
    if not overwrite:
        is_there = (out / NAME).exists()
        begun = _read_json(out / PARTIAL / STARTED) or {}
        there = read_manifest(out).policies if is_there else begun.get("policies", {})
    return {name: given.get(name) or there.get(name, default) for name, default in POLICIES.items()}


def _find_finished(run: Run) -> RunSummary | None:
    """The summary of shards that are there already. Raises DataError where they are others, or not whole."""
    if not (run.out / NAME).exists():
        return None
    manifest = read_manifest(run.out)
    _refuse_difference(run.out, {name: getattr(manifest, name) for name in run.wanted}, run.wanted)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = run.out / shard.file
            if not path.exists() or path.stat().st_size != shard.bytes:
                raise DataError(f"{path}: missing, or not of its size; --overwrite writes all shards again")
    remove_folder(run.out / PARTIAL)
    one_class = run_alone(find_one_class, PlanTask(run.out, run.source, run.options, run.policies))
    _refuse_one_class(run, one_class)
    return RunSummary(manifest, False, 0, 0, 0, one_class, None)


def _make_room(run: Run, overwrite: bool) -> None:
    """Remove what an earlier run wrote, where that was asked for. Raises DataError for files of others.

    Their names are noted before the manifest goes, so that the same command goes on where it was killed.
    """
    partial = run.out / PARTIAL
    stale = partial / STALE
    is_there = (run.out / NAME).exists()
    started = _read_json(partial / STARTED)
    if overwrite and (is_there or (started is not None and started != run.started)):
        names = _written_names(run.out)
        make_folder(partial)
        write_atomically(stale, json.dumps(names).encode())
        for path in ((run.out / NAME), *(path for path in list_files(partial) if path.name != STALE)):
            path.unlink(missing_ok=True)
    elif started is None and not stale.exists():
        splits = {*run.source.csvs, "dev"}
        for path in list_files(run.out):
            match = _OURS.fullmatch(path.name)
            if match and (match["split"] is None or match["split"] in splits):
                raise DataError(
                    f"{path}: not written by this command, which would replace it; choose another folder"
                )
    for name in _read_json(stale) or []:
        (run.out / name).unlink(missing_ok=True)
    stale.unlink(missing_ok=True)


def _written_names(out: Path) -> list[str]:
    """The files in a folder that a run of this program wrote, finished or not."""
    if (out / NAME).exists():
        manifest = read_manifest(out)
        if manifest.options.get("indexed"):
            raise DataError(f"{out}: its shards come from another program; choose another folder")
        splits = manifest.splits.values()
        return [
            REJECTS,
            *(name for split in splits for name in (split.table, *(s.file for s in split.shards))),
        ]
    plans = {path.stem for path in (out / PARTIAL).glob("*.plan")}
    found = ((path.name, _OURS.fullmatch(path.name)) for path in list_files(out))
    names = [name for name, match in found if match and (match["split"] is None or match["split"] in plans)]
    return names + (_read_json(out / PARTIAL / STALE) or [])


def _read_json(path: Path) -> Any:
    """What is in a file of ours; None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def _write_all(run: Run, progress: Progress) -> RunSummary:
    """Plan, write what is not yet written, and finish."""
    out = run.out
    partial = out / PARTIAL
    make_folder(partial)
    started = partial / STARTED
    before = _read_json(started)
    if before is not None and any(path.suffix == ".tar" for path in list_files(out)):
        _refuse_difference(out, before, run.started)
    rows, one_class, moved = run_alone(write_plan, PlanTask(out, run.source, run.options, run.policies))
    _refuse_one_class(run, one_class)
    write_atomically(started, json.dumps(run.started).encode())

    total = sum(rows.values())
    tasks = [
        ShardTask(out, split, number, run.source.roots, run.options.image)
        for split in rows
        for number in range(_count_shards(out, split))
    ]
    records = [(task, _finished(task)) for task in tasks]
    finished = [summary for _, summary in records if summary is not None]
    unfinished = [task for task, summary in records if summary is None]
    resumed = sum(summary.samples for summary in finished)
    done = 0
    rejects: list[Reject] = []

    def tick(items: int) -> None:
        progress(min(resumed + items, total), total, len(rejects))

    tick(0)
    if run.scheduler is None:
        results = run_tasks(write_shard, unfinished, run.workers, tick)
    else:
        results = run_on_cluster(write_shard, unfinished, run.scheduler, started)
    # Closed explicitly: when this raises, the workers must have ended before the caller goes on.
    with closing(results) as summaries:
        for summary in summaries:
            finished.append(summary)
            rejects += summary.rejects
            done += summary.samples + len(summary.rejects)
            if run.scheduler is not None:
                tick(done)
            if len(rejects) > run.max_bad * total:
                _write_rejects(out, rejects)
                raise DataError(
                    f"{len(rejects)} of {total:,} images cannot be used, more than --max-bad {run.max_bad:.2%}; "
                    f"{out / REJECTS} lists them; the first: {rejects[0].file}: {rejects[0].reason}"
                )
    progress(total, total, len(rejects))
    manifest = run_alone(finish, FinishTask(out, rows, run.wanted))
    remove_folder(partial)
    stripped = sum(summary.stripped for summary in finished)
    bytes_in = sum(summary.bytes_in for summary in finished)
    return RunSummary(manifest, True, bytes_in, stripped, resumed, one_class, moved)


def write_plan(task: PlanTask) -> Plan:
    """Write the rows of every shard, one record batch each."""
    tables, _ = read_splits(task.source, **selection(task.options))
    if task.options.bits is None:
        refuse_dark_images(tables.values(), task.source.roots, task.options.max_pixels)
    for split, table in tables.items():
        path = task.out / PARTIAL / f"{split}.plan"
        with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            for of_shard in divide_rows(
                table.combine_chunks(), task.options.samples_per_shard, task.options.views
            ):
                writer.write_table(of_shard)
    rows = {split: table.num_rows for split, table in tables.items()}
    one_class = _one_class(tables["train"], task) if "train" in tables else []
    return Plan(rows, one_class, describe_moved(tables.values(), task.source.roots))


def find_one_class(task: PlanTask) -> list[tuple[str, int, int]]:
    """The labels of finished shards that the policies leave with one class in train."""
    splits = read_manifest(task.out).splits
    return _one_class(read_table(task.out, splits["train"]), task) if "train" in splits else []


def _one_class(table: pa.Table, task: PlanTask) -> list[tuple[str, int, int]]:
    # A teacher's scores come later: what they would say of the uncertain cells is left out here.
    uncertain = {
        label: "ignore" if policy == "selftrained" else policy
        for label, policy in parse_uncertain_policy(task.policies["uncertain"]).items()
    }
    return one_class_labels(*make_targets(table, uncertain, task.policies["blank"], task.options.seed))


def _refuse_one_class(run: Run, one_class: list[tuple[str, int, int]]) -> None:
    if run.strict and one_class:
        raise DataError(f"--strict: {'; '.join(describe_one_class(one_class))}; choose other policies")


def write_shard(task: ShardTask) -> ShardSummary:
    """Write one tar, then its record. Unusable images are left out and reported.

    Raises DataError where a file cannot be written.
    """
    rows = _plan_batch(task.out, task.split, task.number).to_pylist()
    with atomic_file(task.out / task.file) as file:
        summary, record = _write_tar(task, rows, file)
    write_atomically(_record_path(task), json.dumps({"summary": summary, **record}).encode())
    return summary


def _write_tar(
    task: ShardTask, rows: list[dict[str, Any]], file: BinaryIO
) -> tuple[ShardSummary, dict[str, Any]]:
    """Write the members; returns the summary, and the columns that the index needs."""
    sha256 = hashlib.sha256()
    position = bytes_in = stripped = 0
    kept, offset, length, crc = [], [], [], []
    levels = np.zeros(256, np.int64)
    rejects: list[Reject] = []
    suffix = ENCODINGS[task.options.encoding]

    def write(data: bytes) -> None:
        nonlocal position
        file.write(data)
        sha256.update(data)
        position += len(data)

    contents = read_images([row["file"] for row in rows], task.roots)
    for row, content in zip(rows, contents, strict=True):
        try:
            if isinstance(content, ImageError):
                raise content
            image = prepare(content, task.options)
        except ImageError as error:
            rejects.append(Reject(task.split, row["key"], row["file"], str(error)))
            kept.append(False)
        else:
            kept.append(True)
            bytes_in += len(content)
            stripped += image.stripped
            offset.append(position + BLOCK)
            length.append(len(image.data))
            crc.append(zlib.crc32(image.data))
            write(tar_member(f"{row['key']}.{suffix}", image.data))
            write(tar_member(f"{row['key']}.json", _sample_json(row)))
            # Every 16th pixel: counting all of them would take as long as encoding them.
            levels += np.bincount(image.pixels[::4, ::4].ravel(), minlength=256)
        report_item()
    write(END)
    summary = ShardSummary(len(offset), bytes_in, position, stripped, tuple(rejects))
    record = {
        "shard": asdict(Shard(task.file, len(offset), position, sha256.hexdigest())),
        "kept": kept,
        "offset": offset,
        "length": length,
        "crc": crc,
        "levels": levels.tolist(),
    }
    return summary, record


class FinishTask(NamedTuple):
    """All that finishing needs: rows per split, and the manifest's options, policies and sources."""

    out: Path
    rows: dict[str, int]
    wanted: dict[str, dict[str, Any]]


def finish(task: FinishTask) -> Manifest:
    """Write the Arrow tables, rejects.csv where there are any, and the manifest."""
    splits: dict[str, Split] = {}
    levels: dict[str, Any] = {}
    rejects: list[Reject] = []
    for split in task.rows:
        splits[split], levels[split], of_split = _write_index(task, split)
        rejects += of_split
    if rejects:
        _write_rejects(task.out, rejects)
    else:
        (task.out / REJECTS).unlink(missing_ok=True)
    manifest = Manifest(
        **task.wanted,
        pixels=gray_statistics(levels.get("train", next(iter(levels.values())))),
        splits=splits,
        rejects=tuple({"split": r.split, "key": r.key, "reason": r.reason} for r in rejects),
    )
    write_manifest(task.out, manifest)
    return manifest


def _write_index(task: FinishTask, split: str) -> tuple[Split, Any, list[Reject]]:
    """Write `<split>.arrow`: the rows that were kept, without paths, plus where each image lies."""
    batches, shards, rejects = [], [], []
    levels = np.zeros(256, np.int64)
    for number in range(_count_shards(task.out, split)):
        record = json.loads((task.out / PARTIAL / f"{split}-{number:06d}.json").read_bytes())
        rows = _plan_batch(task.out, split, number).filter(pa.array(record["kept"]))
        index = pa.Table.from_batches([rows]).drop_columns(["path", "file"])
        columns = {"shard": (pa.int32(), [number] * rows.num_rows), "offset": (pa.int64(), record["offset"])}
        columns |= {"length": (pa.int32(), record["length"]), "crc": (pa.uint32(), record["crc"])}
        for name, (kind, values) in columns.items():
            index = index.append_column(name, pa.array(values, kind))
        batches.append(index)
        shards.append(Shard(**record["shard"]))
        levels += np.array(record["levels"])
        rejects += [Reject(*reject) for reject in record["summary"][-1]]
    table = pa.concat_tables(batches)
    entry = Split(
        **count_rows(table),
        table=f"{split}.arrow",
        table_sha256=write_table(task.out / f"{split}.arrow", table),
        shards=tuple(shards),
    )
    return entry, levels, rejects


def _count_shards(out: Path, split: str) -> int:
    with (out / PARTIAL / f"{split}.plan").open("rb") as file:
        return int(pa.ipc.open_file(file).num_record_batches)


def _plan_batch(out: Path, split: str, number: int) -> pa.RecordBatch:
    """The rows of one shard, read by themselves: a memory map would stay resident."""
    path = out / PARTIAL / f"{split}.plan"
    try:
        with path.open("rb") as file:
            return pa.ipc.open_file(file).get_batch(number)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}; the same command writes it again") from error


def _finished(task: ShardTask) -> ShardSummary | None:
    """The summary of a shard that an earlier run finished. One with rejects is tried again."""
    try:
        record = json.loads(_record_path(task).read_bytes())
        complete = (task.out / task.file).stat().st_size == record["shard"]["bytes"]
    except FileNotFoundError:
        return None
    summary = ShardSummary(*record["summary"])
    return summary if complete and not summary.rejects else None


def _record_path(task: ShardTask) -> Path:
    return task.out / PARTIAL / f"{task.split}-{task.number:06d}.json"


def _sample_json(row: Mapping[str, Any]) -> bytes:
    """Raw labels and view facts of one row, for readers that have the tar alone."""
    facts = {name: row[name] for name in ("key", "patient", "study", "view", "sex", "age", "projection")}
    return json.dumps(facts | {"labels": {label: row[label] for label in LABELS}}).encode()


def selection(options: Options) -> dict[str, Any]:
    """The part of the options that chooses rows, as `read_splits` takes it."""
    return {name: getattr(options, name) for name in ("views", "dev", "seed", "limit")}


def _write_rejects(out: Path, rejects: list[Reject]) -> None:
    write_csv(out / REJECTS, [Reject._fields, *sorted(rejects)])


def _refuse_difference(out: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for group, values in wanted.items():
        of_group = there.get(group, {})
        # The unit last: it follows from the views.
        for name in sorted(values.keys() | of_group.keys(), key=lambda name: (name == "unit", name)):
            if values.get(name) != of_group.get(name):
                difference = f"{name} is {of_group.get(name)} there and {values.get(name)} here"
                if group == "sources":
                    difference = f"the CSV of {name} is another one"
                raise DataError(
                    f"{out} holds other shards: {difference}; choose another folder or --overwrite"
                )


def _sha256(path: Path) -> str:
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
