"""A data set's folder → tar shards, an Arrow index per split, and the manifest (format: shards/README.md).

Four steps. The first three run in processes of their own, so that the parent stays small at any size:
    planning   CSVs → the rows of every shard, as `.partial/<split>.plan`
    writing    one shard's rows + images → its tar, and `.partial/<shard>.json`: what the index needs of it
    finish     all of these → the Arrow tables, rejects.csv, and the manifest, last
    exchange   all files → from `.partial` into the folder, as a whole

A run that was killed is continued: finished shards are kept, anything else is done again. An object store cannot
rename: there, files are put where they belong, and `--overwrite` is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.base.errors import DataError, describe_difference
from pipeline.base.files import claimed, hash_file, move_file, remove_temporaries, write_json
from pipeline.base.store import (
    check_access,
    is_remote,
    list_files,
    make_folder,
    named_failures,
    remove_folder,
)
from pipeline.base.workers import run_alone, run_tasks
from pipeline.etl.cluster import PACKAGES, run_on_cluster
from pipeline.etl.exchange import PARTIAL, PLANNED, exchange, publish, read_unfinished, refuse_others
from pipeline.etl.planning import (
    Options,
    Plan,
    PlanTask,
    count_planned,
    find_restored,
    read_planned,
    try_images,
    write_plan,
)
from pipeline.etl.writing import (
    REJECTS,
    FinishTask,
    Reject,
    ShardSummary,
    ShardTask,
    find_summary,
    finish,
    index_split,
    write_rejects,
    write_shard,
)
from pipeline.manifest import NAME, Manifest, read_manifest
from pipeline.sources.sets import SETS, find_terms
from pipeline.sources.source import Source

STARTED = "options.json"  # in PARTIAL: what the run was asked for
POLICIES = {"uncertain": "best", "blank": "zeros"}  # where none are given


@dataclass(frozen=True)
class Execution:
    """How shards are written; it decides none of their bytes.

    In `workers` processes, or on the Dask cluster of a `scheduler`. `max_bad` is the share of images that may be
    unusable. `strict` refuses labels that train's policies leave with one class. `overwrite` replaces shards of other
    options or CSVs when the new ones are whole; `repair` rewrites missing or damaged files of finished shards.
    """

    workers: int
    max_bad: float
    scheduler: str | None = None
    strict: bool = False
    overwrite: bool = False
    repair: bool = False


class RunSummary(NamedTuple):
    """Totals of a run; `is_new` is False where the shards were there already."""

    manifest: Manifest
    is_new: bool
    bytes_in: int = 0
    stripped: int = 0
    resumed: int = 0  # samples in shards that an earlier run had finished
    moved: str | None = None  # as in `Plan`
    notes: tuple[str, ...] = ()  # as in `Plan`
    restored: tuple[str, ...] = ()  # keys of rejected images that can be used now
    repaired: tuple[str, ...] = ()  # files that were written again


Progress = Callable[[int, int, int], None]  # images done, images in all, rejects


@dataclass(frozen=True)
class Run:
    """What `write_shards` was asked for; `wanted` is the part that the manifest records."""

    out: Path
    source: Source
    options: Options
    policies: Mapping[str, str]
    wanted: dict[str, dict[str, Any]]
    how: Execution
    progress: Progress

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

    def list_tasks(self, plan: Plan) -> list[ShardTask]:
        """A task for each planned shard."""
        return [
            ShardTask(self.work, self.partial, split, number, self.source.roots, self.options.image)
            for split in plan.rows
            for number in range(count_planned(self.partial, split))
        ]

    def finish_task(self, plan: Plan) -> FinishTask:
        """What finishing needs."""
        dataset = find_terms(self.source)._asdict()
        return FinishTask(self.work, self.partial, tuple(plan.rows), self.wanted, dataset)


def write_shards(
    source: Source,
    out: Path,
    options: Options,
    policies: Mapping[str, str | None],
    how: Execution,
    progress: Progress = lambda done, total, rejects: None,
) -> RunSummary:
    """Write `source` into `out`, or continue where an earlier run with the same options stopped.

    `out` may be a path of `pipeline.base.store`. A policy of None is that of the shards there, else the default.
    Raises DataError for bad input, too many unusable images, shards of other options or CSVs in `out` without
    `overwrite`, and what `strict` refuses before it writes shards.
    """
    check_access(out)
    if is_remote(out) and (how.overwrite or how.repair):
        raise DataError(
            f"{out}: {'`overwrite`' if how.overwrite else '`repair`'} is for folders: an object store cannot exchange "
            "files as a whole; write to another prefix, or remove this one first"
        )
    named_files = source.csvs | {f"facts-{number}": path for number, path in enumerate(source.facts, 1)}
    hashes = {name: hash_file(path) for name, path in named_files.items()}
    with named_failures(out, "cannot be written"):
        chosen = _choose_policies(out, policies, how.overwrite)
        named: dict[str, Any] = {"columns": dict(source.columns)} if source.columns else {}
        if source.set != SETS[source.set].TERMS.name:  # other rows of the same table
            named["set"] = source.set
        if source.name:
            named["name"] = source.name
        wanted = {"options": asdict(options) | named, "policies": chosen, "sources": hashes}
        run = Run(out, source, options, chosen, wanted, how, progress)
        if not run.partial.exists() and (found := _find_finished(run)) is not None:
            return found
        make_folder(out)
        with nullcontext() if is_remote(out) else claimed(out):
            publish(out)  # what a killed run had begun to move
            # Look again: another process may have finished them before it released the folder.
            if (found := _find_finished(run)) is not None:
                return found
            try:
                return _repair(run) if how.repair else _write_all(run)
            finally:
                if not is_remote(out):
                    remove_temporaries(out / PARTIAL)
                    remove_folder(out / PLANNED)


def _choose_policies(out: Path, given: Mapping[str, str | None], overwrite: bool) -> dict[str, str]:
    """The given policies; else those of the shards already there, finished or begun; else the defaults."""
    there: Mapping[str, str] = {}
    if not overwrite:
        begun = read_unfinished(out / PARTIAL / STARTED) or {}
        there = read_manifest(out).policies if (out / NAME).exists() else begun.get("policies", {})
    return {name: given.get(name) or there.get(name, default) for name, default in POLICIES.items()}


def _find_finished(run: Run) -> RunSummary | None:
    """The summary of shards that are already there. Raises DataError where they differ or are not whole."""
    if run.how.overwrite or run.how.repair or not (run.out / NAME).exists():
        return None
    manifest = _read_same(run)
    for split in manifest.splits.values():
        for shard in split.shards:
            path = run.out / shard.file
            if not path.exists() or path.stat().st_size != shard.bytes:
                raise DataError(f"{path}: missing, or not of its size; `repair` writes it again")
    remove_folder(run.partial)
    restored: tuple[str, ...] = ()
    if manifest.rejects:
        task = PlanTask(run.out, run.source, run.options)
        restored = run_alone(find_restored, task, f"trying the rejects of {run.out} again")
    return RunSummary(manifest, False, restored=restored)


def _read_same(run: Run) -> Manifest:
    """The manifest in the folder. Raises DataError where its options, policies or CSVs are others."""
    manifest = read_manifest(run.out)
    _refuse_difference(run.out, {name: getattr(manifest, name) for name in run.wanted}, run.wanted)
    return manifest


def _refuse_difference(out: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for group, values in wanted.items():
        of_group = there.get(group, {})
        difference = describe_difference(of_group, values, sorted(values.keys() | of_group.keys()))
        if difference and group == "sources":
            name = difference.partition(" ")[0]
            # A split's name has no hyphen.
            difference = f"the file {name} differs" if "-" in name else f"the CSV of {name} differs"
        if difference:
            remedy = "choose another prefix" if is_remote(out) else "choose another folder or `overwrite`"
            raise DataError(f"{out} holds other shards: {difference}; {remedy}")


def _write_all(run: Run) -> RunSummary:
    """Plan, write what is not yet written, finish, and put it in its place."""
    plan = _plan(run)
    records = [(task, find_summary(task)) for task in run.list_tasks(plan)]
    finished = [summary for _, summary in records if summary is not None]
    resumed = sum(summary.samples for summary in finished)
    unfinished = [task for task, summary in records if summary is None]
    finished += _write_tasks(run, unfinished, resumed, sum(plan.rows.values()))
    manifest = run_alone(finish, run.finish_task(plan), f"writing the tables of {run.out}")
    if is_remote(run.out):
        remove_folder(run.partial)
    else:
        exchange(run.out, manifest)
    bytes_in = sum(summary.bytes_in for summary in finished)
    stripped = sum(summary.stripped for summary in finished)
    return RunSummary(manifest, True, bytes_in, stripped, resumed, plan.moved, plan.notes)


def _plan(run: Run) -> Plan:
    """Plan the shards, and check what can be checked, before existing files are touched."""
    out, partial, overwrite = run.out, run.partial, run.how.overwrite
    planned = partial if is_remote(out) else out / PLANNED
    before = read_unfinished(partial / STARTED)
    has_shards = any(path.suffix == ".tar" for path in list_files(run.work))
    if before is not None and has_shards and not overwrite:
        _refuse_difference(out, before, run.started)
    make_folder(planned)
    task = PlanTask(planned, run.source, run.options, run.policies if run.how.strict else None)
    plan = run_alone(write_plan, task, f"planning {out}")
    if before is None or not is_remote(out):
        refuse_others(out, planned, plan.rows)
    if overwrite:
        run_alone(try_images, task, f"trying some images for {out}")
    if planned != partial:
        if before != run.started:
            remove_folder(partial)
        make_folder(partial)
        for path in planned.iterdir():
            move_file(path, partial / path.name)
    write_json(partial / STARTED, run.started)
    return plan


def _write_tasks(run: Run, tasks: Sequence[ShardTask], resumed: int, total: int) -> list[ShardSummary]:
    """Write shards in processes or on a cluster. Raises DataError for more rejects than are allowed."""
    scheduler, max_bad = run.how.scheduler, run.how.max_bad
    done = 0
    rejects: list[Reject] = []

    def tick(items: int) -> None:
        run.progress(min(resumed + items, total), total, len(rejects))

    tick(0)
    if scheduler is None:
        results = run_tasks(write_shard, tasks, run.how.workers, tick)
    else:
        results = run_on_cluster(write_shard, tasks, scheduler, run.partial / STARTED)
    finished = []
    # Closed explicitly: when this raises, the workers must have ended before the caller goes on.
    with closing(results) as summaries:
        for summary in summaries:
            finished.append(summary)
            rejects += summary.rejects
            done += summary.samples + len(summary.rejects)
            if scheduler is not None:
                tick(done)
            if len(rejects) > max_bad * total:
                write_rejects(run.work, rejects)
                raise DataError(
                    f"{len(rejects)} of {total:,} images cannot be used, more than `max_bad` {max_bad:.2%}; "
                    f"{run.work / REJECTS} lists them; the first: {rejects[0].file}: {rejects[0].reason}"
                )
    run.progress(total, total, len(rejects))
    return finished


def _repair(run: Run) -> RunSummary:
    """Write missing or damaged files of finished shards again, to the same bytes.

    Raises DataError where the source no longer gives these bytes.
    """
    manifest = _read_same(run)
    expected = manifest.files()
    damaged = sorted(name for name in expected if not _is_intact(run.out / name, expected[name]))
    remove_folder(run.partial)
    if damaged:
        plan = _plan(run)
        # A table needs the records of all shards of its split.
        whole = [name for name, split in manifest.splits.items() if split.table in damaged]
        tasks = [task for task in run.list_tasks(plan) if task.split in whole or task.file in damaged]
        total = sum(plan.rows.values())  # the share of rejects is one of all images
        again = sum(len(read_planned(run.partial, task.split, task.number)) for task in tasks)
        _write_tasks(run, tasks, total - again, total)
        for split in whole:
            of = run.finish_task(plan)._replace(facts=frozenset(manifest.facts))
            run_alone(index_split, (of, split), f"writing the tables of {run.out}")
        for name in damaged:
            if not _is_intact(run.partial / name, expected[name]):
                raise DataError(
                    f"{run.out / name}: the source does not give the same bytes any more, so it cannot be repaired; "
                    "`overwrite` writes all shards again"
                )
        for name in damaged:
            move_file(run.partial / name, run.out / name)
        remove_folder(run.partial)
    return RunSummary(manifest, False, repaired=tuple(damaged))


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and hash_file(path) == sha256
