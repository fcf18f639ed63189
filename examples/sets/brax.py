"""BRAX 1.1.0: master_spreadsheet_update.csv, and 8-bit PNGs at its PngPath.

Reis et al., BRAX, Brazilian labeled chest X-ray dataset, Scientific Data 2022: 40,967 images; CheXpert's 14 labels, by
its labeler on reports in Portuguese. There are no official splits: all is train, of which dev is held out.
"""

from pipeline.sources.source import AGE, Column, DataSet, Terms

LICENSE = "PhysioNet Credentialed Health Data License"
NAME = "is not a name without spaces, of up to 64 characters"
SET = DataSet(
    Terms("brax", "BRAX", "brax", LICENSE, "Reis et al., Scientific Data 2022"),
    tables={"train": ("master_spreadsheet_update.csv",)},
    columns={
        "PngPath": Column(r"(?P<path>(?:[\w-][\w.-]*/)+[\w-][\w.-]*\.png)", "is not a path below SOURCE to a PNG"),
        "PatientID": Column(r"(?P<patient>\S{1,64})", NAME),
        "PatientSex": Column("(?P<letter>[MFO])", "is none of M, F, O"),
        "PatientAge": AGE._replace(optional=True),
        "AccessionNumber": Column(r"(?P<study_name>\S{1,64})", NAME),
        # Views that are not AP, PA, LL or RL are oblique or decubitus: RLD, LLD, RLO, LLO.
        "ViewPosition": Column("(?P<position>.*)", "", optional=True),
    },
)
