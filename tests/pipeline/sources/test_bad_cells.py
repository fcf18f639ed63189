"""What is wrong in a set's tables is named: set | file | old | new | how the last line of the error goes on."""

import gzip
from pathlib import Path

import pytest

from tests.conftest import run_pipeline
from tests.layouts import PLUS_FILMS, PLUS_TABLE, SETS

FILES = {
    "chexpert": ("chexpert", "CheXpert-v1.0-small/train.csv"),
    "chexpert valid": ("chexpert", "CheXpert-v1.0-small/valid.csv"),
    "nih": ("nih", "Data_Entry_2017_v2020.csv"),
    "nih train": ("nih", "train_val_list.txt"),
    "nih test": ("nih", "test_list.txt"),
    "mimic": ("mimic", "mimic-cxr-2.0.0-split.csv.gz"),
    "mimic views": ("mimic", "mimic-cxr-2.0.0-metadata.csv.gz"),
    "mimic labels": ("mimic", "mimic-cxr-2.0.0-chexpert.csv.gz"),
    "plus": ("chexpert-plus", PLUS_TABLE),
    "plus labels": ("chexpert-plus", "chexbert_labels/report_fixed.json"),
    "padchest": ("padchest", "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"),
    "vindr": ("vindr", "annotations/image_labels_train.csv"),
    "vindr test": ("vindr", "annotations/image_labels_test.csv"),
}
CASES = rf"""
chexpert | Edema | Oedema | : column Edema is missing; it has Path, Sex,
chexpert | ,Frontal, | ,Oblique, | , line 2, column Frontal/Lateral: 'Oblique' is neither Frontal nor Lateral
chexpert | ale,6 | ale,young | , line 2, column Age: 'young0' is not a number of years
chexpert | small/train/patient00001/study2/view1_frontal.jpg | ../../etc/passwd | , line 3, column Path: 'CheX
chexpert | patient00001/study2/view1 | patient00001/study1/view1 | , lines 2 and 3: the same image patient00001
chexpert valid | valid/patient00011 | valid/patient00001 | , line 4: patient00001 is in train.csv too; splits must not
nih | Nodule,1 | Nodul,1 | , line 3, column Finding Labels: 'Nodul' is not a finding of this set
nih | No Finding,0 | No Finding|Hernia,0 | , line 4, column Finding Labels: 'No Finding|Hernia' is No Finding and a find
nih | ,58,M, | ,58,X, | , line 3, column Patient Gender: 'X' is neither M nor F
nih | 00000002_000.png | 00000001_001.png | , lines 3 and 4: the same image 00000001_001 twice
nih | View Position | View | : column View Position is missing; it has Image Index, Finding Labels
nih train | 00000002_000.png\n |  | , line 4, column Image Index: '00000002_000.png' is in neither train_val_list
nih test | 00000004_000.png | 00000003_000.png | , line 5, column Image Index: '00000003_000.png' is in both train_val
mimic | validate | valid | , line 6, column split: 'valid' is none of train, validate, test
mimic | ,50771383, | ,5O771383, | , line 7, column study_id: '5O771383' is not a number of up to 9 dig
mimic | 9b314ad7-fbcb0422 | 2a280266-c8bae121 | , lines 7 and 8: the same image 2a280266-c8bae121 twice
mimic | ,10000898, | ,10000764, | p10000764 is in valid and test; splits must not share patients
mimic labels | 10000033,53189527 | 10000032,50414267 | , lines 2 and 3, column No Finding: '1.0' and '' for 50414267
mimic views | ViewPosition | View | : column ViewPosition is missing; it has dicom_id, study_id
mimic labels | ,-1.0, | ,-2.0, | column Edema: '-2.0' is not a label: 1.0, 0.0, -1.0 or blank
plus | {PLUS_FILMS[2]} | train/person00002/st | , line 5, column path_to_image: 'train/person00002/st
plus | valid\n | test\n | , line 6, column split: 'test' is none of train, valid
plus | frontal_lateral | view | : column frontal_lateral is missing; it has path_to_image, path_to_dcm
plus | valid/patient64541/study1 | valid/patient00001/study9 | patient00001 is in train and valid; splits must not share
plus labels | : -1 | : -3 | , line 3, column Edema: '-3' is not a label: 1, 0, -1 or null
plus labels | {{ | [ | : not readable as a JSON object a line
padchest | 'rib fracture' | 'rib fractur' | , line 7, column Labels: 'rib fractur' is not a finding of this set
padchest | ['rib fracture'] | rib fracture | , line 7, column Labels: 'rib fracture' is not a list of words
padchest | COSTAL | OBLIQUE | , line 7, column Projection: 'OBLIQUE' is none of PA, AP, AP_horizontal, L, COSTAL, EX
padchest | 32_a.png | 33_a.png | , lines 6 and 7: the same image 33_a twice
padchest | 32_a.png | ../32_a.png | , line 6, column ImageID: '../32_a.png' is not the name of a PNG
padchest | BitsStored_DICOM | Bits | : column BitsStored_DICOM is missing; it has , ImageID, ImageDir,
vindr | ,R2, | ,R1, | , lines 2 and 3: the same image {0:032x} by R1 twice
vindr | ,R1,0,0,0,1 | ,R1,0,0,0,2 | , line 2, column Cardiomegaly: '2' is neither 0 nor 1
vindr | {1:032x},R2,0, | {1:032x},R2,1, | , line 5, column image_id: '{1:032x}' is read as No fin
vindr | Cardiomegaly, | Heart, | : column Cardiomegaly is missing; it has image_id, rad_id
vindr test | {4:032x} | film4 | , line 2, column image_id: 'film4' is not 32 hexadecimal digits
vindr test | {4:032x} | {3:032x} | , line 2: {3:032x} is in image_labels_train.csv too; splits must not
"""


@pytest.mark.parametrize("case", [line for line in CASES.splitlines() if line])
def test_a_bad_cell_is_named(case: str, tmp_path: Path) -> None:
    file, old, new, message = (cell.strip(" ").replace("\\n", "\n") for cell in case.split(" | "))
    name, table = FILES[file]
    SETS[name](tmp_path / "home")
    path = tmp_path / "home" / table
    packed = path.suffix == ".gz"
    text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
    assert old in text
    changed = text.replace(old, new, 1).encode()
    path.write_bytes(gzip.compress(changed) if packed else changed)
    failed = run_pipeline("shards", tmp_path / "home", tmp_path / "out")
    assert failed.returncode == 1
    assert message in failed.stderr.splitlines()[-1]
    assert path.name in failed.stderr or "splits must not" in message or "_list.txt" in message or "both" in message
