"""Small data sets of drawn films, each in its true layout: its files, its columns, and its quirks.

A function a set, which writes it into a folder that does not exist yet. Facts: docs/data.md.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.labels import LABELS
from pipeline.manifest import read_manifest, read_table
from pipeline.synthetic.sample import write_sample
from tests.conftest import run_pipeline
from tests.films import make_film

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NIH_ROWS = (
    ("00000001_000.png", "Cardiomegaly|Emphysema", 0, 57, "M", "PA"),
    ("00000001_001.png", "Nodule", 1, 58, "M", "AP"),
    ("00000002_000.png", "No Finding", 0, 80, "F", "PA"),
    ("00000003_000.png", "Infiltration|Mass", 0, 74, "F", "PA"),
    ("00000004_000.png", "Pleural_Thickening|Effusion", 0, 8, "F", "AP"),
    ("00000005_000.png", "Pneumonia", 0, 33, "M", "AP"),
)
NIH_TEST = 2  # the last rows are in the test list
# subject, study, image, view, split, labels
MIMIC_IMAGES = (
    (10000032, 50414267, "02aa804e-bde0afdd", "PA", "train", {"No Finding": "1.0"}),
    (10000032, 50414267, "174413ec-4ec4c1f7", "LATERAL", "train", {"No Finding": "1.0"}),
    (10000033, 53189527, "2a2277a9-b0ded155", "AP", "train", {"Edema": "-1.0", "Fracture": "0.0"}),
    # A study without labels, a view without a name.
    (10000034, 53911762, "68b5c4b1-227d0485", "", "train", None),
    (10000764, 57375967, "096052b7-d256dc40", "AP", "validate", {"Pleural Effusion": "1.0"}),
    (10000898, 50771383, "2a280266-c8bae121", "LL", "test", {"Lung Opacity": "1.0", "Edema": "1.0"}),
    (10000935, 51178377, "9b314ad7-fbcb0422", "PA", "test", {"Edema": "0.0"}),
    (10000980, 50985099, "6ad03ed1-97ee17ee", "AP", "train", {"Cardiomegaly": "1.0"}),
)
PLUS_TABLE = "df_chexpert_plus_240401.csv"
PLUS_FILMS = (
    "train/patient00001/study1/view1_frontal",
    "train/patient00001/study1/view2_lateral",
    "train/patient00002/study1/view1_frontal",
    "valid/patient64541/study1/view1_frontal",
    "train/patient00003/study1/view1_frontal",
    "train/patient00004/study1/view1_frontal",
)
PLUS_HEADER = (
    "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,report,"
    "section_narrative,section_clinical_history,section_history,section_comparison,section_technique,"
    "section_procedure_comments,section_findings,section_impression,section_end_of_impression,section_summary,"
    "section_accession_number,age,sex,race,ethnicity,interpreter_needed,insurance_type,recent_bmi,deceased,split"
)
PADCHEST_HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
    "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,"
    "WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,"
    "labelCUIS,LocalizationsCUIS"
)
# image, folder, date, study, patient, birth, sex, projection, bits, method, labels
PADCHEST_WANTED = (
    "ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,Projection,BitsStored_DICOM,"
    "MethodLabel,Labels"
)
PADCHEST_ROWS = [
    line.split("; ")
    for line in """2053_k6ga29.png; 0; 20140915; 2053; 8398; 1930.0; F; PA; 12; Physician; ['normal']
