"""A CheXpert folder → tar shards, an Arrow index per split, and the manifest (format: shards/README.md).

Three steps, each a pure function in processes of its own, so that the parent stays small at any size:
    plan    CSVs → the rows of every shard, as `.partial/<split>.plan` (Arrow, one record batch per shard)
    write   one shard's rows + images → its tar, and `.partial/<shard>.json`: what the index needs of it
    finish  all of these → the Arrow tables, rejects.csv, and the manifest, last

A shard is a pure function of its rows and options, so the bytes do not depend on the number of workers, nor on
how often the run was killed and started again: finished shards are kept, anything else is done anew.

All of it is written inside `.partial`, under final names, and moved into the folder when it is whole; what was there
before moves aside first (`publish`). An object store cannot rename: there, files are put where they belong, and
`--overwrite` is refused.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.base.files import (
    atomic_file,
    claimed,
    move_file,
    read_arrow,
    read_object,
    remove_temporaries,
    write_csv,
    write_json,
    write_table,
)
from pipeline.base.store import (
    check_access,
    is_remote,
    list_files,
    make_folder,
    named_failures,
    open_to_read,
    remove_folder,
)
from pipeline.base.workers import report_item, run_alone, run_tasks
from pipeline.etl.cluster import PACKAGES, run_on_cluster
from pipeline.etl.tar import BLOCK, END, tar_member
from pipeline.images import ENCODINGS, ImageError, ImageOptions, gray_statistics, prepare
from pipeline.labels import LABELS, count_rows
from pipeline.manifest import NAME, Manifest, Shard, Split, read_manifest, write_manifest
from pipeline.policies import find_one_class
from pipeline.sources.chexpert import (
    Source,
    describe_moved,
    divide_rows,
    read_images,
    read_splits,
    refuse_dark_images,
)

PARTIAL = ".partial"  # inside the output folder, until the run is finished
REJECTS = "rejects.csv"
STARTED = "options.json"  # in there: what the run was asked for
POLICIES = {"uncertain": "best", "blank": "zeros"}  # where none are given
PLANNED = ".planned"  # beside it: the plan, until it is known to be good
JOURNAL = "publish.json"  # in PARTIAL: what moves out of the folder, and what into it
REPLACED = "replaced"  # in PARTIAL: what moved out
SAMPLED = 64  # images that are tried before shards that are there are written again
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

    folder: Path  # for the plans
    source: Source
    options: Options
    strict: Mapping[str, str] | None = None  # policies that must leave every label of train with both classes


class Plan(NamedTuple):
    """Rows per split, and what `describe_moved` says of images in other folders."""

    rows: dict[str, int]
    moved: str | None


class ShardTask(NamedTuple):
    """All that a worker needs to write one shard: into `out`, with its plan and its record in `partial`."""

    out: Path
    partial: Path
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
    moved: str | None = None  # as in `Plan`
    restored: tuple[str, ...] = ()  # keys of rejected images that could be used now
    repaired: tuple[str, ...] = ()  # files that were written again


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
    repair: bool = False,
    progress: Progress = lambda done, total, rejects: None,
) -> RunSummary:
    """Write `source` into `out`, or continue where an earlier run of the same options stopped.

    In so many worker processes, or on the Dask cluster of a `scheduler`; `out` may be a path of `pipeline.base.store`.
    A policy of None is that of the shards there, else the default. `overwrite` replaces shards of other options or CSVs
    when the new ones are whole; `repair` writes again what is missing or damaged of finished ones.
    Raises DataError for bad input, more than the share `max_bad` of unusable images, or `out` holding shards
    of other options or CSVs without `overwrite`; and, if `strict`, a label that would be left with one class.
    """
    check_access(out)
    if is_remote(out) and (overwrite or repair):
        option = "--overwrite" if overwrite else "--repair"
        raise DataError(
            f"{out}: {option} is for folders: an object store cannot exchange files as a whole; write to another "
            "prefix, or remove this one first"
        )
    hashes = {split: _sha256(csv) for split, csv in source.csvs.items()}
    # Shards of all views made before their studies lay together are other shards.
    unit = {"unit": "study"} if options.views == "all" else {}
    said = {name: value for name, value in asdict(options).items() if name != "bits" or value is not None}
    with named_failures(out, "cannot be written"):
        chosen = _choose_policies(out, policies, overwrite)
        wanted = {"options": said | unit, "policies": chosen, "sources": hashes}
        run = Run(out, source, options, chosen, wanted, workers, scheduler, max_bad, strict)
        looks_only = not (overwrite or repair or run.partial.exists())
        if looks_only and (found := _find_finished(run)) is not None:
            return found
        make_folder(out)
        with nullcontext() if is_remote(out) else claimed(out):
            publish(out)  # what a killed run had begun to move
            # Once more: another process may have finished them before it gave the folder back.
            if not (overwrite or repair) and (found := _find_finished(run)) is not None:
                return found
            try:
                return _repair(run, progress) if repair else _write_all(run, overwrite, progress)
            finally:
                if not is_remote(out):
                    remove_temporaries(out / PARTIAL)
                    remove_folder(out / PLANNED)


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
    def partial(self) -> Path:
        """The folder of plans and records."""
        return self.out / PARTIAL

    @property
    def work(self) -> Path:
        """The folder that the shards are written into."""
        return self.out if is_remote(self.out) else self.partial

    @property
    def started(self) -> dict[str, dict[str, Any]]:
        """What must not change until the run is finished: the versions decide its bytes, too."""
        return self.wanted | {"versions": {name: version(name) for name in (*PACKAGES, "chexpert-pipeline")}}


def _choose_policies(out: Path, given: Mapping[str, str | None], overwrite: bool) -> dict[str, str]:
    """Those given, of the others those of the shards that are there, finished or begun, else the defaults."""
    there: Mapping[str, str] = {}
    if not overwrite:
        is_there = (out / NAME).exists()
        begun = _read_own(out / PARTIAL / STARTED) or {}
        there = read_manifest(out).policies if is_there else begun.get("policies", {})
    return {name: given.get(name) or there.get(name, default) for name, default in POLICIES.items()}


def _find_finished(run: Run) -> RunSummary | None:
    """The summary of shards that are there already. Raises DataError where they are others, or not whole."""
    if not (run.out / NAME).exists():
        return None
    manifest = _read_same(run)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = run.out / shard.file
            if not path.exists() or path.stat().st_size != shard.bytes:
                raise DataError(f"{path}: missing, or not of its size; --repair writes it again")
    remove_folder(run.partial)
    task = PlanTask(run.out, run.source, run.options)
    restored = run_alone(find_restored, task) if manifest.rejects else ()
    return RunSummary(manifest, False, 0, 0, 0, restored=restored)


def _read_same(run: Run) -> Manifest:
    """The manifest that is there. Raises DataError where it is of other options, policies or CSVs."""
    manifest = read_manifest(run.out)
    _refuse_difference(run.out, {name: getattr(manifest, name) for name in run.wanted}, run.wanted)
    return manifest


def find_restored(task: PlanTask) -> tuple[str, ...]:
    """Keys of the images that finished shards rejected and that could be used now."""
    rejected = pa.array([reject["key"] for reject in read_manifest(task.folder).rejects])
    tables, _ = read_splits(task.source, **selection(task.options))
    again = pa.concat_tables(table.filter(pc.is_in(table["key"], rejected)) for table in tables.values())
    contents = read_images(again["file"].to_pylist(), task.source.roots)
    keys = again["key"].to_pylist()
    return tuple(
        key for key, content in zip(keys, contents, strict=True) if _reason(content, task.options) is None
    )


def _reason(content: bytes | ImageError, options: Options) -> str | None:
    """Why an image cannot be used; None where it can."""
    try:
        if isinstance(content, ImageError):
            raise content
        prepare(content, options.image)
    except ImageError as error:
        return str(error)
    return None


def _written_names(out: Path) -> list[str]:
    """The files of finished shards. Raises DataError for those of another program."""
    if not (out / NAME).exists():
        return []
    manifest = read_manifest(out)
    if manifest.options.get("indexed"):
        raise DataError(f"{out}: its shards come from another program; choose another folder")
    splits = manifest.splits.values()
    names = [name for split in splits for name in (split.table, *(shard.file for shard in split.shards))]
    return [name for name in (NAME, REJECTS, *names) if (out / name).exists()]


def _refuse_others(run: Run, planned: Path, splits: Collection[str]) -> None:
    """Raise DataError for a file of another origin whose name a shard or table of these splits may need.

    With the manifest gone, what it listed is of our own making: a tar or table that begins with the image that the plan
    puts first. At the end such a file is compared with the new one.
    """
    ours = _written_names(run.out)
    for path in list_files(run.out):
        match = _OURS.fullmatch(path.name)
        if path.name in ours or not match or match["split"] not in {None, *splits}:
            continue
        if is_remote(run.out) or not _is_planned(planned, path):
            raise DataError(
                f"{path}: not written by this command, which would replace it; choose another folder"
            )


def _is_planned(planned: Path, path: Path) -> bool:
    """Whether a file of a shard or a table begins with what the plan puts first."""
    if path.name == REJECTS:
        return path.read_bytes().startswith(",".join(Reject._fields).encode())
    split, _, number = path.stem.rpartition("-") if path.suffix == ".tar" else (path.stem, "", "0")
    if int(number) >= _count_shards(planned, split):
        return False
    first = str(_plan_batch(planned, split, int(number))["key"][0])
    if path.suffix == ".tar":
        with path.open("rb") as file:
            return file.read(100).partition(b".")[0].decode(errors="replace") == first
    try:
        return str(read_arrow(path, path.read_bytes())["key"][0]) == first
    except (DataError, KeyError, IndexError):
        return False


def publish(out: Path) -> None:
    """Move whole shards from `.partial` into the folder, as its journal says, and what they replace out of it.

    Killed at any moment, it goes on from there when it is called again: nothing of either set is lost before the new
    manifest is in its place. Does nothing without a journal.
    """
    partial = out / PARTIAL
    if is_remote(out) or (journal := _read_own(partial / JOURNAL)) is None:
        return
    replaced = partial / REPLACED
    replaced.mkdir(exist_ok=True)
    for name in journal["old"]:  # the manifest first: without it, no file is taken for finished
        if not (replaced / name).exists():
            move_file(out / name, replaced / name)
    for name in journal["new"]:  # the manifest last
        if (partial / name).exists():
            move_file(partial / name, out / name)
    # The journal first: it must not outlive what it names.
    (partial / JOURNAL).unlink()
    remove_folder(partial)


def _exchange(run: Run, manifest: Manifest) -> None:
    """Put finished shards in the place of those that are there. Raises DataError for a file of another origin."""
    new = [shard.file for split in manifest.splits.values() for shard in split.shards]
    new += [split.table for split in manifest.splits.values()]
    new += [*([REJECTS] if manifest.rejects else []), NAME]
    old = _written_names(run.out)
    for name in new:
        if name not in old and (run.out / name).exists():
            if _sha256(run.out / name) != _sha256(run.partial / name):
                raise DataError(
                    f"{run.out / name}: not what this command writes there; move it away, or choose another folder"
                )
            old.append(name)
    remove_folder(run.partial / REPLACED)  # of an exchange before, killed at its very end
    write_json(run.partial / JOURNAL, {"old": old, "new": new})
    publish(run.out)


def _read_own(path: Path) -> dict[str, Any] | None:
    """What is in a JSON file of an unfinished run; None if there is none or it is damaged: then it is made again."""
    try:
        return read_object(path)
    except (FileNotFoundError, DataError):
        return None


def _plan(run: Run, overwrite: bool) -> Plan:
    """Plan the shards, and check what can be checked, before anything that is there is touched."""
    planned = run.partial if is_remote(run.out) else run.out / PLANNED
    before = _read_own(run.partial / STARTED)
    begun = any(path.suffix == ".tar" for path in list_files(run.work))
    if before is not None and begun and not overwrite:
        _refuse_difference(run.out, before, run.started)
    make_folder(planned)
    task = PlanTask(planned, run.source, run.options, run.policies if run.strict else None)
    plan = run_alone(write_plan, task)
    if before is None or not is_remote(run.out):
        _refuse_others(run, planned, plan.rows)
    if overwrite:
        run_alone(try_images, task)
    if planned != run.partial:
        if before != run.started:
            remove_folder(run.partial)
        make_folder(run.partial)
        for path in planned.iterdir():
            move_file(path, run.partial / path.name)
    write_json(run.partial / STARTED, run.started)
    return plan


def try_images(task: PlanTask) -> None:
    """Raise DataError where none of a sample of the planned images can be used: a disk may not be mounted."""
    rows = [
        _plan_batch(task.folder, path.stem, 0).slice(0, SAMPLED)
        for path in sorted(task.folder.glob("*.plan"))
    ]
    files = [file for of_split in rows for file in of_split["file"].to_pylist()]
    reasons = [_reason(content, task.options) for content in read_images(files, task.source.roots)]
    if None not in reasons:
        raise DataError(
            f"{files[0]}: {reasons[0]}; none of {len(files)} images tried can be used, so nothing was changed"
        )


def _list_tasks(run: Run, splits: Iterable[str]) -> list[ShardTask]:
    """A task for each planned shard."""
    return [
        ShardTask(run.work, run.partial, split, number, run.source.roots, run.options.image)
        for split in splits
        for number in range(_count_shards(run.partial, split))
    ]


def _write_all(run: Run, overwrite: bool, progress: Progress) -> RunSummary:
    """Plan, write what is not yet written, finish, and put it in its place."""
    out = run.out
    rows, moved = _plan(run, overwrite)
    total = sum(rows.values())
    records = [(task, _finished(task)) for task in _list_tasks(run, rows)]
    finished = [summary for _, summary in records if summary is not None]
    unfinished = [task for task, summary in records if summary is None]
    resumed = sum(summary.samples for summary in finished)
    finished += _write_tasks(run, unfinished, resumed, total, progress)
    manifest = run_alone(finish, FinishTask(run.work, run.partial, rows, run.wanted))
    if is_remote(out):
        remove_folder(run.partial)
    else:
        _exchange(run, manifest)
    stripped = sum(summary.stripped for summary in finished)
    bytes_in = sum(summary.bytes_in for summary in finished)
    return RunSummary(manifest, True, bytes_in, stripped, resumed, moved)


def _write_tasks(
    run: Run, tasks: Sequence[ShardTask], resumed: int, total: int, progress: Progress
) -> list[ShardSummary]:
    """Write shards in processes or on a cluster. Raises DataError for more rejects than are allowed."""
    done = 0
    rejects: list[Reject] = []

    def tick(items: int) -> None:
        progress(min(resumed + items, total), total, len(rejects))

    tick(0)
    if run.scheduler is None:
        results = run_tasks(write_shard, tasks, run.workers, tick)
    else:
        results = run_on_cluster(write_shard, tasks, run.scheduler, run.partial / STARTED)
    finished = []
    # Closed explicitly: when this raises, the workers must have ended before the caller goes on.
    with closing(results) as summaries:
        for summary in summaries:
            finished.append(summary)
            rejects += summary.rejects
            done += summary.samples + len(summary.rejects)
            if run.scheduler is not None:
                tick(done)
            if len(rejects) > run.max_bad * total:
                _write_rejects(run.work, rejects)
                raise DataError(
                    f"{len(rejects)} of {total:,} images cannot be used, more than --max-bad {run.max_bad:.2%}; "
                    f"{run.work / REJECTS} lists them; the first: {rejects[0].file}: {rejects[0].reason}"
                )
    progress(total, total, len(rejects))
    return finished


def _repair(run: Run, progress: Progress) -> RunSummary:
    """Write again what is missing or damaged of finished shards, to the same bytes.

    Raises DataError where the source does not give these bytes any more.
    """
    manifest = _read_same(run)
    expected = {shard.file: shard.sha256 for split in manifest.splits.values() for shard in split.shards}
    expected |= {split.table: split.table_sha256 for split in manifest.splits.values()}
    damaged = {
        name
        for name, sha256 in expected.items()
        if not (run.out / name).is_file() or _sha256(run.out / name) != sha256
    }
    remove_folder(run.partial)
    if damaged:
        rows, _ = _plan(run, overwrite=False)
        # A table needs the records of all shards of its split.
        whole = [name for name, split in manifest.splits.items() if split.table in damaged]
        tasks = [task for task in _list_tasks(run, rows) if task.split in whole or task.file in damaged]
        total = sum(rows.values())  # of which the share of rejects is allowed
        again = sum(len(_plan_batch(run.partial, task.split, task.number)) for task in tasks)
        _write_tasks(run, tasks, total - again, total, progress)
        for split in whole:
            run_alone(_write_index, (FinishTask(run.work, run.partial, rows, run.wanted), split))
        for name in sorted(damaged):
            if not (run.partial / name).is_file() or _sha256(run.partial / name) != expected[name]:
                raise DataError(
                    f"{run.out / name}: the source does not give the same bytes any more, so it cannot be repaired; "
                    "--overwrite writes all shards again"
                )
        for name in sorted(damaged):
            move_file(run.partial / name, run.out / name)
        remove_folder(run.partial)
    return RunSummary(manifest, False, 0, 0, 0, repaired=tuple(sorted(damaged)))


def write_plan(task: PlanTask) -> Plan:
    """Write the rows of every shard, one record batch each. Raises DataError for what `strict` does not allow."""
    tables, _ = read_splits(task.source, **selection(task.options))
    if task.strict and "train" in tables and (found := find_one_class(tables["train"], task.strict)):
        raise DataError(f"--strict: {'; '.join(found)}; choose other policies")
    if task.options.bits is None:
        refuse_dark_images(tables.values(), task.source.roots, task.options.max_pixels)
    for split, table in tables.items():
        path = task.folder / f"{split}.plan"
        with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            for of_shard in divide_rows(
                table.combine_chunks(), task.options.samples_per_shard, task.options.views
            ):
                writer.write_table(of_shard)
    rows = {split: table.num_rows for split, table in tables.items()}
    return Plan(rows, describe_moved(tables.values(), task.source.roots))


def write_shard(task: ShardTask) -> ShardSummary:
    """Write one tar, then its record. Unusable images are left out and reported.

    Raises DataError where a file cannot be written.
    """
    rows = _plan_batch(task.partial, task.split, task.number).to_pylist()
    with atomic_file(task.out / task.file) as file:
        summary, record = _write_tar(task, rows, file)
    write_json(_record_path(task), {"summary": summary, **record})
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
    partial: Path
    rows: dict[str, int]
    wanted: dict[str, dict[str, Any]]


def finish(task: FinishTask) -> Manifest:
    """Write the Arrow tables, rejects.csv where there are any, and the manifest."""
    splits: dict[str, Split] = {}
    levels: dict[str, Any] = {}
    rejects: list[Reject] = []
    for split in task.rows:
        splits[split], levels[split], of_split = _write_index((task, split))
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


def _write_index(of: tuple[FinishTask, str]) -> tuple[Split, Any, list[Reject]]:
    """Write `<split>.arrow`: the rows that were kept, without paths, plus where each image lies."""
    task, split = of
    batches, shards, rejects = [], [], []
    levels = np.zeros(256, np.int64)
    for number in range(_count_shards(task.partial, split)):
        record = json.loads((task.partial / f"{split}-{number:06d}.json").read_bytes())
        rows = _plan_batch(task.partial, split, number).filter(pa.array(record["kept"]))
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


def _count_shards(partial: Path, split: str) -> int:
    with (partial / f"{split}.plan").open("rb") as file:
        return int(pa.ipc.open_file(file).num_record_batches)


def _plan_batch(partial: Path, split: str, number: int) -> pa.RecordBatch:
    """The rows of one shard, read by themselves: a memory map would stay resident."""
    path = partial / f"{split}.plan"
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
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or damaged
        return None
    summary = ShardSummary(*record["summary"])
    return summary if complete and not summary.rejects else None


def _record_path(task: ShardTask) -> Path:
    return task.partial / f"{task.split}-{task.number:06d}.json"


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
                remedy = "choose another prefix" if is_remote(out) else "choose another folder or --overwrite"
                raise DataError(f"{out} holds other shards: {difference}; {remedy}")


def _sha256(path: Path) -> str:
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
