"""Patients and images that a run trained on are noticed where it is evaluated, or taught from, on other shards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model.checkpoint import load_checkpoint, save_checkpoint
from model.runs.overlap import read_seen
from pipeline import DataError
from pipeline.base.files import hash_file
from pipeline.manifest import read_manifest, read_table
from pipeline.measure.evaluation import read_evaluation
from tests.conftest import default_options, make_shards, refused, write_chexpert
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
    name = f"evaluation-{split}-{hash_file(shards / 'manifest.json')[:8]}.json"
    head = read_evaluation(run / name).head
    return {key: value for key, value in head.items() if key.startswith("shared_")}


def test_best_weights_keep_checksums_and_no_names(originals: Path, run: Path) -> None:
    own = originals / "shards"
    names: set[int] = set()
    for entry, split in zip(read_seen(run), ("train", "dev"), strict=True):
        used = read_frame(own, split)
        assert (entry["split"], entry["run"]) == (split, "")
        assert sorted(entry["images"].tolist()) == sorted(used["crc"].astype(np.int64) * 2**32 + used["length"])
        assert len(entry["patients"]) == used["patient"].nunique()
        names |= set(entry["patients"].tolist())
    assert len(names) == 16
    assert b"patient0" not in (run / "best.pt").read_bytes()
    assert "shared_images" not in json.loads((run / "evaluation-train.json").read_text())
    assert json.loads((run / "evaluation-valid.json").read_text())["shared_images"] == 0
    assert "Of valid, 0 patients and 0 images are among" in (run / "model-card.md").read_text()


def test_images_that_the_run_trained_on_are_refused(
    folder: Path, originals: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = folder / "again"
    images = read_frame(again, "dev")  # the same files, so the same keys
    seen = read_frame(originals / "shards", "train")["key"]
    count = int(images["key"].isin(seen).sum())
    assert count > 0
    said = f"{again}, dev: {run} trained on {count} of these {len(images)} images"
    before = sorted(run.iterdir())
    with refused(f"{said}; evaluate on others, or go on with `shared_images`"):
        evaluate(run, again, "dev")
    assert sorted(run.iterdir()) == before
    patients = images.loc[images["key"].isin(seen), "patient"].nunique()
    expected = {"shared_patients": patients, "shared_images": count}
    assert evaluate(run, again, "dev", "--shared-images") == expected
    assert f"{said}: its scores of them are too good\n" in capfd.readouterr().err


def test_predict_says_how_many_images_the_run_learned_from(
    originals: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    films = originals / "CheXpert-v1.0-small"
    for split, known in (("train", len(read_frame(originals / "shards", "train", "dev"))), ("valid", 0)):
        assert call_train("predict", "--run", run, "--out", tmp_path / "scores.csv", films / split) == 0
        images = len([*(films / split).rglob("*.jpg")])
        said = f"{run} was trained on {known} of these {images} images: its scores of them are too good\n"
        assert (said in capfd.readouterr().err) == (known > 0)


def test_sets_that_published_weights_have_seen_are_no_external_test(
    folder: Path, originals: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At home they are told; elsewhere refused, as images are."""
    others, best = folder / "same-names", load_checkpoint(run / "best.pt")
    nothing = torch.zeros(0, dtype=torch.int64)
    entry = {"run": "eva.pt", "split": "train", "images": nothing, "patients": nothing, "sets": ["nih", "chexpert"]}
    save_checkpoint(run / "best.pt", best | {"seen": [*best["seen"], entry]})
    said = f"{others}, valid: eva.pt was trained on images of chexpert"
    with pytest.raises(DataError, match=f"^{said}; evaluate on others, or go on with `shared_images`$"):
        evaluate(run, others, "valid")
    assert evaluate(run, others, "valid", "--shared-images") == {}
    assert f"{said}: if on these, figures are too good\n" in capfd.readouterr().err
    assert call_train("evaluate", "--run", run, "--workers", 1) == 0
    assert "valid: eva.pt was trained on images of chexpert: if on these, figures" in capfd.readouterr().err
    film = next((originals / "CheXpert-v1.0-small" / "valid").rglob("*.jpg"))
    assert call_train("predict", "--run", run, "--out", tmp_path / "scores.csv", film) == 0
    said = "eva.pt: it was trained on nih, chexpert: if on these images, figures are too good\n"
    assert said in capfd.readouterr().err


