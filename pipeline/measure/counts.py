"""Label table → counts of the four states per label: by group, jointly, under a policy; on whole columns."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.labels import LABELS, NOT_ANNOTATED, STATES, count_rows, label_states, name_ages, number_studies
from pipeline.policies import BEST_POLICY, RANGES, check_blank_policy, parse_uncertain_policy

# What to group by, and the name of the group of images for which it is unknown.
NO_GROUP = {"view": "unknown", "sex": "Unknown", "age": "unknown", "projection": "none"}
MOST_NUMBERS = 20  # distinct values, at most, of an integer fact to group by
# `images`, `studies`, `patients`, and `labels`: figures by label; and requested sections, by name.
Statistics = dict[str, Any]
Labels = dict[str, dict[str, Any]]  # by label, figures by name


def count_labels(table: pa.Table) -> Statistics:
    """Totals of a label table and, per label, the four states and the share of positives among annotated images.

    A label also has `not_annotated` images, if any label of the table does; the share is None if all are.
    """
    labels: Labels = {}
    for label in LABELS:
        counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(table[label]).to_pylist()}
        states = {state: counts.get(value, 0) for state, value in STATES.items()}
        share = round(states["positive"] / sum(states.values()), 4) if any(states.values()) else None
        labels[label] = states | {"not_annotated": counts.get(NOT_ANNOTATED, 0), "share_positive": share}
    if not any(counts["not_annotated"] for counts in labels.values()):
        for counts in labels.values():
            del counts["not_annotated"]
    images, studies, patients = count_rows(table).values()
    return {"images": images, "studies": studies, "patients": patients, "labels": labels}


def count_groups(table: pa.Table, variable: str) -> Statistics:
    """Counts per view, sex, age band, projection or value of a fact: only groups with images, the unknown last."""
    unknown = NO_GROUP.get(variable, "unknown")
    if variable == "age":
        names = pa.array(name_ages(pc.fill_null(table["age"], -1).to_numpy()))
    else:
        names = pc.fill_null(table[variable].cast(pa.string()), unknown)
    groups = pc.unique(names).to_pylist()
    numbers = pa.types.is_integer(table[variable].type) and variable != "age"
    groups.sort(key=lambda name: (name == unknown, int(name) if numbers and name != unknown else name))
    counts = {name: count_labels(table.filter(pc.equal(names, name))) for name in groups}
    return {"variable": variable, "groups": counts}


def list_rows(report: Statistics) -> list[list[object]]:
    """The counts under a header: a row per label, or per group and label if the report has groups."""
    groups = report["by"]["groups"] if "by" in report else {"": report}
    rows = [
        ({"group": group} if "by" in report else {}) | {"label": label, "not_annotated": 0} | counts
        for group, statistics in groups.items()
        for label, counts in statistics["labels"].items()
    ]
    return [[*rows[0]], *([*row.values()] for row in rows)]


def list_variables(table: pa.Table) -> list[str]:
    """What to group images by: NO_GROUP, and facts (further columns) that are text or whole numbers of few values."""
    known = {"patient", "study", *NO_GROUP, *LABELS}
    facts = {field.name: field.type for field in table.schema if field.name not in known}
    few = (
        name for name in facts if facts[name] == pa.string() or pc.count_distinct(table[name]).as_py() <= MOST_NUMBERS
    )
    return [*NO_GROUP, *few]


def count_cooccurrence(table: pa.Table) -> npt.NDArray[np.float64]:
    """Images in which two labels are positive [14, 14]; the diagonal holds each label's positives."""
    states, _ = label_states(table)
    positive = (states == 1).astype(np.float64)  # exact up to 2^53 images, and BLAS is far faster than int64
    together: npt.NDArray[np.float64] = positive.T @ positive
    return together


def parse_policies(text: str) -> tuple[dict[str, str], str]:
    """Uncertain policy per label, and blank policy, of `best,Edema=zeros,blank=ignore`. Raises DataError."""
    parts = [part.strip() for part in text.split(",")]
    blanks = [part.removeprefix("blank=") for part in parts if part.startswith("blank=")]
    rest = [part for part in parts if not part.startswith("blank=")]
    uncertain = parse_uncertain_policy(",".join(rest)) if rest else dict(BEST_POLICY)
    return uncertain, check_blank_policy(blanks[-1]) if blanks else "zeros"


def count_targets(labels: Labels, uncertain: Mapping[str, str], blank: str) -> Statistics:
    """Counts of the targets that `policies.make_targets` would make, from states alone; `open` cells have no class.

    A soft target counts as the nearer class, and in the mean as its expected value, the middle of its range.
    `pos_weight` is negatives / positives, in which a soft target counts partly for each, as in training (which caps it
    at 20); None if the label is left with one class.
    """
    targets: Labels = {}
    for label, counts in labels.items():
        positive, unsure, negative, blanks = (counts[state] for state in STATES)
        policy = uncertain[label]
        cells = [(1.0, positive), (0.0, negative), *([(0.0, blanks)] if blank == "zeros" else [])]
        if policy in RANGES:
            cells.append((sum(RANGES[policy]) / 2, unsure))
        positives = sum(number for target, number in cells if target >= 0.5)
        negatives = sum(number for target, number in cells if target < 0.5)
        used, total = positives + negatives, sum(target * number for target, number in cells)
        undecided = unsure if policy not in (*RANGES, "ignore") else 0
        everything = sum(counts[state] for state in STATES) + counts.get("not_annotated", 0)
        targets[label] = {
            "policy": policy,
            "positives": positives,
            "negatives": negatives,
            "open": undecided,
            "masked": everything - used - undecided,
            "mean_target": round(total / used, 4) if used else None,
            "pos_weight": round((used - total) / total, 4) if positives and negatives else None,
        }
    return {"blank": blank, "labels": targets}


def describe_views(table: pa.Table) -> str:
    """How many studies of a label table have which views, in words, most common first."""
    study, kinds = number_studies(table), {"frontal": "frontal", "lateral": "lateral", "other": "other view"}
    rows = [study[pc.equal(table["view"], view).to_numpy()] for view in kinds]
    counts = [np.bincount(numbers, minlength=study.max() + 1).tolist() for numbers in rows]
    texts = []
    for views, studies in Counter(zip(*counts, strict=True)).most_common():
        named = zip(views, kinds.values(), strict=True)
        names = " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for count, kind in named if count)
        texts.append(f"{studies:,} with {names}")
    return f"studies: {', '.join(texts)}"
