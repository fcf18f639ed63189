"""Label table → counts of the four states per label, and totals.

SOURCE may be a folder of shards, a CheXpert folder, or one CSV (`.csv` or `.csv.gz`).
"""

import csv
import io
import json
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import DataError
from pipeline.labels import LABELS, find_csvs, read_labels, select_views
from pipeline.manifest import NAME, read_manifest, read_table

STATES = {"positive": 1, "uncertain": -1, "negative": 0, "blank": None}


class Statistics(TypedDict):
    """Totals, and per label the four states and the share of positives among all images."""

    images: int
    studies: int
    patients: int
    labels: dict[str, dict[str, float]]


def load_table(source: Path, split: str | None, views: str) -> pa.Table:
    """The label table of a source: one split, or all of them one after the other.

    Raises DataError where the source, the split or the views do not exist.
    """
    if source.is_file():
        if split is not None:
            raise DataError(f"{source} is one CSV without splits; leave out --split")
        tables = [read_labels(source)]
    elif (source / NAME).is_file():
        manifest = read_manifest(source)
        names = manifest.splits if split is None else [split]
        tables = [read_table(source, manifest.split(name)) for name in names]
    else:
        csvs = find_csvs(source)
        if split is not None and split not in csvs:
            raise DataError(f"split '{split}' does not exist; {source} holds {', '.join(csvs)}")
        tables = [read_labels(csv) for name, csv in csvs.items() if split in (None, name)]
    columns = ["patient", "study", "view", *LABELS]
    table = select_views(pa.concat_tables([table.select(columns) for table in tables]), views)
    if table.num_rows == 0:
        raise DataError(f"{source}: no {views} images")
    return table


def count_labels(table: pa.Table) -> Statistics:
    """Counts of a label table (columns patient, study and the labels)."""
    studies = pa.TableGroupBy(table, ["patient", "study"]).aggregate([]).num_rows
    return {
        "images": table.num_rows,
        "studies": studies,
        "patients": pc.count_distinct(table["patient"]).as_py(),
        "labels": {label: _count_states(table[label]) for label in LABELS},
    }


def to_json(statistics: Statistics) -> str:
    """The statistics as a JSON document."""
    return json.dumps(statistics, indent=2)


def to_csv(statistics: Statistics) -> str:
    """One line per label, under a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", *STATES, "share_positive"])
    for label, counts in statistics["labels"].items():
        writer.writerow([label, *counts.values()])
    return text.getvalue().rstrip("\n")


def _count_states(column: pa.ChunkedArray) -> dict[str, float]:
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}
    states = {state: counts.get(value, 0) for state, value in STATES.items()}
    return states | {"share_positive": round(states["positive"] / len(column), 4)}
