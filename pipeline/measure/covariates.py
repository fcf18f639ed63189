"""Label table → its covariates: what is known of a film that is not the disease.

Covariates are numbers, NaN where unknown; those that are the same in every row are left out. Strata are the same
facts as names, to compare films of one kind with each other.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.labels import name_ages
from pipeline.measure.metrics import Floats

# Columns of numbers, and what to call them.
NUMBERS = {
    "study": "study number",
    "age": "age",
    "width": "original width",
    "height": "original height",
    "bits": "bit depth",
    "jpeg_quality": "JPEG quality",
}
# Columns of names, and the two to tell apart; the covariate has the second one's name, and is 1 for it.
PAIRS = {"view": ("frontal", "lateral"), "projection": ("PA", "AP"), "sex": ("Female", "Male")}


def find_covariates(table: pa.Table) -> dict[str, Floats]:
    """Covariates [N] of a label table's rows, by their names in plain words."""
    found = {"patient number": _read_numbers(table["patient"])}
    for column, name in NUMBERS.items():
        if column in table.column_names:
            found[name] = pc.fill_null(table[column].cast(pa.float64()), np.nan).to_numpy()
    for column, pair in PAIRS.items():
        place = pc.index_in(table[column], value_set=pa.array(pair))
        found[pair[1]] = pc.fill_null(place.cast(pa.float64()), np.nan).to_numpy()
    for value in table["set"].unique().to_pylist() if "set" in table.column_names else ():
        found[f"set {value}"] = pc.equal(table["set"], value).cast(pa.float64()).to_numpy()
    return {name: value for name, value in found.items() if len(np.unique(value[~np.isnan(value)])) > 1}


def find_strata(table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    """Names [N] by variable, empty where unknown: projection, sex, age band and, of several sets, the set."""
    lateral = pc.equal(table["view"], "lateral")
    known = pc.is_in(table["sex"], pa.array(["Female", "Male"]))
    ages = name_ages(pc.fill_null(table["age"], -1).to_numpy())
    strata = {
        "projection": pc.if_else(lateral, "lateral", pc.fill_null(table["projection"], "")).to_numpy(),
        "sex": pc.if_else(known, table["sex"], "").to_numpy(),
        "age": np.where(ages == "unknown", "", ages),
    }
    if "set" in table.column_names:
        strata["set"] = table["set"].to_numpy()
    return {variable: names for variable, names in strata.items() if len(set(names.tolist()) - {""}) > 1}


def _read_numbers(patient: pa.ChunkedArray) -> Floats:
    """The number that each patient's name ends in; NaN for all where some name has none."""
    digits = pc.struct_field(pc.extract_regex(patient, r"(?P<number>\d{1,15})$"), "number")
    if digits.null_count:
        return np.full(len(patient), np.nan)
    numbers: Floats = digits.cast(pa.float64()).to_numpy()
    return numbers
