"""What is known of a film that is not the disease, as numbers and as strata."""

import numpy as np
import pyarrow as pa

from pipeline.measure.audit import find_covariates, find_strata

FILMS = {
    "patient": ["nih/patient00012", "patient3", "patient00100"],
    "study": [1, 1, 1],
    "view": ["frontal", "lateral", "frontal"],
    "sex": ["Male", "Female", "Unknown"],
    "age": pa.array([17, None, 64], pa.int16()),
    "projection": ["AP", None, "PA"],
    "width": pa.array([2000, None, 1024], pa.int32()),
    "set": ["chexpert", "nih", "nih"],
}


def test_covariates_are_numbers_and_constant_ones_are_left_out() -> None:
    found = find_covariates(pa.table(FILMS))
    expected = {
        "patient number": [12, 3, 100],
        "age": [17, np.nan, 64],
        "original width": [2000, np.nan, 1024],
        "lateral": [0, 1, 0],
        "AP": [1, np.nan, 0],
        "Male": [1, 0, np.nan],
        "set chexpert": [1, 0, 0],
        "set nih": [0, 1, 1],
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_names_without_a_number_are_no_covariate() -> None:
    assert "patient number" not in find_covariates(pa.table(FILMS | {"patient": ["a", "b", "c7"]}))


def test_strata_are_named_and_unknown_ones_empty() -> None:
    found = {variable: names.tolist() for variable, names in find_strata(pa.table(FILMS)).items()}
    assert found == {
        "projection": ["AP", "lateral", "PA"],
        "sex": ["Male", "Female", ""],
        "age": ["0-17", "", "60-79"],
        "set": ["chexpert", "nih", "nih"],
    }
