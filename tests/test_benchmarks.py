"""The benchmarks count what they say: the same films for all, patients apart, parts that add up."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks import auroc, budget, folds
from benchmarks.auroc import CONTESTANTS, Result, Setting, describe, list_films, read_rows
from pipeline.etl.writing import write_shard
from pipeline.labels import LABELS
from pipeline.measure.delong import weigh_labels
from pipeline.synthetic.sample import write_sample


def test_the_table_has_medians_and_says_who_missed_the_target() -> None:
    ours = [Result(1, 0, 4, 1, 200, 0.91), Result(2, 0, 4, 2, 300, 0.92), Result(1, 0, 5, 1, 400, 0.9)]
    other = [Result(0, 6, 5, 1, 200, 0.91), Result(0, 6, 4, 2, 300, 0.89), Result(0, 9, 5, 1, 400, 0.9)]
    assert list(describe({"ours": ours, "other": other}, 0.9)) == [
        "  ours                           7.00 min   preparing  1.00   waiting  0.00   network  4.00   "
        "scoring  1.00   300 steps   1.00 × ours",
        "  other                         12.00 min   preparing  0.00   waiting  6.00   network  5.00   "
        "scoring  1.00   300 steps   2.00 × ours   ONLY 0.890",
    ]


@pytest.mark.parametrize(
    "name", ["ours", *(pytest.param(name, marks=pytest.mark.soak) for name in list(CONTESTANTS)[1:])]
)
def test_every_contestant_delivers_the_films_and_labels_of_the_csv(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auroc, "DEV", 0.5)
    monkeypatch.setitem(auroc.PROCESSES, "num_workers", 1)
    source = write_sample(tmp_path, images=60)
    work = tmp_path / "work"
    work.mkdir()
    assert list_films(source) == len(read_rows(source / "train-train.csv"))
    batches = list(CONTESTANTS[name](source, work, Setting(32, 1, 1, 1.0))("dev", 0))
    images, target, mask = (
        np.concatenate(list(map(np.asarray, part))) for part in zip(*batches, strict=True)
    )
    rows = read_rows(source / "train-dev.csv")
    assert len(images) == len(rows) > 10
    for row in rows:
        film = Image.open(source.parent / row["Path"]).convert("L").resize((32, 32), Image.Resampling.BOX)
        distance = np.abs(images[:, 0].astype(np.float32) - np.asarray(film, np.float32)).mean(axis=(1, 2))
        at = int(distance.argmin())
        assert distance[at] < 6 < np.delete(distance, at).min()
        assert mask[at].tolist() == [row[label] != "-1.0" for label in LABELS]
        assert target[at].tolist() == [float(row[label] == "1.0") for label in LABELS]


def test_folds_keep_patients_together_and_leave_each_film_out_once(tmp_path: Path) -> None:
    source = write_sample(tmp_path, images=60)
    words = ["split", str(source), str(tmp_path / "folds"), "--folds", "3"]
    assert CliRunner().invoke(folds.main, words, catch_exceptions=False).exit_code == 0
    left = []
    for fold in range(3):
        kept, out = (pd.read_csv(tmp_path / "folds" / f"{name}{fold}.csv") for name in ("train", "valid"))
        patients = [set(table["Path"].str.split("/").str[-3]) for table in (kept, out)]
        assert not patients[0] & patients[1]
        left += list(out["Path"])
    films = [row["Path"] for name in ("train", "valid") for row in read_rows(source / f"{name}.csv")]
    assert sorted(left) == sorted(films)


def test_folds_are_compared_by_the_difference_of_their_aurocs() -> None:
    rng = np.random.default_rng(0)
    truth = pd.DataFrame(rng.integers(0, 2, (80, len(LABELS))), columns=list(LABELS))
    truth["patient"] = np.arange(80).astype(str)
    runs = [truth.join(pd.DataFrame(rng.random((80, len(LABELS))), columns=[f"{x} score" for x in LABELS]))]
    runs.append(runs[0].assign(**{"Edema score": truth["Edema"]}))
    first, second = map(folds.areas_of, runs)
    shown = folds.describe("Edema", first, second, weigh_labels(LABELS, ["Edema"]))
    auroc = roc_auc_score(truth["Edema"], runs[0]["Edema score"])
    assert shown.startswith(f"Edema              {auroc:.3f} [")
    assert f"   1.000 [0.950, 1.000]   difference {1 - auroc:+.3f} [" in shown


def test_the_parts_of_sharding_an_image_add_up_and_change_no_byte(tmp_path: Path) -> None:
    source, out = write_sample(tmp_path, images=20), tmp_path / "out"
    out.mkdir()
    [task] = budget.plan_shards(source, out)
    write_shard(task)
    tar = (out / task.file).read_bytes()
    clocks = budget.Clocks()
    total = budget.clock_shards(clocks, [task])
    assert (out / task.file).read_bytes() == tar
    assert {*budget.CODEC, "write", "SHA-256 of the tar", "CRC-32", "gray levels"} < set(clocks.seconds)
    assert 0.5 * total < sum(clocks.seconds.values()) < total


def test_a_part_within_another_is_taken_off_it() -> None:
    clocks = budget.Clocks()
    inner = clocks.around("inner", lambda: time.sleep(0.05))
    clocks.around("outer", inner)()
    assert clocks.seconds["inner"] >= 0.05 > clocks.seconds["outer"]
