"""The benchmarks count what they say: the same films for all contestants."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import auroc, scale
from benchmarks.auroc import CONTESTANTS, Result, Setting, describe, list_films, read_rows
from pipeline.labels import LABELS
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
    images, target, mask = (np.concatenate(list(map(np.asarray, part))) for part in zip(*batches, strict=True))
    rows = read_rows(source / "train-dev.csv")
    assert len(images) == len(rows) > 10
    for row in rows:
        film = Image.open(source.parent / row["Path"]).convert("L").resize((32, 32), Image.Resampling.BOX)
        distance = np.abs(images[:, 0].astype(np.float32) - np.asarray(film, np.float32)).mean(axis=(1, 2))
        at = int(distance.argmin())
        assert distance[at] < 6 < np.delete(distance, at).min()
        assert mask[at].tolist() == [row[label] != "-1.0" for label in LABELS]
        assert target[at].tolist() == [float(row[label] == "1.0") for label in LABELS]


@pytest.mark.soak
def test_a_collection_is_read_as_shards_are(capfd: pytest.CaptureFixture[str]) -> None:
    scale.collection(3000)
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(":")[0].strip() for line in lines] == [
        *("start of the process", "plan of an epoch"),
        *("start of the process", "table and its hash, stat of every shard", "targets and masks of all rows"),
        *("manifest.json", "train.arrow"),
    ]
