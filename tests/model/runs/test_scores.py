from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from model.runs.scores import read_frame, read_scores, write_scores
from pipeline import DataError
from pipeline.base.files import write_table
from pipeline.labels import LABELS

Scores = npt.NDArray[np.float32]


@pytest.fixture
def table() -> pa.Table:
    """The columns of a split's table that are kept."""
    patients = [f"patient{number:05d}" for number in range(50)]
    keys = [f"{patient}_study1_view1_frontal" for patient in patients]
    return pa.table(
        {"key": keys, "patient": patients, "study": pa.array([1] * 50, pa.int32()), "shard": [0] * 50}
    )


@pytest.fixture
def scores(table: pa.Table) -> Scores:
    return np.random.default_rng(0).random((table.num_rows, len(LABELS)), np.float32)


def test_scores_come_back_by_key_in_any_order(table: pa.Table, scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores-train.arrow"
    order = np.random.default_rng(1).permutation(50)
    write_scores(path, table.take(order), LABELS, scores[order])
    written = pa.ipc.open_file(path).read_all()
    kinds = [pa.string(), pa.string(), pa.int32(), *[pa.float32()] * 14]
    assert written.schema == pa.schema(zip(["key", "patient", "study", *LABELS], kinds, strict=True))
    np.testing.assert_array_equal(read_scores(path, table["key"]), scores)
    np.testing.assert_array_equal(read_scores(path, table["key"].slice(7, 3)), scores[7:10])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_columns_that_are_there_twice_are_named(table: pa.Table, scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores-train.arrow"
    write_scores(path, table, LABELS, scores)
    whole = pa.ipc.open_file(path).read_all()
    for name in ("key", "patient"):
        write_table(path, whole.append_column(name, whole[name]))
        with pytest.raises(DataError, match=f"^{path}: damaged, or not a file of scores: "):
            read_frame(path)


def test_missing_images_are_counted_and_one_is_named(table: pa.Table, scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores-train.arrow"
    write_scores(path, table.slice(3), LABELS, scores[3:])
    with pytest.raises(DataError) as caught:
        read_scores(path, table["key"])
    assert str(caught.value) == (
        f"{path}: no scores of 3 of 50 images, such as patient00000_study1_view1_frontal; "
        "they are of other shards, or of other images of these"
    )


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.01, 1.01])
def test_scores_outside_their_range_are_named(
    table: pa.Table, scores: Scores, tmp_path: Path, wrong: float
) -> None:
    path = tmp_path / "scores-train.arrow"
    scores[20, LABELS.index("Edema")] = wrong
    write_scores(path, table, LABELS, scores)
    with pytest.raises(DataError) as caught:
        read_scores(path, table["key"])
    assert str(caught.value) == (
        f"{path}: patient00020_study1_view1_frontal, Edema: the score {np.float32(wrong)} is not in [0, 1]"
    )


def test_other_files_are_refused_by_name(table: pa.Table, scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores-train.arrow"
    write_scores(path, table, LABELS, scores)
    whole = pa.ipc.open_file(path).read_all()

    def refuse() -> str:
        with pytest.raises(DataError) as caught:
            read_scores(path, table["key"])
        return str(caught.value)

    def replace(changed: Any) -> None:
        with pa.ipc.new_file(path, changed.schema) as writer:
            writer.write_table(changed)

    replace(whole.drop_columns("patient"))
    with pytest.raises(DataError, match=r": damaged, or not a file of scores: it has no column patient$"):
        read_frame(path)
    replace(whole.drop_columns("Edema"))
    assert refuse().startswith(f"{path}: damaged, or not a file of scores: ")
    replace(whole.set_column(3, LABELS[0], pa.array(["high"] * 50)))
    assert refuse().startswith(f"{path}: damaged, or not a file of scores: ")
    path.write_bytes(path.read_bytes()[:-100])
    assert refuse().startswith(f"{path}: not an Arrow table: ")
    path.unlink()
    assert refuse().startswith(f"{path}: damaged, or not a file of scores: ")
