"""BRAX 1.1.0: master_spreadsheet_update.csv, and 8-bit PNGs at its PngPath.

Reis et al., BRAX, Brazilian labeled chest X-ray dataset, Scientific Data 2022: 40,967 images; CheXpert's 14 labels, by
its labeler on reports in Portuguese. There are no official splits: all is train, of which dev is held out.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand_cells, demand_unique, read_strings
from pipeline.labels import LABELS, parse_states
from pipeline.sources.source import DataSet, Terms, find_train, make_table, number_studies

TABLE = "master_spreadsheet_update.csv"
CHECKS = {
    "PngPath": (r"^(?:[\w-][\w.-]*/)+[\w-][\w.-]*\.png$", "is not a path below SOURCE to a PNG"),
    "PatientID": (r"^\S{1,64}$", "is not a name without spaces, of up to 64 characters"),
    "PatientSex": ("^[MFO]$", "is none of M, F, O"),
    "PatientAge": (r"^(\d{1,3}|85 or more)$", "is neither a number of years nor `85 or more`"),
    "AccessionNumber": (r"^\S{1,64}$", "is not a name without spaces, of up to 64 characters"),
}
SEXES = {"M": "Male", "F": "Female", "O": "Other"}
# The other views are oblique or decubitus: RLD, LLD, RLO, LLO.
VIEWS = {"AP": "frontal", "PA": "frontal", "LL": "lateral", "RL": "lateral"}


def read_table(csv: Path) -> pa.Table:
    text = read_strings(csv, (*CHECKS, "ViewPosition", *LABELS))
    demand_cells(csv, text, CHECKS, optional=("PatientAge",))
    view = text["ViewPosition"].to_pylist()
    name = pc.replace_substring_regex(text["PngPath"], r"^.*/|\.png$", "")
    key = pc.replace_substring_regex(name, r"\.", "_")  # a dot ends the key of a tar's member
    demand_unique(csv, key.combine_chunks())
    return make_table(
        {label: parse_states(csv, label, text[label]) for label in LABELS},
        path=text["PngPath"],
        key=key,
        patient=text["PatientID"],
        study=number_studies(text["PatientID"], text["AccessionNumber"]),
        view=[VIEWS.get(name, "other") for name in view],
        sex=[SEXES[sex] for sex in text["PatientSex"].to_pylist()],
        age=pc.replace_substring(text["PatientAge"], " or more", ""),
        projection=[name if VIEWS.get(name) == "frontal" else None for name in view],
    )


SET = DataSet(
    Terms(
        name="brax",
        title="BRAX",
        patients="brax",
        license="PhysioNet Credentialed Health Data License",
        paper="Reis et al., Scientific Data 2022",
    ),
    files=f"a {TABLE}",
    find_tables=find_train(TABLE),
    read_table=read_table,
    column="PngPath",
    numbers_studies=True,
)
