"""NIH ChestX-ray14: Data_Entry_2017_v2020.csv, the official lists, and images in one folder or in twelve.

Wang et al., ChestX-ray8: hospital-scale chest X-ray database and benchmarks, CVPR 2017: 112,120 frontal radiographs of
30,805 patients, 14 findings by text mining. Without the official lists, as in Kaggle's copy, all is train.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand
from pipeline.base.errors import DataError
from pipeline.base.store import list_folders, open_to_read
from pipeline.identity import Note, ignore, normalize_paths
from pipeline.sources.source import AGE, Column, DataSet, Source, list_images, read_terms

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


class Nih(DataSet):
    """NIH's official lists, and its folders of images."""

    def find_tables(self, folder: Path) -> dict[str, Path] | None:
        """The table and the official lists, if any. Raises DataError if one list is missing."""
        tables = super().find_tables(folder)
        missing = [name for split, name in LISTS.items() if tables and split not in tables]
        if len(missing) == 1:
            raise DataError(f"{folder}: {missing[0]} is missing: NIH's official splits are two lists, or none")
        return tables

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Train and test, by the official lists; all as train without them. An image must be in one of them."""
        csvs = source.csvs
        table = self.read_table(csvs["table"])
        if "train" not in csvs:
            return {"train": table}
        images = normalize_paths(table["path"])
        listed: dict[str, pa.Array] = {}
        for split, name in LISTS.items():
            with open_to_read(csvs[split]) as file:
                names = file.read().decode("utf-8-sig", errors="replace").split()
            members = normalize_paths(pa.array(names, pa.string()))
            listed[split] = pc.is_in(images, value_set=members)
            if missing := pc.sum(pc.invert(pc.is_in(members, value_set=images))).as_py():
                note(f"{name}: {missing:,} of its images are not in the data set")
        both, either = (combine(listed["train"], listed["test"]) for combine in (pc.and_, pc.or_))
        column, lists = "Image Index", LISTS.values()
        demand(csvs["table"], column, table["path"], pc.invert(both), f"is in both {' and '.join(lists)}")
        demand(csvs["table"], column, table["path"], either, f"is in neither {' nor '.join(lists)}")
        return {split: table.filter(rows) for split, rows in listed.items()}

    def read_text(self, csv: Path) -> pa.Table:
        """The columns needed. Raises DataError for No Finding beside a finding."""
        text = super().read_text(csv)
        column = self.findings[0]
        clash = pc.match_substring_regex(text[column], r"No Finding\||\|No Finding")
        demand(csv, column, text[column], pc.invert(clash), "is No Finding and a finding: remove one of them")
        return text

    def locate(self, paths: Sequence[str], roots: Sequence[Path], note: Note = ignore) -> list[str]:
        """The file of each image: in `images`, in `images_001/images` to `images_012/images`, or beside the table."""
        folders = []
        for root in roots:
            names = [name for name in list_folders(root) if re.fullmatch(r"images(_\d{3})?", name)]
            folders += [root, *(root / name for name in names), *(root / name / "images" for name in names)]
        files = list_images(folders)
        return [files.get(path.rpartition(".")[0], f"{roots[0]}/images/{path}") for path in paths]


SET = Nih(
    read_terms("nih"),
    tables={"table": TABLES} | {split: (name,) for split, name in LISTS.items()},
    columns={
        "Image Index": Column(r"(?P<path>(?P<key>(?P<patient>\d{8})_\d{3})\.png)", "is not like 00000001_000.png"),
        "Finding Labels": Column("(?P<findings>.*)", "is no list of findings"),
        "Follow-up #": Column(r"(?P<study>\d{1,6})", "is not a number"),
        "Patient Age": AGE,
        "Patient Gender": Column("(?P<letter>[MF])", "is neither M nor F"),
        "View Position": Column("(?P<position>AP|PA)", "is neither AP nor PA"),
    },
    findings=("Finding Labels", "|"),
)
