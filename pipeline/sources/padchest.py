"""PadChest: PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv, and 16-bit PNGs at <ImageDir>/<ImageID>.

Bustos et al., PadChest: a large chest x-ray image dataset with multi-label annotated reports, Medical Image Analysis
2020 (arXiv:1901.07441): 160,861 images of 67,625 patients. Physicians labeled the reports of 39,053 images, a network
those of the others. `padchest` is the physicians' images alone; `padchest-all` is all of them, and makes other shards.
There are no official splits: all is train, of which dev is held out.

Labels are words of a tree, findings and diagnoses. What maps to which of CheXpert's labels is in `FINDINGS`, what
leaves a label open in `HINTS`; sources are named there. None of the words speaks of suspicion, so nothing is uncertain.
Where a report says `unchanged`, a finding that it does not name is not annotated, since the earlier report may name it;
the same holds for `exclude` and for images without a word about findings.

All films are MONOCHROME2, says the table. BitsStored_DICOM gives the bits of a PNG (10 or 12); a PNG with higher levels
has been scaled to 16.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_unique, line_of, read_strings
from pipeline.base.errors import DataError, quote
from pipeline.base.store import list_folders
from pipeline.identity import Note, ignore
from pipeline.labels import LABELS, NOT_ANNOTATED
from pipeline.sources.source import (
    Source,
    Terms,
    leave_open,
    locate_below,
    no_more_roots,
    nothing_moved,
    number_studies,
)

TERMS = Terms(
    name="padchest",
    title="PadChest",
    patients="padchest",
    license="PadChest Dataset Research Use Agreement",
    paper="Bustos et al., Medical Image Analysis 2020",
)
TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
LOOKED_FOR = f"a {TABLE}"
COLUMN = "ImageID"
COLUMNS = (
    *("ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM"),
    *("Projection", "BitsStored_DICOM", "MethodLabel", "Labels"),
)
# In PadChest's tree (Bustos et al., appendix) a word includes the words below it: laminar atelectasis is atelectasis,
# consolidation is an infiltrate. Which words make a label follows the phrases of CheXpert's labeler (Irvin et al.,
# 2019); where torchxrayvision maps a word otherwise, docs/mappings.md says why.
FINDINGS = {
    "No Finding": ("normal",),  # and none of the others but Support Devices, as in CheXpert
    "Enlarged Cardiomediastinum": (
        "mediastinal enlargement",
        "superior mediastinal enlargement",
        "mediastinal mass",
    ),
    "Cardiomegaly": ("cardiomegaly",),
    "Lung Opacity": (  # the tree's infiltrates, and what the labeler calls a density
        *("infiltrates", "interstitial pattern", "reticular interstitial pattern", "ground glass pattern"),
        *("reticulonodular interstitial pattern", "miliary opacities", "alveolar pattern", "consolidation"),
        *("air bronchogram", "increased density"),
    ),
    "Lung Lesion": (  # the labeler's nodules, masses, tumors
        *("nodule", "multiple nodules", "pulmonary mass", "lung metastasis", "lepidic adenocarcinoma"),
    ),
    "Edema": ("pulmonary edema",),
    "Consolidation": ("consolidation", "air bronchogram"),
    "Pneumonia": ("pneumonia", "atypical pneumonia"),
    "Atelectasis": (
        *(
            "atelectasis",
            "laminar atelectasis",
            "lobar atelectasis",
            "segmental atelectasis",
            "atelectasis basal",
        ),
        *("round atelectasis", "total atelectasis"),
    ),
    "Pneumothorax": ("pneumothorax", "hydropneumothorax"),
    "Pleural Effusion": (
        *(
            "pleural effusion",
            "loculated pleural effusion",
            "loculated fissural effusion",
            "hydropneumothorax",
        ),
        "empyema",
    ),
    "Pleural Other": (  # the labeler's thickening and scars
        *("pleural thickening", "apical pleural thickening", "calcified pleural thickening", "pleural mass"),
        *("pleural plaques", "calcified pleural plaques", "fissure thickening", "minor fissure thickening"),
        "major fissure thickening",
    ),
    "Fracture": (
        *("fracture", "rib fracture", "callus rib fracture", "clavicle fracture", "humeral fracture"),
        "vertebral fracture",
    ),
    "Support Devices": (  # the labeler's lines, tubes, pacers, drains and valves
        *("NSG tube", "endotracheal tube", "tracheostomy tube", "chest drain tube", "gastrostomy tube"),
        *("nephrostomy tube", "ventriculoperitoneal drain tube", "double J stent", "catheter"),
        *("central venous catheter", "central venous catheter via jugular vein"),
        *("central venous catheter via subclavian vein", "central venous catheter via umbilical vein"),
        *(
            "reservoir central venous catheter",
            "electrical device",
            "pacemaker",
            "dai",
            "single chamber device",
        ),
        *("dual chamber device", "artificial heart valve", "artificial mitral heart valve"),
        "artificial aortic heart valve",
    ),
}
# Signs of a finding, or names too wide for it: alone, they leave it not annotated.
HINTS = {
    "Lung Lesion": ("mass", "granuloma", "calcified granuloma", "cavitation"),
    "Edema": (
        *("heart insufficiency", "kerley lines", "hilar congestion", "vascular redistribution"),
        *("central vascular redistribution", "pulmonary venous hypertension"),
    ),
    "Atelectasis": ("volume loss",),
    "Pleural Effusion": ("costophrenic angle blunting",),
    "Pleural Other": ("costophrenic angle blunting", "asbestosis signs"),
    "Fracture": ("vertebral compression", "vertebral anterior compression"),
    "Support Devices": (
        *("osteosynthesis material", "metal", "endoprosthesis", "aortic endoprosthesis", "prosthesis"),
        *("humeral prosthesis", "abnormal foreign body", "external foreign body", "suture material"),
        "sternotomy",
    ),
}
# Words that say nothing of the 14.
UNMAPPED = """
COPD signs, Chilaiditi sign, abscess, adenopathy, air fluid level, air trapping, aortic aneurysm, aortic
atheromatosis, aortic button enlargement, aortic elongation, ascendent aortic elongation, axial hyperostosis,
azygoesophageal recess shift, azygos lobe, blastic bone lesion, bone cement, bone metastasis, breast mass,
bronchiectasis, bronchovascular markings, bullas, calcified adenopathy, calcified densities, calcified fibroadenoma,
calcified mediastinal adenopathy, cervical rib, chronic changes, costochondral junction hypertrophy, cyst,
descendent aortic elongation, dextrocardia, diaphragmatic eventration, emphysema, end on vessel, esophagic
dilatation, fibrotic band, flattened diaphragm, goiter, gynecomastia, heart valve calcified, hemidiaphragm
elevation, hiatal hernia, hilar enlargement, hyperinflated lung, hypoexpansion, hypoexpansion basal, kyphosis,
lipomatosis, lung vascular paucity, lymphangitis carcinomatosa, lytic bone lesion, mammary prosthesis, mastectomy,
mediastinal shift, mediastinic lipomatosis, nipple shadow, non axial articular degenerative changes, obesity,
osteopenia, osteoporosis, pectum carinatum, pectum excavatum, pericardial effusion, pneumomediastinum,
pneumoperitoneo, post radiotherapy changes, pseudonodule, pulmonary artery enlargement, pulmonary artery
hypertension, pulmonary fibrosis, pulmonary hypertension, respiratory distress, right sided aortic arch, sclerotic
bone lesion, scoliosis, soft tissue mass, sternoclavicular junction hypertrophy, subacromial space narrowing,
subcutaneous emphysema, supra aortic elongation, surgery, surgery breast, surgery heart, surgery humeral, surgery
lung, surgery neck, thoracic cage deformation, tracheal shift, tuberculosis, tuberculosis sequelae, vascular hilar
enlargement, vertebral degenerative changes
"""
# With these, what a report does not name is not annotated.
UNSAID = ("unchanged", "exclude")
SILENT = ("suboptimal study", "")  # say nothing of findings
_LIST = r"^\[('[^'\\]*'(, '[^'\\]*')*)?\]$"  # a Python list as text
_VIEWS = {"PA": "frontal", "AP": "frontal", "AP_horizontal": "frontal", "L": "lateral"}
_PROJECTIONS = {"PA": "PA", "AP": "AP", "AP_horizontal": "AP"}
_SEXES = {"M": "Male", "F": "Female", "O": "Other"}
_NAMES = r"^(?:COSTAL|EXCLUDE|UNK|PA|AP|AP_horizontal|L)$"
find_roots, describe_moved = no_more_roots, nothing_moved


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The table, plain or gzipped."""
    paths = (folder / f"{TABLE}{end}" for end in ("", ".gz"))
    table = next((path for path in paths if path.is_file()), None)
    return None if table is None else {"train": table}


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """The label table of the images that physicians labeled, or of all, as train. Raises DataError as `read_table`."""
    table, is_physicians = _read(source.csvs["train"])
    return {"train": table if source.set == "padchest-all" else table.filter(is_physicians).combine_chunks()}


