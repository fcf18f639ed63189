"""Several folders of shards, read as one."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline import DataError, open_shards
from pipeline.identity import NAMED
from pipeline.labels import count_rows
from pipeline.manifest import checksum, read_manifest, read_table
from pipeline.sources.sets import load_tables
from pipeline.stream.dataset import read_shards
from pipeline.stream.select import mix_weights
from tests.conftest import default_options, make_shards, refused, run_pipeline, write_chexpert
from tests.layouts import draw


def write_set(folder: Path, patients: range, called: str = "", split: str = "train", **source: Any) -> Path:
    """Shards of synthetic patients; another hospital's have images of their own."""
    write_chexpert(folder / "films", split, patients, seed=bool(called))
    make_shards(folder / "films", folder / "shards", called=called, **source)
    return folder / "shards"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """CheXpert's first 30 patients, and 20 of another hospital under the same numbers."""
    base = tmp_path_factory.mktemp("two")
    return write_set(base / "a", range(1, 31)), write_set(base / "b", range(1, 21), "childrens")


def test_one_folder_is_what_it_was(two: tuple[Path, Path]) -> None:
    alone = read_shards(two[0])
    assert (alone.manifest, alone.namespace) == (read_manifest(two[0]), "chexpert")
    assert alone.open("train").table.equals(read_table(two[0], alone.manifest.split("train")))


def test_tables_follow_each_other_and_patients_are_apart(two: tuple[Path, Path]) -> None:
    found = read_shards(two)
    split = found.open("train")
    expected = pd.concat(
        [
            read_table(folder, read_manifest(folder).split("train"))
            .to_pandas()
            .assign(set=name, patient=lambda rows, name=name: f"{name}/" + rows["patient"])
            for folder, name in zip(two, ("chexpert", "childrens"), strict=True)
        ],
        ignore_index=True,
    )
    numbers = split.table["shard"].to_numpy()
    first = len(read_manifest(two[0]).split("train").shards)
    expected["shard"] += np.where(expected["set"] == "childrens", first, 0)
    pd.testing.assert_frame_equal(split.table.to_pandas(), expected, check_dtype=False)
    np.testing.assert_array_equal(split.shard, numbers)
    assert found.namespace == NAMED
    assert found.manifest.split("train").samples == len(expected)
    assert found.manifest.dataset["name"] == "chexpert; childrens"


def test_every_image_is_read_from_its_own_folder(two: tuple[Path, Path]) -> None:
    together = open_shards(two)["train"]
    (alone,) = open_shards(two[1])["train"].batches(1000, 32, epoch=None, uncertain="zeros")
    (batch,) = together.where("set=childrens").batches(1000, 32, epoch=None, uncertain="zeros")
    np.testing.assert_array_equal(batch.images, alone.images)
    np.testing.assert_array_equal(batch.target, alone.target)
    first = [batch.step.images[0] for batch in together.batches(8, 32, epoch=1)]
    assert set(np.array(together.table["set"])[first]) == {"chexpert", "childrens"}


def test_gray_levels_are_those_of_all_images(two: tuple[Path, Path]) -> None:
    ours = read_shards(two).manifest
    parts = [read_manifest(folder) for folder in two]
    counts = [part.split("train").samples for part in parts]
    mean = np.average([part.pixels["mean"] for part in parts], weights=counts)
    squares = [part.pixels["std"] ** 2 + part.pixels["mean"] ** 2 for part in parts]
    assert ours.pixels["mean"] == pytest.approx(mean, abs=1e-4)
    assert ours.pixels["std"] == pytest.approx(np.sqrt(np.average(squares, weights=counts) - mean**2), abs=1e-4)


def test_a_folder_has_its_share_of_the_draws() -> None:
    folder = np.repeat([0, 1], [900, 100])
    weights = mix_weights(folder, (0.7, 0.3))
    assert weights[folder == 0].sum() == pytest.approx(700)
    assert weights[folder == 1].sum() == pytest.approx(300)
    with pytest.raises(ValueError, match=r"^none of the images is in folder 3$"):
        mix_weights(folder, (1, 1, 1))


def test_folders_that_cannot_be_one_are_refused_by_name(two: tuple[Path, Path], tmp_path: Path) -> None:
    small = write_set(tmp_path / "small", range(40, 44), options=default_options(size=32))
    with refused(f"{two[0]} and {small} differ in size: 48 and 32; shard one of them again as the other"):
        read_shards([two[0], small])
    with refused(f"{two[0]}: given twice"):
        read_shards([two[0], two[0]])
    again = write_set(tmp_path / "again", range(25, 35))
    name = read_table(again, read_manifest(again).split("train"))["key"].to_pylist()
    with pytest.raises(DataError, match=r"an image may be in one folder only: take") as caught:
        read_shards([two[0], again])
    assert str(caught.value).split(" and ")[0] in name


