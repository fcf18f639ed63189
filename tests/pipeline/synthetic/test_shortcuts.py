"""Cues tied to a label: as often as their strength says, in train alone, and nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.base.errors import DataError
from pipeline.synthetic.sample import Study, draw_cues, write_sample
from pipeline.synthetic.shortcuts import CUES, Shortcut, parse_shortcut
from tests.conftest import run_pipeline


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("state", [1.0, 0.0, -1.0, None])
def test_a_cue_is_as_frequent_as_its_strength_says(strength: float, state: float | None) -> None:
    shortcuts = [Shortcut("Edema", "border", strength)]
    study = Study(1, (), {"Edema": state}, {})
    had = [draw_cues(5, patient, study, shortcuts) == ["border"] for patient in range(1000)]
    chance = {1.0: (1 + strength) / 2, -1.0: 0.5}.get(0.0 if state is None else state, (1 - strength) / 2)
    # Four standard errors; none at 0 and 1.
    assert abs(np.mean(had) - chance) <= 4 * (chance * (1 - chance) / 1000) ** 0.5


def test_cues_are_drawn_into_train_alone_and_change_nothing_else(tmp_path: Path) -> None:
    plain = write_sample(tmp_path / "plain", images=20)
    done = run_pipeline(
        "sample", tmp_path / "cued", "--images", 20, "--workers", 1,
        "--shortcut", "Support Devices=marker:1", "--shortcut", "No Finding=border:0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cued = tmp_path / "cued" / plain.name
    added = (cued / "SYNTHETIC.txt").read_text().removeprefix((plain / "SYNTHETIC.txt").read_text())
    assert added == (
        "Planted in train: marker for Support Devices, strength 1.\n"
        "Planted in train: border for No Finding, strength 0.5.\n"
    )
    for name in ("train.csv", "valid.csv"):
        assert (cued / name).read_bytes() == (plain / name).read_bytes()
    states = [line.split(",")[-1] for line in (plain / "train.csv").read_text().splitlines()[1:]]
    images = sorted(plain.glob("train/*/*/*.jpg"))
    for path, state in zip(images, states, strict=True):
        before, after = (np.asarray(Image.open(root / path.relative_to(plain)), int) for root in (plain, cued))
        assert np.abs(after - before)[40:-40, 40:-40].max() <= 12  # JPEG's blocks
        stem = after[14:26, 11:13].min()  # of the letter
        assert state == "-1.0" or (stem > 220) == (state == "1.0")
    for path in plain.glob("valid/*/*/*.jpg"):
        assert (cued / path.relative_to(plain)).read_bytes() == path.read_bytes()


def test_cues_stay_at_the_edge() -> None:
    image = np.full((320, 390), 90, np.uint8)
    for name, draw in CUES.items():
        drawn = image.copy()
        draw(drawn)
        assert (drawn[64:-64, 64:-64] == 90).all(), name
        assert drawn.max() == {"marker": 245, "border": 180, "corners": 150}[name]


@pytest.mark.parametrize(
    "text", ["Flu=marker:0.9", "Edema=dot:0.9", "Edema=marker", "Edema=marker:nan", "Edema=marker:1.5"]
)
def test_a_wrong_shortcut_is_refused(text: str) -> None:
    with pytest.raises(DataError) as raised:
        parse_shortcut(text)
    assert str(raised.value) == (
        f"'{text}' is not LABEL=CUE:STRENGTH: a label, one of marker, border, corners, and a number from 0 to 1"
    )


def test_a_cue_for_two_labels_is_refused(tmp_path: Path) -> None:
    twice = [option for label in ("Edema", "Fracture") for option in ("--shortcut", f"{label}=border:1")]
    done = run_pipeline("sample", tmp_path / "out", *twice)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "Error: --shortcut: a cue can be tied to one label")
    assert not (tmp_path / "out").exists()
