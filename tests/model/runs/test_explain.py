"""predict --heatmaps, gallery and localize, on a run of one epoch."""

import json
from pathlib import Path

import click
import pandas as pd
import pytest
from PIL import Image

from pipeline import DataError
from pipeline.labels import LABELS
from pipeline.manifest import Manifest
from tests.model.runs.test_use import call_train, run, trained  # noqa: F401 - fixtures


def test_predict_writes_a_picture_for_the_highest_scores(run: Path, tmp_path: Path) -> None:  # noqa: F811
    Image.effect_noise((80, 60), 50).save(tmp_path / "a.png")
    words = ("predict", "--run", run, "--out", tmp_path / "s.csv", "--heatmaps", tmp_path / "maps")
    assert call_train(*words, "--heatmap-labels", 2, tmp_path / "a.png") == 0
    scores = pd.read_csv(tmp_path / "s.csv").loc[0, list(LABELS)].astype(float)
    expected = {f"00001-a.png-{name.lower().replace(' ', '-')}.png" for name in scores.nlargest(2).index}
    assert {path.name for path in (tmp_path / "maps").iterdir()} == expected


def test_gallery_needs_consent_and_names_no_patient(
    run: Path,  # noqa: F811
    sample_shards: tuple[Path, Manifest],
    tmp_path: Path,
) -> None:
    out = tmp_path / "gallery.html"
    words = ("gallery", "--run", run, "--shards", sample_shards[0], "--n", 1, "--out", out)
    with pytest.raises(click.UsageError, match="add --images"):
        call_train(*words)
    assert call_train(*words, "--images") == 0
    page = out.read_text()
    assert "License: none needed: the films show no patient" in page
    assert "patient0" not in page
    assert page.count("its heat map") == page.count("<img") / 2 > 14


def test_localize_measures_the_boxes_of_drawn_signs(
    run: Path,  # noqa: F811
    sample_shards: tuple[Path, Manifest],
    tmp_path: Path,
) -> None:
    words = ("localize", "--run", run, "--shards", sample_shards[0], "--boxes")
    assert call_train(*words, sample_shards[0].parent / "boxes.csv") == 0
    found = json.loads((run / "localization-valid.json").read_text())
    assert found["splits"] == ["valid"]
    assert found["labels"]["all"]["cells"] > 20
    bad = tmp_path / "boxes.csv"
    bad.write_text("key,label,x,y,w,h\npatient1,Edema,1,2,3,\n")
    with pytest.raises(DataError, match=r"boxes\.csv, line 2: x,y,w,h are '1,2,3,None', not four numbers$"):
        call_train(*words, bad)
    pickled = tmp_path / "map.pkl"
    pickled.write_bytes(b"x")
    with pytest.raises(DataError, match=r"a pickle would run code$"):
        call_train(*words, pickled)
