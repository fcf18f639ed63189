"""The labels, views and patients of a label table, which `pipeline.sources` reads from a dataset.

An Arrow table with one row per image:
    path             string  <folders>/<patient>/<study>/<view file>: never absolute, no `..`
    key, patient     string  `patient00001_study1_view1_frontal`, unique; `patient00001`
    study            int32   number of the study within the patient
    view             string  `frontal` or `lateral` (by the column Frontal/Lateral, never AP/PA); `other` in some sets
    sex, age         string, int16 (years)
    projection       string  AP, PA, LL, RL; null on laterals
    <14 labels>      int8    1 positive, 0 negative, -1 uncertain, null blank (not mentioned), -2 not annotated: nobody
                             looked for it; `policies` turns these raw states into targets
"""

import hashlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError

PROJECTIONS = ("AP", "PA", "lateral", "other")  # a projection's code is its index in this list
# The view for each ViewPosition, in DICOM files and in tables made from them; PadChest writes AP_horizontal and L.
POSITIONS = dict.fromkeys(("AP", "PA", "AP_horizontal"), "frontal")
POSITIONS |= dict.fromkeys(("LATERAL", "LL", "RL", "L"), "lateral")
MOST_VIEWS = 3  # of a study, as in CheXpert
# Lower bounds, in years.
AGE_BANDS = {"unknown": -1, "0-17": 0, "18-39": 18, "40-59": 40, "60-79": 60, "80+": 80}
STATES = {"positive": 1, "uncertain": -1, "negative": 0, "blank": None}
NOT_ANNOTATED = -2  # the state of a cell that a data set does not annotate
LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
FACTS = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
COLUMNS = ("Path", *FACTS, *LABELS)
VIEWS = ("frontal", "lateral", "all")


def select_views(table: pa.Table, views: str) -> pa.Table:
    """The rows of `frontal`, `lateral` or `all` views."""
    return table if views == "all" else table.filter(pc.equal(table["view"], views))


def study_names(table: pa.Table) -> pa.ChunkedArray:
    """`patient00001_study1` of each row: a study's number is unique only within its patient."""
    return pc.binary_join_element_wise(table["patient"], table["study"].cast(pa.string()), "_study")


def hash_fraction(*parts: object) -> float:
    """A number in [0, 1) that depends only on the parts: the same on every machine and in every version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    # The top 53 bits, as a float64 holds them exactly: rounding 64 bits could give 1.0.
    return (int.from_bytes(digest) >> 11) / 2**53


def split_patients(table: pa.Table, dev: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """(train, dev): a patient is in dev if the hash of (seed, patient) falls below the fraction `dev`."""
    # By a hash, as CheXpert's patient ids are ordered: projection and prevalence drift with them.
    patients = table["patient"].combine_chunks().dictionary_encode()
    chosen = [hash_fraction("dev", seed, patient) < dev for patient in patients.dictionary.to_pylist()]
    in_dev = pa.array(chosen, pa.bool_()).take(patients.indices)
    return table.filter(pc.invert(in_dev)), table.filter(in_dev)


def label_states(table: pa.Table) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
    """States [N, 14] (1, 0, -1, NOT_ANNOTATED; 0 if blank) and whether each cell is blank [N, 14]."""
    states = [pc.fill_null(table[label], 0).to_numpy() for label in LABELS]
    return np.stack(states, axis=1), np.stack([table[label].is_null().to_numpy() for label in LABELS], axis=1)


def find_unannotated(table: pa.Table) -> list[str]:
    """The labels that are not annotated in any row of a table."""
    return [label for label in LABELS if pc.all(pc.fill_null(pc.equal(table[label], NOT_ANNOTATED), False)).as_py()]


def find_label(name: str) -> str | None:
    """The label of that name in any case; None if there is none."""
    return {label.casefold(): label for label in LABELS}.get(name.casefold())


def suggest(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelled or shortened one may mean; "" if none is near."""
    folded = {item.casefold().replace(" ", ""): item for item in known}
    return next((folded[near] for near in get_close_matches(name.casefold().replace(" ", ""), folded, 1)), "")


def describe_unknown(name: str, known: Sequence[str]) -> str:
    """The error for a name that is not known, with the one that was meant."""
    near = suggest(name, known)
    return f"'{name}' is none of {', '.join(known)}" + (f"; did you mean {near}?" if near else "")


def parse_labels(text: str) -> tuple[str, ...]:
    """Names of labels in any case, separated by commas; in the order of LABELS. Raises DataError for another name."""
    names = [find_label(name.strip()) or name.strip() for name in text.split(",")]
    for name in names:
        if name not in LABELS:
            raise DataError(describe_unknown(name, LABELS))
    return tuple(label for label in LABELS if label in names)


def name_ages(years: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.str_]:
    """The AGE_BANDS [N] of ages [N], of which -1 is unknown."""
    bands: npt.NDArray[np.str_] = np.array(list(AGE_BANDS))[np.digitize(years, list(AGE_BANDS.values())) - 1]
    return bands


def count_rows(table: pa.Table) -> dict[str, int]:
    """The numbers of samples, studies and patients, under their names in the manifest."""
    return {
        "samples": table.num_rows,
        "studies": pc.count_distinct(study_names(table)).as_py(),
        "patients": pc.count_distinct(table["patient"]).as_py(),
    }


def limit_patients(table: pa.Table, limit: int, seed: int) -> pa.Table:
    """Complete patients in the order of a hash, up to `limit` images; at least one patient."""
    patients = table["patient"].combine_chunks().dictionary_encode()
    rows = patients.indices.to_numpy()
    draws = [hash_fraction("limit", seed, patient) for patient in patients.dictionary.to_pylist()]
    order = np.argsort(draws)
    fits = np.cumsum(np.bincount(rows)[order]) <= limit
    fits[:1] = True
    return table.filter(pa.array(np.isin(rows, order[fits])))


def number_studies(table: pa.Table) -> npt.NDArray[np.int64]:
    """The number [N] of each row's study, from 0 in the order of first occurrence."""
    names = study_names(table).combine_chunks()
    numbers: npt.NDArray[np.int64] = names.dictionary_encode().indices.to_numpy()
    return numbers.astype(np.int64)