2053_0hys1a.png; 0; 20140915; 2053; 8398; 1930.0; F; L; 12; Physician; ['normal']
313-2_75sg0k.png; 11; 20170125; 313-2; 3707; 1978.0; M; AP; 12; Physician; ['unchanged', 'alveolar pattern']
31_km0qf9.png; 0; 20150804; 31; 9353; 1957.0; M; AP_horizontal; 10; Physician; ['laminar atelectasis', \
' pleural effusion', 'sternotomy', '']
32_a.png; 54; 20150805; 32; 9354; nan; nan; PA; 12; Physician; ['cardiomegaly', 'costophrenic angle blunting', \
'NSG tube', 'scoliosis']
33_a.png; 54; 20150805; 33; 9355; 1990.0; O; COSTAL; 12; Physician; ['rib fracture']
34_a.png; 54; 20150805; 34; 9356; 1991.0; M; PA; 12; RNN_model; ['nodule', 'unchanged']
35_a.png; 54; 20150805; 35; 9357; 1992.0; F; PA; 12; RNN_model; """.splitlines()
]
VINDR_NAMES = (
    "Aortic enlargement|Atelectasis|Calcification|Cardiomegaly|Clavicle fracture|Consolidation|Edema|Emphysema|"
    "Enlarged PA|ILD|Infiltration|Lung Opacity|Lung cavity|Lung cyst|Mediastinal shift|Nodule/Mass|Pleural effusion|"
    "Pleural thickening|Pneumothorax|Pulmonary fibrosis|Rib fracture|Other lesion|COPD|Lung tumor|Pneumonia|"
    "Tuberculosis|Other diseases|No finding"
)
VINDR_CLASSES = VINDR_NAMES.split("|")
# What each reader of a film finds: three in train, one consensus in test.
VINDR_TRAIN = (
    (("Cardiomegaly", "Rib fracture"), ("Cardiomegaly",), ("Aortic enlargement",)),
    (("No finding",), ("No finding",), ("Nodule/Mass",)),
    (("Infiltration",), ("Lung Opacity",), ("No finding",)),
    (("No finding",), ("No finding",), ("No finding",)),
)
VINDR_TEST = (("Pleural effusion", "Edema"), ("No finding",))


def draw(path: Path, number: int, *, bits: int = 8, kind: str | None = None, mode: str = "L") -> None:
    """A film of 64×64 smooth noise, of 8 bits, or of some of 16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6), dtype=np.uint8)
    film = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
    deep = np.asarray(film).astype(np.uint16) << (bits - 8)
    if kind == "DICOM":
        path.write_bytes(make_film(deep, BitsStored=bits, HighBit=bits - 1))
        return
    (Image.fromarray(deep) if bits > 8 else film.convert(mode)).save(path, kind)


def shard(folder: Path, *options: object) -> dict[str, dict[str, Any]]:
    """Key → row, with its split, of the shards of all views in `out` beside a folder."""
    out = folder.parent / "out"
    words = ("--size", 32, "--views", "all", "--dev", 0, "--workers", 1, *options)
    made = run_pipeline("shards", folder, out, *words)
    assert made.returncode == 0, made.stderr
    assert run_pipeline("verify", out, "--deep").returncode == 0
    tables = {name: read_table(out, split) for name, split in read_manifest(out).splits.items()}
    return {row["key"]: row | {"split": name} for name, table in tables.items() for row in table.to_pylist()}


