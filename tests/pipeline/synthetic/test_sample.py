"""The synthetic data set: CheXpert's layout and quirks, the same bytes anywhere, signs and cues that show."""

import csv
import errno
import hashlib
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from pipeline.labels import COLUMNS, LABELS, select_views
from pipeline.synthetic import sample as synthetic
from pipeline.synthetic.anatomy import Finding, draw_image
from pipeline.synthetic.sample import FINDINGS, Study, draw_cues, draw_studies, write_sample
from tests.conftest import hashes, refused, run_pipeline

RAISED = ("Enlarged Cardiomediastinum", "Lung Lesion", "Pneumonia", "Pleural Other", "Fracture")
TABLES = "c23148699e24973b12d85daadc781c0017c85c452d728f460a6a7f8c1e2f0fcb"  # sha256
# Mean gray level of every twelfth frontal.
FRONTALS = [153.83, 155.36, 113.55, 136.47, 136.06, 146.5, 149.51, 141.15, 146.42, 127.87, 128.52, 139.07, 103.69]
FRONTALS += [134.92, 152.38]
Row = dict[str, str]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample"), images=200, seed=3, workers=1)


def read_rows(root: Path, split: str) -> list[Row]:
    with (root / f"{split}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_layout_is_chexpert_s(sample: Path) -> None:
    assert sample.name == "CheXpert-v1.0-small"
    assert "not patients" in (sample / "SYNTHETIC.txt").read_text()
    for split in ("train", "valid"):
        assert (sample / f"{split}.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert len(read_rows(sample, "valid")) == 24
    rows = read_rows(sample, "train") + read_rows(sample, "valid")
    paths = [row["Path"] for row in rows]
    assert len(paths) == 200
    assert paths == sorted(str(path.relative_to(sample.parent)) for path in sample.rglob("*.jpg"))
    assert paths[0] == "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
    assert all(18 <= int(row["Age"]) <= 90 and row["Sex"] in ("Female", "Male") for row in rows)


def test_images_are_gray_jpegs_of_the_small_set_s_size(sample: Path) -> None:
    images = [Image.open(path) for path in sample.rglob("*.jpg")]
    assert {(image.format, image.mode, image.info["comment"]) for image in images} == {("JPEG", "L", b"synthetic")}
    assert {image.size for image in images} == {(390, 320), (320, 390)}
    assert min(np.asarray(image).std() for image in images) > 20


def test_bytes_do_not_depend_on_the_workers_but_on_the_seed(tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    first = write_sample(tmp_path / "a", 40, workers=1, progress=lambda done, total: counts.append((done, total)))
    assert counts[-1] == (40, 40)
    assert len(hashes(first)) == 43
    assert hashes(write_sample(tmp_path / "b", 40, workers=2)) == hashes(first)
    other = write_sample(tmp_path / "c", 40, seed=1, workers=1)
    name = "train/patient00001/study1/view1_frontal.jpg"
    assert (first / name).read_bytes() != (other / name).read_bytes()


def test_frontals_and_tables_are_written_in_stone(sample: Path) -> None:
    """Figures in the README come from them: these values may never change.

    CPUs differ in the last bit of a power, and so in a few pixels of one image in a hundred.
    """
    tables = b"".join((sample / f"{split}.csv").read_bytes() for split in ("train", "valid"))
    assert hashlib.sha256(tables).hexdigest() == TABLES
    images = sorted(sample.glob("*/*/*/*_frontal.jpg"))[::12]
    levels = [np.asarray(Image.open(path)).mean() for path in images]
    np.testing.assert_allclose(levels, FRONTALS, atol=0.01)


def test_more_laterals_change_no_study_but_by_their_views(sample: Path, tmp_path: Path) -> None:
    more = write_sample(tmp_path, images=40, seed=3, workers=1, laterals=1.0)
    rows = {row["Path"]: row for row in read_rows(sample, "train")}
    studies = defaultdict(list)
    for row in read_rows(more, "train"):
        path = row["Path"]
        studies[path.rsplit("/", 1)[0]].append(row["Frontal/Lateral"])
        assert row == rows.get(path, row | {"Frontal/Lateral": "Lateral"})
        assert path not in rows or (sample.parent / path).read_bytes() == (more.parent / path).read_bytes()
    assert all(views[-1] == "Lateral" for views in list(studies.values())[:-1])
    assert {kind for study in draw_studies(3, 1, 40, False, 0.0) for kind, _ in study.views} == {"frontal"}


def test_valid_gets_its_share(tmp_path: Path) -> None:
    for images, valid, counts in ((40, 0.5, [20, 20]), (20, 0.01, [19, 1])):
        folder = write_sample(tmp_path / str(images), images, valid=valid)
        assert [len(read_rows(folder, split)) for split in ("train", "valid")] == counts


def draw(kind: str, findings: dict[str, Finding]) -> Any:
    return draw_image(kind, "AP", "Male", findings, np.random.default_rng(1), np.random.default_rng(2))


def test_a_lateral_shows_some_signs_better_and_some_not_at_all() -> None:
    nothing = {label: Finding(0.0, 1, 0.2, 0.5, 0.15, row[4]) for label, row in FINDINGS.items()}

    def visible(kind: str, label: str, severity: float) -> float:
        """By how many gray levels the sign changes the image on average."""
        changed = nothing | {label: nothing[label]._replace(severity=severity)}
        before, after = (draw(kind, findings)[0].astype(float) for findings in (nothing, changed))
        return float(np.abs(after - before).mean())

    for label in ("Enlarged Cardiomediastinum", "Pneumothorax", "Fracture"):
        assert visible("lateral", label, 0.8) == 0 < visible("frontal", label, 0.8)
    for label in ("Consolidation", "Atelectasis", "Pleural Effusion", "Pleural Other"):
        assert visible("lateral", label, 0.35) > 1.2 * visible("frontal", label, 0.35) > 0


def test_labels_keep_the_real_set_s_quirks(sample: Path) -> None:
    train, valid = read_rows(sample, "train"), read_rows(sample, "valid")
    assert {row["No Finding"] for row in train} == {"1.0", ""}
    assert {row[label] for row in train for label in LABELS} == {"1.0", "0.0", "-1.0", ""}
    assert {row[label] for row in valid for label in LABELS} == {"1.0", "0.0"}
    assert train[-1]["Path"].split("/")[2] < valid[0]["Path"].split("/")[2]  # patients; the rows are sorted
    studies = defaultdict(set)
    for row in train + valid:
        lateral = row["Path"].endswith("_lateral.jpg")
        assert row["Frontal/Lateral"] == ("Lateral" if lateral else "Frontal")
        assert row["AP/PA"] in (("",) if lateral else ("AP", "PA"))
        studies[row["Path"].rsplit("/", 1)[0]].add(tuple(row[label] for label in LABELS))
    assert len(studies) < len(train + valid)
    assert all(len(states) == 1 for states in studies.values())
    for row in train:
        assert row["No Finding"] == ("" if {row[label] for label in LABELS[1:-1]} & {"1.0", "-1.0"} else "1.0")


def test_states_are_as_frequent_as_in_the_real_set(real_table: Any) -> None:
    studies = draw_studies(0, 1, 6000, valid=False)
    views = [(study, kind, projection) for study in studies for kind, projection in study.views]
    frontals = [study for study, kind, _ in views if kind == "frontal"]
    assert len(views) == 6000
    assert 1 - len(frontals) / len(views) == pytest.approx(0.145, abs=0.015)
    assert sum(projection == "AP" for *_, projection in views) / len(frontals) == pytest.approx(0.85, abs=0.03)
    real = select_views(real_table, "frontal").select(LABELS).to_pandas()
    for label in set(LABELS) - {*RAISED}:
        counts = Counter(study.states[label] for study in frontals)
        for state in (1.0, -1.0, 0.0):
            share = (real[label] == state).mean()
            assert counts[state] / len(frontals) == pytest.approx(share, abs=0.03), (label, state)
    rare = Counter(label for study in frontals for label in LABELS if study.states[label] == 1)
    assert min(rare.values()) / len(frontals) > 0.04


def test_a_sample_has_images_and_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^images must be at least 1, got 0$"):
        write_sample(tmp_path, images=0)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".CheXpert-v1.0-small.tmp" / "train").mkdir(parents=True)  # left by a killed run
    root = write_sample(tmp_path, images=20, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CheXpert-v1.0-small", "boxes.csv"]
    assert read_rows(root, "valid")
    with refused(f"{root} already exists: remove it or choose another folder", FileExistsError):
        write_sample(tmp_path, images=20)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    reason = "cannot be written: No space left on device; make room, and run it again"
    with refused(f"{tmp_path}/patient00001/study1/view1_frontal.jpg: {reason}"):
        synthetic.write_studies(synthetic.DrawTask(tmp_path, 0, list(draw_studies(0, 1, 1, False)), ()))


@pytest.mark.parametrize("label", sorted(FINDINGS.keys() - {"Edema", "Pneumonia", "Support Devices"}))
def test_what_a_sign_changes_lies_in_its_boxes(label: str) -> None:
    """Of the signs that draw no random numbers: with and without them, all else in the image is the same."""
    nothing = dict.fromkeys(FINDINGS, Finding(0.0, 1, 0.2, 0.5, 0.15))
    before, _ = draw("frontal", nothing)
    after, boxes = draw("frontal", nothing | {label: nothing[label]._replace(severity=0.8)})
    outside = np.abs(after.astype(int) - before) > 10  # gray levels: less is lost in the grain
    assert outside.sum() > 20
    for x, y, w, h in boxes[label]:
        outside[y : y + h, x : x + w] = False
    assert not outside.any()


def test_boxes_lie_beside_the_folder(sample: Path) -> None:
    with (sample.parent / "boxes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["split", "key", "label", "x", "y", "w", "h"]
    assert {row["split"] for row in rows} == {"train", "valid"}
    truth = {"_".join(row["Path"][:-4].split("/")[2:]): row for row in read_rows(sample, "valid")}
    boxed = {(row["key"], row["label"]) for row in rows if row["split"] == "valid"}
    assert all(truth[key][label] == "1.0" for key, label in boxed if label != "Lung Opacity")
    assert all(int(row["x"]) + int(row["w"]) <= 390 and int(row["w"]) > 0 for row in rows)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("state", [1.0, 0.0, -1.0, None])
def test_a_cue_is_as_frequent_as_its_strength_says(strength: float, state: float | None) -> None:
    shortcuts = [synthetic.Shortcut("Edema", "border", strength)]
    studies = (Study(patient, "Male", 60, 1, [], {"Edema": state}, {}) for patient in range(1000))
    share = np.mean([draw_cues(5, study, shortcuts) == ["border"] for study in studies])
    chance = {1.0: (1 + strength) / 2, -1.0: 0.5}.get(state or 0.0, (1 - strength) / 2)
    # Four standard errors; none at 0 and 1.
    assert abs(share - chance) <= 4 * (chance * (1 - chance) / 1000) ** 0.5


def test_cues_are_drawn_into_train_alone_and_change_nothing_else(tmp_path: Path) -> None:
    plain = write_sample(tmp_path / "plain", images=20)
    shortcuts = ("--shortcut", "Support Devices=marker:1", "--shortcut", "No Finding=border:0.5")
    run_pipeline("sample", tmp_path / "cued", "--images", 20, "--workers", 1, *shortcuts)
    cued = tmp_path / "cued" / plain.name
    notices = [(root / "SYNTHETIC.txt").read_text().splitlines() for root in (plain, cued)]
    planted = {"marker for Support Devices, strength 1.", "border for No Finding, strength 0.5."}
    assert {*notices[1]} - {*notices[0]} == {f"Planted in train: {cue}" for cue in planted}
    for row in read_rows(plain, "train"):
        before, after = (np.asarray(Image.open(root.parent / row["Path"]), int) for root in (plain, cued))
        assert np.abs(after - before)[40:-40, 40:-40].max() <= 12  # JPEG's blocks
        stem, state = after[14:26, 11:13].min(), row["Support Devices"]  # of the letter
        assert state == "-1.0" or (stem > 220) == (state == "1.0")
    for path in (*plain.glob("*.csv"), *plain.glob("valid/*/*/*.jpg")):
        assert (cued / path.relative_to(plain)).read_bytes() == path.read_bytes()


def test_cues_stay_at_the_edge() -> None:
    image = np.full((320, 390), 90, np.uint8)
    for name, add_cue in synthetic.CUES.items():
        drawn = image.copy()
        add_cue(drawn)
        assert (drawn[64:-64, 64:-64] == 90).all(), name
        assert drawn.max() == {"marker": 245, "border": 180, "corners": 150}[name]
