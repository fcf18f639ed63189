"""predict --heatmaps and localize, on a run of one epoch."""

import json
import shutil
from pathlib import Path

import click
import pandas as pd
import pytest
from PIL import Image

from pipeline import DataError, open_shards
from pipeline.labels import LABELS
from pipeline.manifest import Manifest
from tests.training import call_train


def test_predict_writes_a_picture_for_the_highest_scores(run: Path, tmp_path: Path) -> None:
    Image.effect_noise((80, 60), 50).save(tmp_path / "a.png")
    words = ("predict", "--run", run, "--out", tmp_path / "s.csv", "--heatmaps", tmp_path / "maps")
    assert call_train(*words, "--heatmap-labels", 2, tmp_path / "a.png") == 0
    scores = pd.read_csv(tmp_path / "s.csv").loc[0, list(LABELS)].astype(float)
    expected = {f"00001-a.png-{name.lower().replace(' ', '-')}.png" for name in scores.nlargest(2).index}
    assert {path.name for path in (tmp_path / "maps").iterdir()} == expected


def test_maps_are_of_one_run_by_images(run: Path, tmp_path: Path) -> None:
    Image.effect_noise((80, 60), 50).save(tmp_path / "a.png")
    other = shutil.copytree(run, tmp_path / "other")
    words = ("--out", tmp_path / "s.csv", "--heatmaps", tmp_path / "maps", tmp_path / "a.png")
    said = "^--heatmaps is for single images and one run, not for studies or several networks$"
    with pytest.raises(click.UsageError, match=said):
        call_train("predict", "--run", run, "--run", other, *words)
    with pytest.raises(click.UsageError, match=said):
        call_train("predict", "--run", run, "--group-by", "study", *words)
    settings = json.loads((other / "config.json").read_text()) | {"fusion": "max"}
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(click.UsageError, match=said):
        call_train("predict", "--run", other, *words)


def test_localize_measures_the_boxes_of_drawn_signs(
    run: Path, sample_shards: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("localize", "--run", run, "--shards", sample_shards[0], "--boxes")
    assert call_train(*words, sample_shards[0].parent / "boxes.csv") == 0
    then = f"evaluate --run {run} --shards {sample_shards[0]} --split valid --sanity"
    assert capsys.readouterr().err.endswith(f"\nnext: python -m train {then}\n")
    found = json.loads((run / "localization-valid.json").read_text())
    assert found["splits"] == ["valid"]
    assert found["labels"]["all"]["cells"] > 20
    bad = tmp_path / "boxes.csv"
    bad.write_text("key,label,x,y,w,h\npatient1,Edema,1,2,3,\n")
    with pytest.raises(DataError, match=r"boxes\.csv, line 2, column h: '' is not a number$"):
        call_train(*words, bad)
    key = open_shards(sample_shards[0])["valid"].table["key"][0].as_py()
    everywhere = {"size": [10, 12], "counts": [0, 120]}  # COCO's run lengths: no 0s, then 1s alone
    masks = tmp_path / "gt_segmentations.json"
    masks.write_text(json.dumps({key: {"Airspace Opacity": everywhere}}))
    assert call_train(*words, masks) == 0
    (label, cell), _ = json.loads((run / "localization-valid.json").read_text())["labels"].items()
    assert (label, cell["hits"], cell["cells"], cell["chance"]) == ("Lung Opacity", 1, 1, 1.0)
    pickled = tmp_path / "map.pkl"
    pickled.write_bytes(b"x")
    with pytest.raises(DataError, match=r"a pickle would run code$"):
        call_train(*words, pickled)
