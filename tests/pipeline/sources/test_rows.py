"""Rows of a table → splits and shards, against plain loops over the rows."""

from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.labels import hash_fraction, split_patients, study_names
from pipeline.sources.rows import divide_rows, read_splits
from pipeline.sources.sets import find_source
from tests.conftest import refused, write_chexpert


@pytest.mark.parametrize("views", ["all", "frontal", "lateral"])
@pytest.mark.parametrize("limit", [None, 1, 8, 9])
def test_splits_are_those_of_a_loop_over_the_rows(tmp_path: Path, views: str, limit: int | None) -> None:
    # An upgrade must split as before: these values may never change.
    assert (hash_fraction("dev", 0, "p1"), hash_fraction("shuffle", 7, "ä")) == (0.7899902719102887, 0.507523171343573)
    write_chexpert(tmp_path, "train", range(1, 13))
    write_chexpert(tmp_path, "valid", range(30, 33))
    tables, omitted, notes = read_splits(find_source(tmp_path, {}, []), views=views, dev=0.4, seed=3, limit=limit)
    expected: dict[str, list[str]] = {"train": [], "dev": [], "valid": []}
    for name in ("train", "valid"):
        for place in pd.read_csv(tmp_path / f"{name}.csv")["Path"]:
            _, _, patient, study, view = place.removesuffix(".jpg").split("/")
            held_out = name == "train" and hash_fraction("dev", 3, patient) < 0.4
            expected["dev" if held_out else name].append(f"{patient}_{study}_{view}")
    for name, keys in expected.items():
        seen = [key for key in keys if views in ("all", key.rpartition("_")[2])]
        draws = {key: hash_fraction("limit", 3, key.partition("_")[0]) for key in seen}
        kept: list[str] = []
        for _, patient in groupby(sorted(seen, key=draws.__getitem__), key=draws.__getitem__):
            images = [*patient]
            if kept and limit and len(kept) + len(images) > limit:
                break
            kept += images
        assert omitted[name] == {"views": len(keys) - len(seen), "limit": len(seen) - len(kept)}
        kept.sort(
            key=lambda key: (hash_fraction("shuffle", 3, key.rpartition("_view")[0] if views == "all" else key), key)
        )
        assert tables[name]["key"].to_pylist() == kept
        folder = tmp_path / ("valid" if name == "valid" else "train")
        assert tables[name]["file"].to_pylist() == [f"{folder}/{key.replace('_', '/', 2)}.jpg" for key in kept]
    assert ([*tables], notes) == ([*expected], ())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("views", ["all", "frontal"])
def test_shards_begin_with_a_study(size: int, views: str) -> None:
    random = np.random.default_rng(size)
    study = np.repeat(np.arange(40), random.integers(1, 4, 40))
    table = pa.table({"patient": [f"p{number // 2}" for number in study], "study": study % 2})
    names = study_names(table).to_pylist()
    begins = [row for row in range(len(study)) if views != "all" or names[row] not in names[:row]]
    starts = [next((row for row in begins if row >= first), len(study)) for first in range(0, len(study), size)]
    parts = [*divide_rows(table, size, views)]
    assert [part.num_rows for part in parts] == np.diff(sorted({*starts, len(study)})).tolist()
    assert pa.concat_tables(parts).equals(table)
    assert [part.num_rows for part in split_patients(table.slice(0, 0), 0.5, 0)] == [0, 0]


def test_what_cannot_be_split_is_named(tmp_path: Path) -> None:
    write_chexpert(tmp_path, "train", range(1, 4))
    write_chexpert(tmp_path, "valid", range(3, 5))
    train, valid = tmp_path / "train.csv", tmp_path / "valid.csv"
    read = partial(read_splits, dev=0.0, seed=0, limit=1)
    with refused(f"{valid}, line 2: patient00003 is in train.csv too; splits must not share patients"):
        read(find_source(tmp_path, {}, []), views="all")
    rows = valid.read_text().splitlines(keepends=True)
    valid.write_text(rows[0] + rows[-1])
    tables, omitted, _ = read(find_source(tmp_path, {}, []), views="lateral")
    assert ([*tables], [*omitted]) == (["train"], ["train", "dev", "valid"])
    train.write_text("".join(row for row in train.read_text().splitlines(keepends=True) if "_lateral" not in row))
    with refused(f"{train}, {valid}: no lateral images"):
        read(find_source(tmp_path, {}, []), views="lateral")