def write_gzip(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A gzipped CSV, with the columns of the first row."""
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def write_chexpert(home: Path) -> None:
    """CheXpert: train.csv and valid.csv, JPEGs by patient, study and view."""
    write_sample(home, images=24, workers=1)
    for note in home.rglob("SYNTHETIC.txt"):  # by which shards of drawn films are told
        note.unlink()


def write_nih(home: Path) -> None:
    """NIH ChestX-ray14: the table, the lists, and the images in two of twelve folders, one of them in color."""
    home.mkdir()
    cells = [(*row[:3], int(row[0][:8]), *row[3:], 2500, 2048, 0.168, 0.168) for row in NIH_ROWS]
    lines = [NIH_HEADER, *(",".join(map(str, row)) for row in cells)]
    (home / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")
    names = [row[0] for row in NIH_ROWS]
    (home / "train_val_list.txt").write_text("\n".join(names[:-NIH_TEST]))
    (home / "test_list.txt").write_text("\n".join(names[-NIH_TEST:]) + "\n")
    for number, name in enumerate(names):
        path = home / f"images_{1 + number % 2:03d}" / "images" / name
        draw(path, number, mode="RGBA" if number == 0 else "L")


def write_mimic(home: Path) -> None:
    """MIMIC-CXR-JPG: gzipped tables in different orders, labels by study in alphabetical order."""
    home.mkdir()
    identity = [{"dicom_id": image[2], "study_id": image[1], "subject_id": image[0]} for image in MIMIC_IMAGES]
    splits = [row | {"split": image[4]} for row, image in zip(identity, MIMIC_IMAGES, strict=True)]
    write_gzip(home / "mimic-cxr-2.0.0-split.csv.gz", splits)
    views = [row | {"ViewPosition": image[3]} for row, image in zip(identity, MIMIC_IMAGES, strict=True)]
    write_gzip(home / "mimic-cxr-2.0.0-metadata.csv.gz", views[::-1])
    studies = {image[1]: image for image in MIMIC_IMAGES if image[5] is not None}
    labels = [
        {"subject_id": image[0], "study_id": image[1]} | {label: image[5].get(label, "") for label in sorted(LABELS)}
        for image in studies.values()
        if image[5] is not None
    ]
    write_gzip(home / "mimic-cxr-2.0.0-chexpert.csv.gz", labels)
    for number, (subject, study, dicom, *_) in enumerate(MIMIC_IMAGES):
        draw(home / "files" / f"p{subject}"[:3] / f"p{subject}" / f"s{study}" / f"{dicom}.jpg", number, kind="JPEG")


def write_plus(home: Path) -> None:
    """CheXpert Plus: 27 columns, a report with a line break, PNGs that the table calls .jpg, labels as JSON lines."""
    (home / "chexbert_labels").mkdir(parents=True)
    names = ("ap_pa", "age", "sex", "report", "race")
    report = '"No edema.\nHeart is large."'
    values = [("AP", "61.0", "Female", report, "White"), ("", "61.0", "Female", "", "White")]
    values += [("PA", "", "Male", "Normal.", ""), ("AP", "70", "Male", "", ""), ("AP", "30", "Male", "", "")]
    values += [("AP", "40", "Female", "", "")]
    lines = [PLUS_HEADER]
    for film, cells in zip(PLUS_FILMS, values, strict=True):
        split, patient, _, view = film.split("/")
        row = dict(zip(names, cells, strict=True)) | {
            "path_to_image": f"{film}.jpg",
            "path_to_dcm": f"{film}.dcm",
            "split": split,
        }
        row |= {"path_to_dcm": f"{film}.dcm", "frontal_lateral": view[6:].capitalize(), "deid_patient_id": patient}
        lines.append(",".join(row.get(name, "") for name in PLUS_HEADER.split(",")))
    (home / PLUS_TABLE).write_text("\n".join(lines) + "\n")
    states = [{"Edema": 0, "Cardiomegaly": 1}, {"Edema": 0, "Cardiomegaly": 1}, None, {"Edema": -1}]
    states += [{"Edema": 1}, {"Edema": 0}]
    objects = [
        {"path_to_image": f"{film}.jpg"} | {label: of.get(label) for label in LABELS}
        for film, of in zip(PLUS_FILMS, states, strict=True)
        if of is not None
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in reversed(objects))
    (home / "chexbert_labels" / "report_fixed.json").write_text(text)
    for number, film in enumerate(PLUS_FILMS):
        draw(home / "PNG" / f"{film}.png", number)


def write_padchest(home: Path) -> None:
    """PadChest: 36 columns, `nan` for what is missing, lists of words as text, PNGs of 10 or 12 bits of 16."""
    home.mkdir()
    names = PADCHEST_HEADER.split(",")
    wanted = PADCHEST_WANTED.split(",")
    lines = [PADCHEST_HEADER]
    for number, row in enumerate(PADCHEST_ROWS):
        cells = dict(zip(wanted, row, strict=True)) | {"": str(number)}
        cells |= {"Labels": f'"{cells["Labels"]}"' if cells["Labels"] else "nan", "Report": "sin hallazg"}
        lines.append(",".join(cells.get(name, "nan") for name in names))
        draw(home / row[1] / row[0], number, bits=int(row[8]))
    text = "\n".join(lines) + "\n"
    path = home / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))


def write_vindr(home: Path) -> None:
    """VinDr-CXR: a row per reader in train, one by consensus in test, whose last diseases have another name."""
    (home / "annotations").mkdir(parents=True)
    test = tuple("Other disease" if name == "Other diseases" else name for name in VINDR_CLASSES)
    head = {"train": ("image_id", "rad_id", *VINDR_CLASSES), "test": ("image_id", *test)}
    lines = {split: [",".join(names)] for split, names in head.items()}
    for number, film in enumerate((*VINDR_TRAIN, *((found,) for found in VINDR_TEST))):
        split = "train" if number < len(VINDR_TRAIN) else "test"
        for reader, found in enumerate(film, start=1):
            who = [f"R{reader + number % 2}"] if split == "train" else []
            cells = [str(int(name in found)) for name in VINDR_CLASSES]
            lines[split].append(",".join([f"{number:032x}", *who, *cells]))
        draw(home / split / f"{number:032x}.dicom", number, bits=12, kind="DICOM")
    for split, rows in lines.items():
        (home / "annotations" / f"image_labels_{split}.csv").write_text("\n".join(rows) + "\n")


SETS = {
    "chexpert": write_chexpert,
    "chexpert-plus": write_plus,
    "mimic": write_mimic,
    "nih": write_nih,
    "padchest": write_padchest,
    "vindr": write_vindr,
}
