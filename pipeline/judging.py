"""Scores and labels from any source → an evaluation, with a check for shortcuts.

judged = judge(Path("scores.csv"), Path("Data_Entry_2017_v2020.csv"), Judging(columns=(("Edema", "prob_Edema"),)))
judged.evaluation.get("auroc", "Edema").value
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.base.options import option
from pipeline.identity import Note, ignore
from pipeline.labels import LABELS, NOT_ANNOTATED, find_unannotated, hash_fraction
from pipeline.manifest import NAME, find_blank, read_manifest
from pipeline.measure.evaluate import Beside, Scored, calibrate, judge_scores, leave_uncalibrated
from pipeline.measure.evaluation import Evaluation
from pipeline.measure.scores import Scores, name_files, open_scores
from pipeline.policies import evaluation_targets
from pipeline.sources.sets import load_tables
from pipeline.sources.table import parse_columns

HELD_OUT = 0.2  # of the patients of a table without splits, as dev


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How scores are judged: the options of `pipeline judge`."""

    columns: tuple[tuple[str, str], ...] = option(
        (),
        'Columns by other names: Edema=prob_Edema,key="Image Index".',
        split=partial(parse_columns, known=("key", "patient", "study", *LABELS)),
    )
    logits: bool = option(False, "The scores are logits.")
    split: str | None = option(None, "Split to judge.", shown="all")
    dev: str | None = option(
        None,
        "Split on which calibrations and thresholds are fitted; `dev` of a table alone is a fifth of its patients.",
        shown="neither",
    )
    threshold: float | None = option(None, "Your own threshold of the scores, without --dev.", low=0, high=1)
    sensitivity: float = option(0.9, "Sensitivity that the third threshold must reach on dev.", low=0, high=1)
    study: str = option("max", "How a study's score is computed from its views.", choices=("max", "mean"))
    open: str = option(
        "ignore",
        "Cells that a set leaves open: left out, or zeros, as in most published figures.",
        choices=("ignore", "zeros"),
    )
    against: tuple[Path, ...] = option((), "Compare with other scores of the same images.", metavar="SCORES")
    readers: tuple[Path, ...] = option((), "A reader's calls of 1, 0 or blank.", metavar="FILE")
    facts: tuple[Path, ...] = option((), "CSV or XLSX with extra columns to compare groups by.", metavar="FILE")


class Judged(NamedTuple):
    """An evaluation, and the scores that it evaluates."""

    evaluation: Evaluation
    images: Scored


def judge(scores: Path, source: Path, asked: Judging = Judging(), note: Note = ignore) -> Judged:
    """The evaluation of a file of scores against shards, a data set's folder, or its table alone.

    `note` is called with a sentence for rows that do not join, also kept in the head's `left_out`. Raises DataError
    for files that cannot be read, invalid scores, a source without any of their rows, and a judged dev.
    """
    if asked.dev is not None and asked.split in (None, asked.dev) and not source.is_file():
        raise DataError(f"`dev` {asked.dev} is to be judged, too; name another, or another `split` to judge")
    columns, blank, fill = dict(asked.columns), find_blank(source), asked.open == "zeros"
    left_out: list[str] = []

    def keep(text: str) -> None:
        left_out.append(text)
        note(text)

    opened = open_scores(scores, columns, logits=asked.logits).check()
    names, calibration = opened.labels, leave_uncalibrated(opened.labels, asked.threshold, asked.study)
    table = load_tables([source], asked.split, "all", asked.facts, keyed=True, note=note)
    images, table = join_scores(opened, table, blank, fill, keep)
    if asked.dev is not None:
        if source.is_file():
            if asked.dev != "dev":
                only = f"`dev` is {HELD_OUT:.0%} of the patients; give `dev` dev"
                raise DataError(f"{source}: one CSV without splits, in which {only}")
            patients, codes = np.unique(images.patient, return_inverse=True)
            chosen = np.array([hash_fraction("dev", patient) < HELD_OUT for patient in patients.tolist()])
            keep(f"{source.name}: {chosen.sum():,} of {len(patients):,} patients, by a hash of their names, are dev")
            is_dev = chosen[codes]
            dev, images, table = images.take(is_dev), images.take(~is_dev), table.filter(~is_dev)
        else:
            dev_table = load_tables([source], asked.dev, "all", asked.facts, keyed=True)
            dev, _ = join_scores(opened, dev_table, blank, fill, ignore)
        calibration = calibrate(names, dev, asked.sensitivity, asked.study)
    against, readers = {}, {}
    for name, path in name_files(asked.against).items():
        against[name] = open_scores(path, columns, logits=asked.logits).check().take_all(table, names)
    for name, path in name_files(asked.readers).items():
        calls = open_scores(path, calls=True)
        readers[name] = calls.take(calls.align(table, keep), names)
    evaluated = {"split": asked.split or "all", "unit": opened.unit, "labels": list(names), "left_out": left_out}
    beside = Beside(against, readers, edge=_measure_edges(source, asked.split, table))
    return Judged(judge_scores(evaluated, images, table, calibration, beside), images)


def join_scores(scores: Scores, table: pa.Table, blank: str, fill: bool, note: Note) -> tuple[Scored, pa.Table]:
    """The scores with truth and facts for the rows of a label table that have scores, and those rows.

    For studies, the first row of each. `fill` makes unannotated cells of labels that the table annotates negative.
    """
    if fill:
        for label in set(scores.labels) - set(find_unannotated(table)):
            filled = pc.if_else(pc.equal(table[label], NOT_ANNOTATED), pa.scalar(0, pa.int8()), table[label])
            table = table.set_column(table.column_names.index(label), label, filled)
    rows = scores.align(table, note)
    kept = np.flatnonzero(rows >= 0)
    if scores.unit == "study":
        kept = kept[np.sort(np.unique(rows[kept], return_index=True)[1])]
    table, columns = table.take(kept), [LABELS.index(name) for name in scores.labels]
    target, mask = evaluation_targets(table, blank)
    return Scored.of(scores.take(rows[kept], scores.labels), target[:, columns], mask[:, columns], table), table


def _measure_edges(source: Path, split: str | None, table: pa.Table) -> dict[str, Any]:
    """Gray levels outside the lungs of a split's images; empty if the source is not shards."""
    if split is None or not (source / NAME).is_file():
        return {}
    from pipeline.base.workers import count_cpus
    from pipeline.look.pixels import measure_edges
    from pipeline.stream.samples import open_split

    opened = open_split(source, read_manifest(source), split)
    rows = np.flatnonzero(pc.is_in(opened.table["key"], value_set=table["key"].combine_chunks()).to_numpy())
    return dict(measure_edges(opened, rows, count_cpus()))
