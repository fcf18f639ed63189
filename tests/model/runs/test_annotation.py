"""Training and evaluation on shards whose set does not annotate every label."""

import json
from pathlib import Path

import pandas as pd
import pytest

import train
from pipeline.base.errors import SettingError
from pipeline.etl.shards import Execution, write_shards
from pipeline.labels import LABELS
from pipeline.look.judged import describe_gaps
from pipeline.measure.evaluation import read_evaluation
from pipeline.sources.sets import find_source
from pipeline.synthetic.sample import write_sample
from tests.conftest import POLICIES, default_options
from tests.training import Capture, MakeRun, call_train


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards of drawn films for which nobody looked for fractures."""
    films = write_sample(tmp_path, images=100)
    for name in ("train.csv", "valid.csv"):
        pd.read_csv(films / name, dtype=str).assign(Fracture="").to_csv(films / name, index=False)
    source = find_source(films, {}, [])._replace(annotated=tuple(label for label in LABELS if label != "Fracture"))
    options = default_options(size=64, samples_per_shard=40)
    write_shards(source, tmp_path / "shards", options, POLICIES, Execution(1, 0.0))
    return tmp_path / "shards"


def test_what_nobody_looked_for_is_neither_learned_nor_measured(
    shards: Path, make_run: MakeRun, capsys: Capture
) -> None:
    run = make_run("run", shards=shards, epochs=1, blank="zeros")
    train.train(run)
    stderr = capsys.readouterr().err
    assert f"not annotated in {shards}, so not learned: Fracture\n" in stderr
    assert "Fracture has" not in stderr
    report = read_evaluation(run.folder / "evaluation-valid.json")
    assert report.head["not_annotated"] == ["Fracture"]
    assert "Fracture" not in report.labels
    assert "Fracture: not annotated by this data set, so not learned, and without scores." in describe_gaps(report)
    assert "Fracture" not in json.loads((run.folder / "calibration.json").read_text())["image"]
    assert set(LABELS).difference(pd.read_feather(run.folder / "scores-valid.arrow").columns) == {"Fracture"}
    (films,) = shards.parent.glob("CheXpert*/valid")
    assert call_train("predict", "--run", run.folder, "--out", shards.parent / "scores.csv", films) == 0
    assert set(LABELS).difference(pd.read_csv(shards.parent / "scores.csv").columns) == {"Fracture"}
    with pytest.raises(SettingError, match=r"^`labels`: nobody annotated Fracture in .*; choose others$"):
        make_run("none", shards=shards, labels=("Fracture",))
    card = (run.folder / "model-card.md").read_text()
    assert "synthetic images by `pipeline sample`. License: none needed: the images show no patient.\n" in card
    assert "\nStarted from: random weights.\n" in card
