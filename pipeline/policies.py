"""Raw label states → targets and masks, by a policy for uncertain and one for blank cells.

Policies: Irvin et al., "CheXpert", AAAI 2019, Table 3; smoothing: Pham et al., 2019 (arXiv:1911.06475).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import labels
from pipeline.base.errors import DataError
from pipeline.labels import LABELS

# The lowest and highest target that each gives an uncertain cell, on one side of 0.5; the mean is their middle.
RANGES = {"zeros": (0.0, 0.0), "ones": (1.0, 1.0), "smooth-zeros": (0.0, 0.3), "smooth-ones": (0.55, 0.85)}
UNCERTAIN_POLICIES = (*RANGES, "ignore", "multiclass", "selftrained")
BLANK_POLICIES = ("zeros", "ignore")
UNCERTAIN_HELP = f"Policy for -1: best, {', '.join(UNCERTAIN_POLICIES)}; per label: best,Edema=zeros."
BLANK_HELP = f"Policy for blanks: {' or '.join(BLANK_POLICIES)}."
# How often radiologists call an uncertain report positive decides (500 test studies): Atelectasis .54,
# Edema .52, Pleural Effusion .29, Consolidation .03.
BEST_POLICY = dict.fromkeys(LABELS, "zeros") | dict.fromkeys(("Atelectasis", "Edema"), "ones")
BEST_POLICY |= {"Pleural Effusion": "smooth-ones"}
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


def parse_uncertain_policy(text: str) -> dict[str, str]:
    """One policy per label, from `ones` or `best,Edema=zeros`. Raises DataError for an unknown policy or label."""
    default, *overrides = (part.strip() for part in text.split(","))
    if default != "best" and default not in UNCERTAIN_POLICIES:
        raise DataError(f"uncertain policy '{default}' is unknown; choose from best, {', '.join(UNCERTAIN_POLICIES)}")
    policy = dict(BEST_POLICY) if default == "best" else dict.fromkeys(LABELS, default)
    for override in overrides:
        name, _, value = override.partition("=")
        label = labels.find_label(name)
        if label is None:
            raise DataError(f"uncertain policy '{override}': {labels.describe_unknown(name, LABELS)}")
        if value not in UNCERTAIN_POLICIES:
            raise DataError(f"uncertain policy '{override}': choose from {', '.join(UNCERTAIN_POLICIES)}")
        policy[label] = value
    return policy


def choose_policy(kind: str, given: str | None, defaults: Mapping[str, str]) -> str:
    """The given policy for `kind` of cells, or the shards' default. Raises DataError if their folders' differ."""
    if not (given or defaults[kind]):
        raise DataError(f"`{kind}`: the folders of shards have different policies; give one")
    return given or defaults[kind]


def check_blank_policy(text: str) -> str:
    """The policy. Raises DataError if it is unknown."""
    if text not in BLANK_POLICIES:
        raise DataError(f"blank policy '{text}' is unknown; choose from {', '.join(BLANK_POLICIES)}")
    return text


def make_targets(
    table: pa.Table, uncertain: Mapping[str, str], blank: str, seed: int, teacher: Floats | None = None
) -> tuple[Floats, Bools]:
    """Training targets [N, 14] in [0, 1] and masks [N, 14] (False: the cell does not enter the loss).

    `uncertain` holds a policy per label. A smoothing draw is a pure function of (seed, key, label). An uncertain cell
    stays -1 under `multiclass`, which names its class, and becomes its score in `teacher` [N, 14] under `selftrained`;
    raises DataError without a teacher. Cells that are not annotated are masked under every policy.
    """
    states, is_blank = labels.label_states(table)
    mask = states != labels.NOT_ANNOTATED
    target = np.where(mask, states, 0).astype(np.float32)
    if blank == "ignore":
        mask &= ~is_blank
    for column, label in enumerate(LABELS):
        policy = uncertain[label]
        rows = np.flatnonzero(states[:, column] == -1)
        if policy in RANGES:
            low, high = RANGES[policy]
            target[rows, column] = low
            if high > low:
                keys = table["key"].take(rows).to_pylist()
                draws = np.array([labels.hash_fraction("smooth", seed, key, label) for key in keys])
                target[rows, column] = low + (high - low) * draws
        elif policy == "selftrained":
            if teacher is None:
                raise DataError(f"label {label} is selftrained: it needs a `teacher`, a run that was scored on train")
            target[rows, column] = teacher[rows, column]
        elif policy == "ignore":
            target[rows, column], mask[rows, column] = 0, False
    return target, mask


def divide_cells(target: Floats, mask: Bools) -> tuple[Bools, Bools]:
    """Positive and negative cells: a soft target counts as the nearer class, -1 (of `multiclass`) as neither."""
    return mask & (target >= 0.5), mask & (target >= 0) & (target < 0.5)


def describe_one_class(target: Floats, mask: Bools) -> dict[str, str]:
    """The labels that lack one of two classes among the cells of mask [N, 14], each with a text for messages."""
    counts = zip(LABELS, *(cells.sum(axis=0).tolist() for cells in divide_cells(target, mask)), strict=True)
    return {
        label: f"label {label} has {positives} positives and {negatives} negatives in train"
        for label, positives, negatives in counts
        if not (positives and negatives)
    }


def find_one_class(table: pa.Table, policies: Mapping[str, str]) -> list[str]:
    """A text for each label that the policies of some shards leave with one class in a label table."""
    # A teacher's scores come later: the cells that they will fill are left out here.
    uncertain = parse_uncertain_policy(policies["uncertain"])
    uncertain = {label: policy.replace("selftrained", "ignore") for label, policy in uncertain.items()}
    # Any seed: each smoothing range lies on one side of 0.5.
    lacking = describe_one_class(*make_targets(table, uncertain, policies["blank"], seed=0))
    unannotated = labels.find_unannotated(table)  # no policy helps those
    return [text for label, text in lacking.items() if label not in unannotated]


def evaluation_targets(table: pa.Table, blank: str) -> tuple[Floats, Bools]:
    """Targets [N, 14] in {0, 1} and masks [N, 14] for metrics: uncertain cells are left out, whatever the policies."""
    return make_targets(table, dict.fromkeys(LABELS, "ignore"), blank, seed=0)