def test_patients_that_the_run_trained_on_are_counted(
    folder: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    others = folder / "same-names"
    patients = read_frame(others, "train")["patient"].nunique()
    assert evaluate(run, others, "train") == {"shared_patients": patients, "shared_images": 0}
    assert (
        capfd.readouterr().err.count(
            f"{others}, train: {patients} patient names are among those that {run} trained on: "
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
    for conditions in ([], ["sex=Female"]):  # its own, which do not choose what is scored
        config = json.loads((run / "config.json").read_text()) | {"where": conditions}
        (run / "config.json").write_text(json.dumps(config))
        images = len(read_frame(again, "train"))
        with pytest.raises(
            DataError, match=rf"^{again}, train: {run} trained on \d+ of these {images} images; evaluate"
        ):
            call_train("evaluate", "--run", other, *options, "--against", run)
    assert call_train("evaluate", "--run", other, *options, "--against", run, "--shared-images") == 0


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
    with refused(
        f"{again}, dev: {run} trained on {count} of these {len(dev)} images; "
        "keep its split (`dev`, `seed`), or start from another"
    ):
        call_train("train", "--shards", again, *student)
    assert not (tmp_path / "student").exists()
    # Nor in one of an ensemble that teaches, whose folder knows its members' shards.
    two, both = Path(shutil.copytree(run, tmp_path / "two")), tmp_path / "both"
    members = ("--run", run, "--run", two, "--out", both)
    assert call_train("evaluate", *members, "--split", "train", "--workers", 1) == 0
    assert call_train("evaluate", "--run", both, "--workers", 1) == 0
    with pytest.raises(DataError, match=rf"^{again}, dev: {run} trained on {count} of these"):
        call_train("train", "--shards", again, *student[:-1], both)
    assert call_train("train", "--shards", originals / "shards", *student[:-1], both) == 0


def test_what_weights_have_seen_is_handed_on(
    folder: Path, originals: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By `init` of its best.pt alone, to a run on other images, and from there to the next."""
    again, own, others = folder / "again", originals / "shards", folder / "same-names"
    best = Path(shutil.copy(run / "best.pt", tmp_path / "weights.pt"))
    second, third = tmp_path / "second", tmp_path / "third"
    with pytest.raises(DataError, match=rf"^{again}, dev: .*weights.pt trained on \d+ of these .*; keep its split"):
        call_train("train", "--shards", again, "--run", second, *TINY, "--init", best)
    assert not second.exists()
    assert call_train("train", "--shards", others, "--run", second, *TINY, "--init", best) == 0
    with pytest.raises(DataError, match=rf"^{again}, dev: .*weights.pt trained on \d+ of these .*; evaluate on others"):
        evaluate(second, again, "dev")
    assert call_train("train", "--shards", own, "--run", third, *TINY, "--init", second) == 0
    assert [(entry["split"], entry["run"]) for entry in read_seen(third)] == [
        (split, of) for of in ("", str(second / "best.pt"), str(best)) for split in ("train", "dev")
    ]
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(f"key,label,x,y,w,h\n{read_frame(again, 'dev')['key'].iloc[0]},Edema,1,1,9,9\n")
    elsewhere = ("--shards", again, "--split", "dev")
    at_home = ("--shards", own, "--split", "train")  # of the weights' run, not of a network that starts from them
    fresh = ("embed", "rescnn", "--init", second, "--image-size", 32, "--out", tmp_path / "fresh.arrow")
    for words in (
        ("embed", second, *elsewhere, "--out", tmp_path / "dev.arrow"),
        ("localize", "--run", second, *elsewhere, "--boxes", boxes),
        (*fresh, *elsewhere),
        (*fresh, *at_home),
    ):
        with pytest.raises(DataError, match=r"trained on \d+ of these .*; evaluate on others, or go on with"):
            call_train(*words)
        assert call_train(*words, "--shared-images") == 0
