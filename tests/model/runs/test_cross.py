"""Train on each set and on all; score every run on every set."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import train
from model.checkpoint import save_checkpoint
from model.networks import build_network
from model.runs.cross import plan_runs
from pipeline.base.errors import DataError
from pipeline.base.files import hash_file
from pipeline.identity import join_content
from pipeline.labels import LABELS
from pipeline.manifest import read_manifest, read_table
from pipeline.measure.evaluation import read_evaluation
from pipeline.measure.scores import read_scores
from tests.conftest import default_options, make_shards, write_chexpert
from tests.training import WORDS, Capture, Patch, call_train


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("sets")
    for seed, name in enumerate(("north", "south")):
        write_chexpert(base / name / "films", "train", range(1, 25), seed)
        write_chexpert(base / name / "films", "valid", range(30, 50), seed)
        make_shards(base / name / "films", base / name / "shards" / name, default_options(dev=0.3), called=name)
    return [base / name / "shards" / name for name in ("north", "south")]


def test_runs_are_each_all_but_one_and_all() -> None:
    assert list(plan_runs(["x/a", "y/b"])) == ["a", "b", "a + b"]
    three = plan_runs(["x/a", "b", "c"])
    assert list(three) == ["a", "b", "c", "a + b", "a + c", "b + c", "a + b + c"]
    assert (three["a + c"], three["a + b + c"]) == (("x/a", "c"), ("x/a", "b", "c"))


def test_every_run_is_scored_on_every_set(
    sets: list[Path], tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    out, other = tmp_path / "cross", tmp_path / "other"
    torch.save(build_network("rescnn", len(LABELS)).state_dict(), tmp_path / "weights.pt")
    weights = ("--init", tmp_path / "weights.pt", "--init-labels", ",".join(LABELS))
    adopted = (*weights, *WORDS[:4], "--labels", LABELS[5])
    assert call_train("adopt", "--shards", sets[0], "--run", other, *adopted) == 0
    folders = [word for folder in sets for word in ("--shards", folder)]
    words = ("cross", *folders, "--out", out, *WORDS, "--run", other, "--png", tmp_path / "png")
    assert call_train(*words) == 0
    then = f"predict --run {shlex.quote(str(out / 'north+south'))} --out scores.csv IMAGES"
    assert capsys.readouterr().err.endswith(f"\nnext: python -m train {then}\n")
    matrix = json.loads((out / "cross.json").read_text())
    assert matrix["sets"] == {name: {"split": "valid", "images": 40} for name in ("north", "south")}
    assert list(matrix["runs"]) == [str(other), "north", "south", "north + south"]
    label = matrix["labels"][0]
    given = read_evaluation(other / "evaluation-valid.json").get("auroc", label).value
    assert matrix["cells"]["north"][str(other)][label]["auroc"]["value"] == pytest.approx(given)
    # Against the scores that `evaluate` writes of one set by the other's run.
    south = sets[1]
    assert call_train("evaluate", "--shards", south, "--run", out / "north") == 0
    table = read_table(south, read_manifest(south).split("valid"))
    file = out / "north" / f"scores-valid-{hash_file(south / 'manifest.json')[:8]}.arrow"
    scores = read_scores(file, table["key"], [label])
    states = table[label].to_pandas()
    used = (states != -1).to_numpy()
    auroc = roc_auc_score((states[used] == 1), scores[used, 0])
    cell = matrix["cells"]["south"]["north"][label]
    assert cell["auroc"]["value"] == pytest.approx(auroc)
    own = matrix["cells"]["south"]["south"][label]
    assert cell["less"]["value"] == pytest.approx(cell["auroc"]["value"] - own["auroc"]["value"])
    assert own["less"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0}, abs=1e-6)
    macro = matrix["cells"]["south"]["north"]["macro"]["auroc"]["value"]
    values = [matrix["cells"]["south"]["north"][name]["auroc"]["value"] for name in matrix["labels"]]
    assert macro == pytest.approx(sum(values) / len(values))
    page = (out / "cross.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in matrix["labels"])
    assert f">{macro:.3f}<" in page  # in the figure
    assert "<dt>arch</dt><dd>rescnn</dd>" in page  # as in a report
    assert [path.name for path in (tmp_path / "png").iterdir()] == ["auroc-by-training-and-test-set.png"]
    # Again: nothing is trained.
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("a finished run was trained again"))
    capsys.readouterr()
    assert call_train(*words) == 0
    assert "AUROC, mean of" in capsys.readouterr().out


def test_sets_that_cannot_be_scored_are_refused_before_training(
    sets: list[Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("a run was trained"))
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in sets]
    words = ("cross", *(word for folder in folders for word in ("--shards", folder)), "--out", tmp_path / "out")
    # The weights have seen the other set's valid: refused before a run on the first set is trained.
    valid = read_table(folders[1], read_manifest(folders[1]).split("valid"))
    images, nothing = torch.tensor(join_content(valid).to_numpy().view(np.int64)), torch.tensor([], dtype=torch.int64)
    seen = {"split": "train", "run": "before", "images": images, "patients": nothing, "sets": []}
    about = {"pixels": {"mean": 100.0, "std": 50.0}, "equalize": False, "terms": "", "outputs": list(LABELS)}
    about |= {"arch": "rescnn", "image_size": "32"}
    weights = build_network("rescnn", len(LABELS)).state_dict()
    save_checkpoint(tmp_path / "start.pt", about | {"weights": weights, "seen": [seen]})
    with pytest.raises(DataError, match=r"south, valid: before trained on 40 of these 40 images; keep its"):
        call_train(*words, *WORDS, "--init", tmp_path / "start.pt")
    with pytest.raises(DataError, match=r"^no label has 10 patients of each class in every set"):
        call_train(*words, *WORDS, "--where", "age<55")
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    manifest["splits"] = {"train": manifest["splits"]["train"]}
    (folders[1] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"south: no split to score on, of valid, test, dev; shard it again"):
        call_train(*words, *WORDS)