def test_the_same_images_under_other_names_are_noticed(two: tuple[Path, Path], tmp_path: Path) -> None:
    copied, other, both = tmp_path / "films", tmp_path / "other", tmp_path / "both"
    shutil.copytree(two[0].parent / "films", copied)
    for patient in sorted((copied / "train").iterdir()):
        patient.rename(patient.with_name(f"patient9{patient.name[-4:]}"))
    rows = (copied / "train.csv").read_text()
    (copied / "train.csv").rename(copied / "test.csv").write_text(rows.replace("/patient0", "/patient9"))
    make_shards(copied, other, called="other")
    count = len(read_table(two[0], read_manifest(two[0]).split("train")))
    message = (
        rf"^patient9\d+_study\d_view1_frontal and {count - 1} others are in test of {other} and, maybe under "
        rf"another name, in train of {two[0]}; an image may be in one folder only: take it out of "
        r"one's table, and shard that again$"
    )
    with pytest.raises(DataError, match=message):
        open_shards([two[0], other])
    (copied / "train.csv").write_text(rows)
    shutil.copytree(two[0].parent / "films" / "train", copied / "train", dirs_exist_ok=True)
    make_shards(copied, both, default_options(dev=0), called="both")
    warning = r"both: 60 images of test, such as patient9\d{4}_.*, are in train too: results"
    with pytest.warns(UserWarning, match=warning):
        open_shards(both)


def test_pngs_of_one_length_are_told_apart() -> None:
    random = np.random.default_rng(0)
    films = [io.BytesIO() for _ in range(2000)]
    for film in films:
        pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(film, "PNG", compress_level=0)
    assert len({film.tell() for film in films}) == 1
    assert len({checksum(film.getvalue(), "png") for film in films}) == 2000  # CRC-32 tells 1970 apart


def test_a_patient_is_one_whatever_the_spelling(two: tuple[Path, Path], tmp_path: Path) -> None:
    films = tmp_path / "films"
    write_chexpert(films, "train", range(30, 33))
    for folder in sorted((films / "train").iterdir()):
        folder.rename(folder.with_name(folder.name.replace("patient000", "patient")))
    (films / "train.csv").write_text((films / "train.csv").read_text().replace("/patient000", "/patient"))
    make_shards(films, tmp_path / "w", default_options(dev=0))
    grown = read_shards([two[0], tmp_path / "w"])
    patients = set(grown.open("train").table["patient"].to_pylist())
    assert ("patient00030" in patients, "patient30" in patients) == (True, False)
    assert grown.manifest.split("train").patients == len(patients)


def test_studies_that_each_folder_numbers_are_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    columns = (("path", "Image"), ("patient", "MRN"), ("Edema", "Edema"))
    for out in folders:
        films, name = tmp_path / f"films-{out.name}", out.name
        for number in range(2):
            draw(films / f"{name}{number}.png", 2 * ord(name) + number)
        (films / "table.csv").write_text(f"Image,MRN,Edema\n{name}0.png,7,1\n{name}1.png,7,1\n")
        make_shards(films, out, default_options(dev=0.0), name="table", columns=columns)
    shards = open_shards(folders)
    assert len(shards["train"].studies().samples.rows) == shards.manifest.split("train").studies == 4
    assert count_rows(load_tables(folders, None, "all"))["studies"] == 4


def test_a_patient_in_two_splits_of_two_folders_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_set(tmp_path, range(30, 33), split="valid")
    message = (
        rf"^patient00030 is in (train|dev) of {two[0]} and in valid of {other}; splits must not share patients "
        r"\(if these are two people, shard one of the folders with a `name` of its own\)$"
    )
    with pytest.raises(DataError, match=message):
        read_shards([two[0], other])
    assert read_shards([two[1], other]).open("valid").table.num_rows == 6


def test_different_policies_have_to_be_decided(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_set(tmp_path, range(50, 54), policies={"uncertain": "ones", "blank": "zeros"})
    train = open_shards([two[0], other])["train"]
    with refused("`uncertain`: the folders of shards have different policies; give one"):
        train.batches(2, 32, epoch=0)
    train.batches(2, 32, epoch=0, uncertain="ones")


def test_stats_count_several_sets_and_each(two: tuple[Path, Path]) -> None:
    done = run_pipeline("stats", *two, "--by", "set", "--format", "json")
    groups = json.loads(done.stdout)["by"]["groups"]
    for name, folder in zip(("chexpert", "childrens"), two, strict=True):
        images = sum(split.samples for split in read_manifest(folder).splits.values())
        assert groups.pop(name)["images"] == images
    assert groups == {}


def test_a_set_can_be_named(two: tuple[Path, Path]) -> None:
    own = dict.fromkeys(("name", "title", "patients"), "childrens")
    assert read_manifest(two[1]).dataset == own | {"license": "not stated", "paper": ""}