def read_table(csv: Path) -> pa.Table:
    """The label table of all images. Raises DataError, naming file, line and column."""
    return _read(csv)[0]


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each image, below the first root, or folder `images` in one, that has it."""
    folders = [folder for root in roots for folder in (root, root / "images")]
    numbers = {path.partition("/")[0] for path in paths}
    having = [
        (folder, "") for folder in folders if folder.is_dir() and numbers.intersection(list_folders(folder))
    ]
    return locate_below(paths, having or [(folders[0], "")])


def _read(csv: Path) -> tuple[pa.Table, pa.ChunkedArray]:
    """The label table of all images, and which of them physicians labeled."""
    text = read_strings(csv, COLUMNS)
    for name in ("PatientBirth", "PatientSex_DICOM", "Labels"):  # which pandas has written
        cells = pc.if_else(pc.equal(text[name], "nan"), None, text[name])
        text = text.set_column(text.column_names.index(name), name, cells)
    for name, pattern, complaint, optional in (
        ("ImageID", r"^[0-9A-Za-z_-]{1,90}\.png$", "is not the name of a PNG", False),
        ("ImageDir", r"^\d{1,4}$", "is not a number", False),
        ("StudyDate_DICOM", r"^\d{8}$", "is not a date like 20140915", False),
        ("StudyID", r"^\S{1,80}$", "is not a name of up to 80 characters", False),
        ("PatientID", r"^[0-9A-Za-z_-]{1,80}$", "is not a name of up to 80 characters", False),
        ("PatientBirth", r"^\d{4}(\.0)?$", "is not a year", True),
        ("PatientSex_DICOM", "^[MFO]$", "is none of M, F, O", True),
        ("Projection", _NAMES, "is none of PA, AP, AP_horizontal, L, COSTAL, EXCLUDE, UNK", False),
        ("BitsStored_DICOM", r"^([89]|1[0-6])$", "is not a number of bits from 8 to 16", False),
        ("MethodLabel", "^(Physician|RNN_model)$", "is neither Physician nor RNN_model", False),
    ):
        demand(csv, name, text[name], pc.match_substring_regex(text[name], pattern), complaint, optional)
    key = pc.utf8_slice_codeunits(text["ImageID"], 0, -4)
    demand_unique(csv, key.combine_chunks())
    projection = text["Projection"].to_pylist()
    year = pc.utf8_slice_codeunits(text["StudyDate_DICOM"], 0, 4).cast(pa.int16())
    facts = {
        "path": pc.binary_join_element_wise(text["ImageDir"], text["ImageID"], "/"),
        "key": key,
        "patient": text["PatientID"],
        "study": number_studies(text["PatientID"], text["StudyID"]),
        "view": pa.array([_VIEWS.get(name, "other") for name in projection]),
        "sex": pa.array([_SEXES.get(sex) for sex in text["PatientSex_DICOM"].to_pylist()], pa.string()),
        "age": pc.subtract(year, pc.utf8_slice_codeunits(text["PatientBirth"], 0, 4).cast(pa.int16())),
        "projection": pa.array([_PROJECTIONS.get(name) for name in projection], pa.string()),
    }
    bits = {"bits": text["BitsStored_DICOM"].cast(pa.int16())}
    table = pa.table(facts | _read_states(csv, text["Labels"]) | bits).combine_chunks()
    return table, pc.equal(text["MethodLabel"], "Physician")


def _read_states(csv: Path, column: pa.ChunkedArray) -> dict[str, npt.NDArray[np.int8]]:
    """The states of the 14 labels, from each row's list of words. Raises DataError for a word of another set."""
    demand(csv, "Labels", column, pc.match_substring_regex(column, _LIST), "is not a list of words", True)
    encoded = pc.fill_null(column, "[]").combine_chunks().dictionary_encode()
    lists = pc.split_pattern(pc.utf8_slice_codeunits(encoded.dictionary, 2, -2), "', '")
    place: npt.NDArray[np.int64] = pc.list_parent_indices(lists).to_numpy()
    words = pc.utf8_trim_whitespace(pc.list_flatten(lists))

    def having(names: Iterable[str]) -> npt.NDArray[np.int64]:
        """The lists with one of the words."""
        found: npt.NDArray[np.int64] = place[np.asarray(pc.is_in(words, value_set=pa.array(names)))]
        return found

    unmapped = " ".join(UNMAPPED.split()).split(", ")
    mapped = {name for names in (*FINDINGS.values(), *HINTS.values()) for name in names}
    known = pc.is_in(words, value_set=pa.array([*mapped, *unmapped, *UNSAID, *SILENT]))
    if (first := pc.index(known, False).as_py()) >= 0:
        line = line_of(csv, pc.index(column, encoded.dictionary[int(place[first])]).as_py())
        unknown = quote(words[first].as_py(), 80)
        raise DataError(f"{csv}, line {line}, column Labels: '{unknown}' is not a label of this set")
    states = np.full((len(lists), len(LABELS)), NOT_ANNOTATED, np.int8)
    states[having(mapped.union(unmapped))] = 0
    states[having(UNSAID)] = NOT_ANNOTATED
    for label, names in HINTS.items():
        states[having(names), LABELS.index(label)] = NOT_ANNOTATED
    for label, names in FINDINGS.items():
        states[having(names), LABELS.index(label)] = 1
    states[(states[:, 1:-1] == 1).any(axis=1), 0] = 0
    leave_open(states)
    of_rows = states[encoded.indices.to_numpy()]
    return {label: of_rows[:, number] for number, label in enumerate(LABELS)}
