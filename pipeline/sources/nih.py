"""NIH ChestX-ray14: Data_Entry_2017_v2020.csv, the official lists, and images in one folder or in twelve.

Wang et al., ChestX-ray8: hospital-scale chest X-ray database and benchmarks, CVPR 2017: 112,120 frontal radiographs of
30,805 patients, 14 findings by text mining; findings.csv has them as CheXpert's labels.

The official lists keep patients apart: train_val_list.txt is train (of which dev is held out), test_list.txt is test.
Without them, as in Kaggle's copy, all is train.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_cells, demand_unique, line_of, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_folders, open_to_read
from pipeline.identity import Note, ignore, join, normalize_paths
from pipeline.sources.findings import parse_findings, read_findings
from pipeline.sources.source import DataSet, Source, first_file, list_images, make_table, read_terms

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
COLUMN = "Finding Labels"
CHECKS = {
    "Follow-up #": (r"^\d{1,6}$", "is not a number"),
    "Patient Age": (r"^\d{1,3}Y?$", "is not a number of years"),
    "Patient Gender": ("^[MF]$", "is neither M nor F"),
    "View Position": ("^(AP|PA)$", "is neither AP nor PA"),
}
FINDINGS = read_findings("NIH")
SEXES = {"M": "Male", "F": "Female"}
_IMAGE = r"^(?P<key>(?P<patient>\d{8})_\d{3})\.png$"


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The table and the official lists, if any; None without a table. Raises DataError if one list is missing."""
    table = first_file(folder, TABLES)
    if table is None:
        return None
    lists = {split: folder / name for split, name in LISTS.items()}
    missing = [path.name for path in lists.values() if not path.is_file()]
    if len(missing) == 1:
        raise DataError(f"{folder}: {missing[0]} is missing: NIH's official splits are two lists, or none")
    return {"table": table} if missing else {"table": table, **lists}


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """The label tables of train and test, by the official lists; all as train without them.

    Raises DataError for an image that is in both lists or in none.
    """
    csvs = source.csvs
    table = read_table(csvs["table"])
    if "train" not in csvs:
        return {"train": table}
    listed = {}
    for split in LISTS:
        with open_to_read(csvs[split]) as file:
            listed[split] = file.read().decode("utf-8-sig", errors="replace").split()
    names = pa.array([name for names in listed.values() for name in names], pa.string())
    rows = pa.table({"list": [LISTS[split] for split, names in listed.items() for _ in names]})
    lists = csvs["train"].with_name(" and ".join(LISTS.values()))

    def find_line(_: Path, row: int) -> int:
        return row + 1 if row < len(listed["train"]) else row + 1 - len(listed["train"])

    place = join(table["path"], lists, rows, names, "images", note, normalize_paths, find_line)
    row = pc.index(place.is_null(), True).as_py()
    if row >= 0:
        raise DataError(
            f"{csvs['table']}, line {line_of(csvs['table'], row)}: {table['path'][row]} is in neither "
            f"{' nor '.join(LISTS.values())}"
        )
    of_rows = rows["list"].take(place)
    return {split: table.filter(pc.equal(of_rows, name)) for split, name in LISTS.items()}


def read_table(csv: Path) -> pa.Table:
    """The label table of all images."""
    text = read_strings(csv, ("Image Index", COLUMN, *CHECKS))
    index = text["Image Index"]
    parts = pc.extract_regex(index, _IMAGE)
    demand(csv, "Image Index", index, parts.is_valid(), "is not like 00000001_000.png")
    parts = parts.combine_chunks()
    demand_unique(csv, parts.field("key"))
    demand_cells(csv, text, CHECKS)
    return make_table(
        parse_findings(csv, COLUMN, text[COLUMN], partial(pc.split_pattern, pattern="|"), FINDINGS),
        path=index,
        key=parts.field("key"),
        patient=parts.field("patient"),
        study=text["Follow-up #"],
        sex=[SEXES[sex] for sex in text["Patient Gender"].to_pylist()],
        age=pc.utf8_rtrim(text["Patient Age"], "Y"),
        projection=text["View Position"],
    )


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each image: in `images`, in `images_001/images` to `images_012/images`, or beside the table."""
    folders = []
    for root in roots:
        names = [name for name in list_folders(root) if re.fullmatch(r"images(_\d{3})?", name)]
        folders += [root, *(root / name for name in names), *(root / name / "images" for name in names)]
    files = list_images(folders)
    return [files.get(path.rpartition(".")[0], f"{roots[0]}/images/{path}") for path in paths]


SET = DataSet(
    read_terms("nih"),
    files=f"a {TABLES[0]}",
    find_tables=find_tables,
    read_tables=read_tables,
    read_table=read_table,
    column=COLUMN,
    locate=locate,
)
