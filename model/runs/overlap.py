"""What a run trained on ↔ `trained-on.arrow`, to notice patients and images that it is evaluated on as well.

An Arrow IPC file with one row per image of train and dev that the run used:
    split    string  train, or dev, on which its checkpoint and thresholds are chosen
    crc      uint32  of the image as stored in the shards
    length   int32   bytes of the same
    patient  uint64  first 8 bytes of sha256(the manifest's sha256 + `namespace/id`)
The hash keeps names out of the file. It is no secret: who has the run can try all patient numbers.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from model.runs.config import read_config
from model.runs.job import Job, Selected, open_images
from pipeline.base.errors import DataError
from pipeline.base.files import read_arrow, write_table
from pipeline.console import say
from pipeline.identity import join_content, name_patients

TRAINED_ON = "trained-on.arrow"
SCHEMA = pa.schema({"split": pa.string(), "crc": pa.uint32(), "length": pa.int32(), "patient": pa.uint64()})


class Shared(NamedTuple):
    """How many patients and images of a table a run trained on."""

    patients: int
    images: int


def write_trained_on(job: Job, selected: Iterable[tuple[str, Selected]]) -> None:
    """Write the file of the rows that a run uses of the named splits, atomically."""
    tables = []
    for name, chosen in selected:
        table = chosen.split.table.take(chosen.images)
        columns = {
            "split": pa.array([name] * table.num_rows, pa.string()),
            "crc": table["crc"],
            "length": table["length"],
            "patient": _hash_patients(
                name_patients(table["patient"], job.shards.namespace), job.config.manifest
            ),
        }
        tables.append(pa.table(columns, schema=SCHEMA))
    write_table(job.run / TRAINED_ON, pa.concat_tables(tables))


def count_shared(
    run: Path, table: pa.Table, namespace: str, splits: Iterable[str] = ("train", "dev")
) -> Shared:
    """The patients and images in rows of a split's table that the run used in its own `splits`.

    `namespace` is that of the table's patients, as `Collection` has it. Raises DataError where the run's file is
    missing or damaged.
    """
    path = run / TRAINED_ON
    again = "the command that trained the run writes it again"
    if not path.exists():
        raise DataError(f"{path}: missing; {again}")
    used = read_arrow(path, path.read_bytes())
    if used.schema != SCHEMA or any(column.null_count for column in used.columns):
        raise DataError(f"{path}: damaged; {again}")
    names = name_patients(table["patient"], namespace)
    used = used.filter(pc.is_in(used["split"], pa.array(list(splits), pa.string())))
    patients = _hash_patients(names, read_config(run).manifest).unique()
    images = pc.is_in(join_content(table), value_set=join_content(used))
    return Shared(
        patients=pc.sum(pc.is_in(patients, value_set=used["patient"].combine_chunks())).as_py() or 0,
        images=pc.sum(images).as_py() or 0,
    )


def check_evaluation(job: Job, name: str, against: Iterable[Path], shared_images: bool) -> dict[str, int]:
    """Check a split against what the run, and those it is compared with, trained on, if that is other shards.

    Returns `shared_patients` and `shared_images` of the run itself, and nothing on its own shards.
    Warns of shared patients. Raises DataError for shared images, unless `shared_images` allows them.
    """
    digest, found = job.shards.digest, {}
    split, rows = open_images(job, name)
    table = split.table.take(rows)
    ours = [member.job.run for member in job.members] or [job.run]
    for run in dict.fromkeys((*ours, *against)):
        if read_config(run).manifest == digest:
            continue
        shared = count_shared(run, table, job.shards.namespace)
        report_shared(run, f"{job.shards}, {name}", shared, table.num_rows, allowed=shared_images)
        if run == ours[0]:  # members have the same shards
            found = {"shared_patients": shared.patients, "shared_images": shared.images}
    return found


def check_teacher(job: Job, teacher: Path) -> None:
    """Check a student's dev and valid against the train of its teacher, whose scores would give them away.

    On the same shards too: a dev held out by another seed is in the teacher's train. Warns of shared patients.
    Raises DataError for shared images.
    """
    for name in ("dev", "valid"):
        if name == "valid" and name not in job.manifest.splits:
            continue
        split, rows = open_images(job, name)
        table = split.table.take(rows)
        shared = count_shared(teacher, table, job.shards.namespace, ["train"])
        if job.ranks.is_first or shared.images:
            report_shared(teacher, f"{job.shards}, {name}", shared, table.num_rows)


def report_shared(run: Path, what: str, shared: Shared, images: int, allowed: bool | None = None) -> None:
    """Warn of patients in `what` that a run trained on. Raises DataError for images, unless they are `allowed`.

    `allowed` is None where no option can allow them.
    """
    if shared.images:
        text = f"{what}: {run} trained on {shared.images:,} of these {images:,} images"
        if allowed is None:
            raise DataError(f"{text}; train with the teacher's own split, or take another teacher")
        if not allowed:
            raise DataError(f"{text}; evaluate on others, or go on with `shared_images`")
        say(f"{text}: its scores of them are too good")
    if shared.patients:
        say(
            f"{what}: {shared.patients:,} patient names are among those that {run} trained on: if they are the same "
            "people, figures are too good"
        )


def _hash_patients(names: pa.Array, digest: str) -> pa.Array:
    """The hash of each patient, uint64 [N]."""
    patients = names.dictionary_encode()
    hashes = [
        int.from_bytes(hashlib.sha256(f"{digest}{name}".encode()).digest()[:8])
        for name in patients.dictionary.to_pylist()
    ]
    return pa.array(hashes, pa.uint64()).take(patients.indices)
