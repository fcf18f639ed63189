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
from tests.training import WORDS, Capture, call_train

TINY = (*WORDS, "--batch-size", 4, "--workers", 1)
OTHERS = "evaluate on others, or go on with `shared_images`"


@pytest.fixture(scope="module")
def folder(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, scored on its train; `again`, its images divided otherwise; `same-names`, other images of its patients."""
    folder = tmp_path_factory.mktemp("overlap")
    words = ("--shards", originals / "shards", "--run", folder / "run")
    make_shards(originals / "CheXpert-v1.0-small", folder / "again", default_options(seed=1))
    write_chexpert(folder / "CheXpert", "train", range(1, 17), seed=5)
    write_chexpert(folder / "CheXpert", "valid", range(40, 44), seed=5)
    make_shards(folder / "CheXpert", folder / "same-names")
    assert call_train("train", *words, *TINY, "--uncertain", "ignore") == 0
    assert call_train("evaluate", *words, "--split", "train", "--workers", 1) == 0
    return folder


@pytest.fixture
def again(folder: Path) -> Path:
    return folder / "again"


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def read_frame(shards: Path, *names: str) -> pd.DataFrame:
    manifest = read_manifest(shards)
    return pd.concat([read_table(shards, manifest.split(name)).to_pandas() for name in names])


def evaluate(run: Path, shards: Path, split: str, *words: object) -> dict[str, object]:
    options = ("--shards", shards, "--run", run, "--split", split, "--workers", 1)
    assert call_train("evaluate", *options, *words) == 0
    head = read_evaluation(run / f"evaluation-{split}-{hash_file(shards / 'manifest.json')[:8]}.json").head
    return {key: value for key, value in head.items() if key.startswith("shared_")}


def test_best_weights_keep_checksums_and_no_names(originals: Path, run: Path) -> None:
    names: set[int] = set()
    for entry, split in zip(read_seen(run), ("train", "dev"), strict=True):
        used = read_frame(originals / "shards", split)
        assert (entry["split"], entry["run"]) == (split, "")
        assert sorted(entry["images"].tolist()) == sorted(used["crc"].astype(np.int64) * 2**32 + used["length"])
        assert len(entry["patients"]) == used["patient"].nunique()
        names |= set(entry["patients"].tolist())
    assert len(names) == 16
    assert b"patient0" not in (run / "best.pt").read_bytes()
    assert "shared_images" not in json.loads((run / "evaluation-train.json").read_text())
    assert json.loads((run / "evaluation-valid.json").read_text())["shared_images"] == 0
    assert "Of valid, 0 patients and 0 images are among" in (run / "model-card.md").read_text()


def test_images_that_the_run_trained_on_are_refused(again: Path, originals: Path, run: Path, capfd: Capture) -> None:
    images = read_frame(again, "dev")  # the same files, so the same keys
    seen = images[images["key"].isin(read_frame(originals / "shards", "train")["key"])]
    assert len(seen) > 0
    overlap = f"{again}, dev: {run} trained on {len(seen)} of these {len(images)} images"
    before = sorted(run.iterdir())
    with refused(f"{overlap}; {OTHERS}"):
        evaluate(run, again, "dev")
    assert sorted(run.iterdir()) == before
    expected = {"shared_patients": seen["patient"].nunique(), "shared_images": len(seen)}
    assert evaluate(run, again, "dev", "--shared-images") == expected
    assert f"{overlap}: its scores of them are too good\n" in capfd.readouterr().err


def test_predict_reports_how_many_images_the_run_learned_from(
    originals: Path, run: Path, tmp_path: Path, capfd: Capture
) -> None:
    films = originals / "CheXpert-v1.0-small"
    for split, known in (("train", len(read_frame(originals / "shards", "train", "dev"))), ("valid", 0)):
        assert call_train("predict", "--run", run, "--out", tmp_path / "scores.csv", films / split) == 0
        images = len([*(films / split).rglob("*.jpg")])
        warning = f"{run} was trained on {known} of these {images} images: its scores of them are too good\n"
        assert (warning in capfd.readouterr().err) == (known > 0)


def test_sets_that_published_weights_have_seen_are_no_external_test(
    folder: Path, originals: Path, run: Path, tmp_path: Path, capfd: Capture
) -> None:
    """On the run's own shards they are reported; elsewhere refused, as images are."""
    others, best = folder / "same-names", load_checkpoint(run / "best.pt")
    nothing = torch.zeros(0, dtype=torch.int64)
    entry = {"run": "eva.pt", "split": "train", "images": nothing, "patients": nothing, "sets": ["nih", "chexpert"]}
    save_checkpoint(run / "best.pt", best | {"seen": [*best["seen"], entry]})
    overlap = f"{others}, valid: eva.pt was trained on images of chexpert"
    with refused(f"{overlap}; {OTHERS}"):
        evaluate(run, others, "valid")
    assert evaluate(run, others, "valid", "--shared-images") == {}
    assert f"{overlap}: if on these, figures are too good\n" in capfd.readouterr().err
    assert call_train("evaluate", "--run", run, "--workers", 1) == 0
    assert "valid: eva.pt was trained on images of chexpert: if on these, figures" in capfd.readouterr().err
    film = next((originals / "CheXpert-v1.0-small" / "valid").rglob("*.jpg"))
    assert call_train("predict", "--run", run, "--out", tmp_path / "scores.csv", film) == 0
    warning = "eva.pt: it was trained on nih, chexpert: if on these images, figures are too good\n"
    assert warning in capfd.readouterr().err


def test_patients_that_the_run_trained_on_are_counted(folder: Path, run: Path, capfd: Capture) -> None:
    others = folder / "same-names"
    patients = read_frame(others, "train")["patient"].nunique()
    assert evaluate(run, others, "train") == {"shared_patients": patients, "shared_images": 0}
    names = f"{others}, train: {patients} patient names are among those that {run} trained on"
    warning = f"{names}: if they are the same people, figures are too good\n"
    assert capfd.readouterr().err.count(warning) == 1
    assert evaluate(run, others, "valid") == {"shared_patients": 0, "shared_images": 0}
    assert "trained on" not in capfd.readouterr().err


def test_a_run_compared_with_is_checked_too(again: Path, run: Path, tmp_path: Path) -> None:
    other, images = tmp_path / "other", len(read_frame(again, "train"))
    assert call_train("train", "--shards", again, "--run", other, *TINY) == 0
    evaluate(run, again, "train", "--shared-images")
    words = ("evaluate", "--run", other, "--shards", again, "--split", "train", "--workers", 1)
    assert call_train(*words) == 0  # its own
    for conditions in ([], ["sex=Female"]):  # its own, which do not choose what is scored
        config = json.loads((run / "config.json").read_text()) | {"where": conditions}
        (run / "config.json").write_text(json.dumps(config))
        overlap = rf"^{again}, train: {run} trained on \d+ of these {images} images; evaluate"
        with pytest.raises(DataError, match=overlap):
            call_train(*words, "--against", run)
    assert call_train(*words, "--against", run, "--shared-images") == 0


def test_a_students_dev_may_not_be_in_its_teachers_train(
    again: Path, originals: Path, run: Path, tmp_path: Path
) -> None:
    student = ("train", "--run", tmp_path / "student", *TINY, "--uncertain", "selftrained", "--teacher")
    assert call_train(*student, run, "--shards", originals / "shards") == 0
    dev, train = read_frame(again, "dev"), read_frame(originals / "shards", "train")
    count = int(dev["key"].isin(train["key"]).sum())
    assert count > 0
    shutil.rmtree(tmp_path / "student")
    overlap = f"{again}, dev: {run} trained on {count} of these {len(dev)} images"
    message = f"{overlap}; keep its split (`dev`, `seed`), or start from another"
    with refused(message):
        call_train(*student, run, "--shards", again)
    assert not (tmp_path / "student").exists()
    # Nor in one of an ensemble that teaches, whose folder knows its members' shards.
    other, both = Path(shutil.copytree(run, tmp_path / "other")), tmp_path / "both"
    members = ("--run", run, "--run", other, "--out", both)
    assert call_train("evaluate", *members, "--split", "train", "--workers", 1) == 0
    assert call_train("evaluate", "--run", both, "--workers", 1) == 0
    with refused(message):
        call_train(*student, both, "--shards", again)
    assert call_train(*student, both, "--shards", originals / "shards") == 0


def test_what_weights_have_seen_is_handed_on(
    folder: Path, again: Path, originals: Path, run: Path, tmp_path: Path
) -> None:
    """By `init` of its best.pt alone, to a run on other images, and from there to the next."""
    own, second, third = originals / "shards", tmp_path / "second", tmp_path / "third"
    best = Path(shutil.copy(run / "best.pt", tmp_path / "weights.pt"))
    start = ("train", "--run", second, *TINY, "--init", best, "--shards")
    with pytest.raises(DataError, match=rf"^{again}, dev: .*weights.pt trained on \d+ of these .*; keep its split"):
        call_train(*start, again)
    assert not second.exists()
    assert call_train(*start, folder / "same-names") == 0
    with pytest.raises(DataError, match=rf"^{again}, dev: .*weights.pt trained on \d+ of these .*; evaluate on others"):
        evaluate(second, again, "dev")
    assert call_train("train", "--shards", own, "--run", third, *TINY, "--init", second) == 0
    assert [(entry["split"], entry["run"]) for entry in read_seen(third)] == [
        (split, source) for source in ("", str(second / "best.pt"), str(best)) for split in ("train", "dev")
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
