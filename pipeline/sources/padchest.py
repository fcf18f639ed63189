"""PadChest: PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv, and 16-bit PNGs at <ImageDir>/<ImageID>.

Bustos et al., PadChest: a large chest x-ray image dataset with multi-label annotated reports, Medical Image Analysis
2020 (arXiv:1901.07441): 160,861 images of 67,625 patients. Physicians labeled the reports of 39,053 images, a network
those of the others. `padchest` is the physicians' images alone; `padchest-all` is all of them, and makes other shards.

Labels are words of a tree (its appendix), in which a word includes those below it: laminar atelectasis is atelectasis.
Which words make a label follows the phrases of CheXpert's labeler. None speaks of suspicion, so nothing is uncertain.
BitsStored_DICOM gives the bits of a PNG (10 or 12); a PNG with higher levels has been scaled to 16.
"""

from dataclasses import replace

from pipeline.sources.source import Column, DataSet, read_terms

NAME = "is not a name of up to 80 characters"
PROJECTIONS = "PA, AP, AP_horizontal, L, COSTAL, EXCLUDE, UNK"
ALL = DataSet(
    read_terms("padchest"),
    tables={"train": ("PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv",)},
    columns={
        "ImageID": Column(r"(?P<key>[0-9A-Za-z_-]{1,90})\.png", "is not the name of a PNG"),
        "ImageDir": Column(r"(?P<folder>\d{1,4})", "is not a number"),
        "StudyDate_DICOM": Column(r"(?P<year>\d{4})\d{4}", "is not a date like 20140915"),
        "StudyID": Column(r"(?P<study_name>\S{1,80})", NAME),
        "PatientID": Column("(?P<patient>[0-9A-Za-z_-]{1,80})", NAME),
        "PatientBirth": Column(r"(?P<birth>\d{4})(?:\.0)?", "is not a year", optional=True),
        "PatientSex_DICOM": Column("(?P<letter>[MFO])", "is none of M, F, O", optional=True),
        "Projection": Column(f"(?P<position>{PROJECTIONS.replace(', ', '|')})", f"is none of {PROJECTIONS}"),
        "BitsStored_DICOM": Column("(?P<bits>[89]|1[0-6])", "is not a number of bits from 8 to 16"),
        "MethodLabel": Column("(?P<used>Physician|RNN_model)", "is neither Physician nor RNN_model"),
        # A Python list as text.
        "Labels": Column(r"\[(?:'(?P<findings>[^'\\]*(?:', '[^'\\]*)*)')?\]", "is not a list of words", optional=True),
    },
    templates={"path": "{folder}/{key}.png"},
    findings=("Labels", "', '"),
    places=(("", ""), ("images", "")),
)
# An image whose labels no physician has checked has an empty field.
PHYSICIANS = "(?P<used>Physician)|RNN_model"
SET = replace(ALL, columns=ALL.columns | {"MethodLabel": ALL.columns["MethodLabel"]._replace(pattern=PHYSICIANS)})
