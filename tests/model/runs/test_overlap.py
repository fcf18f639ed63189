"""Patients and images that a run trained on are noticed where it is evaluated, or taught from, on other shards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest

from model.runs.overlap import TRAINED_ON, count_shared
from pipeline import DataError
from pipeline.manifest import manifest_digest, read_manifest, read_table
from tests.conftest import default_options, make_shards, write_chexpert
from tests.training import WORDS, call_train

TINY = (*WORDS, "--batch-size", 4, "--workers", 1)


@pytest.fixture(scope="module")
def folder(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, scored on its train; `again`, its images divided otherwise; `same-names`, other images of its patients."""
    folder = tmp_path_factory.mktemp("overlap")
    own, run = originals / "shards", folder / "run"
    make_shards(originals / "CheXpert-v1.0-small", folder / "again", default_options(seed=1))
    write_chexpert(folder / "CheXpert", "train", range(1, 17), seed=5)
    write_chexpert(folder / "CheXpert", "valid", range(40, 44), seed=5)
    make_shards(folder / "CheXpert", folder / "same-names")
    assert call_train("train", "--shards", own, "--run", run, *TINY, "--uncertain", "ignore") == 0
    assert call_train("evaluate", "--shards", own, "--run", run, "--split", "train", "--workers", 1) == 0
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def read_frame(shards: Path, *names: str) -> pd.DataFrame:
    manifest = read_manifest(shards)
    return pd.concat([read_table(shards, manifest.split(name)).to_pandas() for name in names])


def evaluate(run: Path, shards: Path, split: str, *words: object) -> dict[str, object]:
    options = ("--shards", shards, "--run", run, "--split", split, "--workers", 1)
    assert call_train("evaluate", *options, *words) == 0
    name = f"evaluation-{split}-{manifest_digest(shards)[:8]}.json"
    found = json.loads((run / name).read_text())
    return {key: value for key, value in found.items() if key.startswith("shared_")}


def test_the_run_keeps_checksums_and_no_names(originals: Path, run: Path) -> None:
    own = originals / "shards"
    kept = pa.ipc.open_file(run / TRAINED_ON).read_all().to_pandas()
    used = read_frame(own, "train", "dev")
    np.testing.assert_array_equal(kept[["crc", "length"]], used[["crc", "length"]])
    assert kept["split"].value_counts().to_dict() == {
        name: read_manifest(own).splits[name].samples for name in ("train", "dev")
    }
    assert len(set(zip(kept["patient"], used["patient"], strict=True))) == used["patient"].nunique() == 16
    assert b"patient0" not in (run / TRAINED_ON).read_bytes()
    assert "shared_images" not in json.loads((run / "evaluation-train.json").read_text())


def test_images_that_the_run_trained_on_are_refused(
    folder: Path, originals: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = folder / "again"
    images = read_frame(again, "dev")  # the same files, so the same keys
    count = int(images["key"].isin(read_frame(originals / "shards", "train", "dev")["key"]).sum())
    assert count == len(images) > 0
    said = f"{again}, dev: {run} trained on {count} of these {count} images"
    before = sorted(run.iterdir())
    with pytest.raises(DataError) as caught:
        evaluate(run, again, "dev")
    assert str(caught.value) == f"{said}; evaluate on others, or go on with `shared_images`"
    assert sorted(run.iterdir()) == before
    patients = images["patient"].nunique()
    expected = {"shared_patients": patients, "shared_images": count}
    assert evaluate(run, again, "dev", "--shared-images") == expected
    assert f"{said}: its scores of them are too good\n" in capfd.readouterr().err


def test_patients_that_the_run_trained_on_are_counted(
    folder: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    others = folder / "same-names"
    patients = read_frame(others, "dev")["patient"].nunique()
    assert evaluate(run, others, "dev") == {"shared_patients": patients, "shared_images": 0}
    assert (
        capfd.readouterr().err.count(
            f"{others}, dev: {patients} patient names are among those that {run} trained on: "
            "if they are the same people, figures are too good\n"
        )
        == 1
    )
    assert evaluate(run, others, "valid") == {"shared_patients": 0, "shared_images": 0}
    assert "trained on" not in capfd.readouterr().err


def test_a_run_compared_with_is_checked_too(folder: Path, originals: Path, run: Path, tmp_path: Path) -> None:
    again, other = folder / "again", tmp_path / "other"
    assert call_train("train", "--shards", again, "--run", other, *TINY) == 0
    evaluate(run, again, "train", "--shared-images")
    options = ("--shards", again, "--split", "train", "--workers", 1)
    assert call_train("evaluate", "--run", other, *options) == 0  # its own
    with pytest.raises(
        DataError, match=rf"^{again}, train: {run} trained on \d+ of these \d+ images; evaluate on"
    ):
        call_train("evaluate", "--run", other, *options, "--against", run)
    assert call_train("evaluate", "--run", other, *options, "--against", run, "--shared-images") == 0


def test_a_run_without_its_list_of_images_is_not_evaluated(folder: Path, run: Path) -> None:
    again, restored = folder / "again", "the command that trained the run writes it again"
    (run / TRAINED_ON).unlink()
    with pytest.raises(DataError) as caught:
        evaluate(run, again, "dev")
    assert str(caught.value) == f"{run / TRAINED_ON}: missing; {restored}"
    pa.feather.write_feather(pa.table({"crc": [1]}), run / TRAINED_ON, compression="uncompressed")
    with pytest.raises(DataError) as caught:
        evaluate(run, again, "dev")
    assert str(caught.value) == f"{run / TRAINED_ON}: damaged; {restored}"


def test_a_student_s_dev_may_not_be_in_its_teacher_s_train(
    folder: Path, originals: Path, run: Path, tmp_path: Path
) -> None:
    student = ("--run", tmp_path / "student", *TINY, "--uncertain", "selftrained", "--teacher", run)
    assert call_train("train", "--shards", originals / "shards", *student) == 0
    again = folder / "again"
    dev, train = read_frame(again, "dev"), read_frame(originals / "shards", "train")
    count = int(dev["key"].isin(train["key"]).sum())
    assert count > 0
    shutil.rmtree(tmp_path / "student")
    with pytest.raises(DataError) as caught:
        call_train("train", "--shards", again, *student)
    assert str(caught.value) == (
        f"{again}, dev: {run} trained on {count} of these {len(dev)} images; "
        "train with the teacher's own split, or take another teacher"
    )
    assert not (tmp_path / "student").exists()


def test_a_dev_held_out_by_the_teacher_is_its_own(originals: Path, run: Path) -> None:
    table = read_table(originals / "shards", read_manifest(originals / "shards").split("dev"))
    patients = len(set(table["patient"].to_pylist()))
    assert count_shared(run, table, "chexpert") == (patients, table.num_rows)
    assert count_shared(run, table, "chexpert", ["train"]) == (0, 0)
