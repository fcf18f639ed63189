from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from pyarrow.csv import read_csv

from pipeline import DataError
from pipeline.base.files import write_table
from pipeline.labels import LABELS
from pipeline.measure.metrics import Floats
from pipeline.measure.scores import open_scores, read_scores, write_scores
from tests.conftest import refused

OUTSIDE = "is not in [0, 1]; give `logits` if these are logits"
COLUMNS = "key, path, file, filename, image index, or patient and study; map one: `columns` key=NAME"
TRUTH = pa.table(
    {
        "key": ["patient1_study1_view1_frontal", "patient1_study1_view2_lateral", "p2_a", "p3_b"],
        "patient": ["patient1", "patient1", "p2", "p3"],
        "study": pa.array([1, 1, 1, 2], pa.int32()),
    }
)


@pytest.fixture
def table() -> pa.Table:
    """The columns of a split's table that are kept."""
    patients = [f"patient{number:05d}" for number in range(50)]
    keys = [f"{patient}_study1_view1_frontal" for patient in patients]
    return pa.table({"key": keys, "patient": patients, "study": pa.array([1] * 50, pa.int32()), "shard": [0] * 50})


@pytest.fixture
def scores(table: pa.Table) -> Floats:
    return np.random.default_rng(0).random((table.num_rows, len(LABELS)))


def test_scores_come_back_by_key_in_any_order(table: pa.Table, scores: Floats, tmp_path: Path) -> None:
    path = tmp_path / "scores-train.arrow"
    order = np.random.default_rng(1).permutation(50)
    write_scores(path, table.take(order), LABELS, scores[order])
    written = pa.ipc.open_file(path).read_all()
    kinds = [pa.string(), pa.string(), pa.int32(), *[pa.float64()] * 14]
    assert written.schema == pa.schema(zip(["key", "patient", "study", *LABELS], kinds, strict=True))
    np.testing.assert_array_equal(read_scores(path, table["key"]), scores)
    np.testing.assert_array_equal(read_scores(path, table["key"].slice(7, 3)), scores[7:10])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_other_files_are_refused_by_name(table: pa.Table, scores: Floats, tmp_path: Path) -> None:
    path = tmp_path / "scores-train.arrow"
    write_scores(path, table, LABELS, scores)
    valid = pa.ipc.open_file(path).read_all()
    place = valid.column_names.index("Edema")

    def spoil(score: float) -> pa.Table:
        edema = np.where(np.arange(50) == 20, score, scores[:, LABELS.index("Edema")])
        return valid.set_column(place, "Edema", pa.array(edema))

    others = ", ".join(label for label in LABELS if label != "Edema")
    lacking = "3 of 50 images, such as patient00000_study1_view1_frontal"
    for changed, message in (
        (valid.slice(3), f": no scores of {lacking}; they are of other shards, or of other images of these"),
        (spoil(np.nan), ", row 21, column Edema: 'nan' is not a score"),
        (spoil(np.inf), ", row 21, column Edema: 'inf' is not a score"),
        (spoil(-0.01), f", row 21, column Edema: '-0.01' {OUTSIDE}"),
        (spoil(1.01), f", row 21, column Edema: '1.01' {OUTSIDE}"),
        (valid.drop_columns("Edema"), f": column Edema is missing; it has {others}"),
        (valid.set_column(3, LABELS[0], pa.array(["high"] * 50)), ", row 1, column No Finding: 'high' is not a score"),
        (valid.slice(50), ": no rows"),
    ):
        write_table(path, changed)
        with refused(f"{path}{message}"):
            read_scores(path, table["key"])
    write_table(path, valid.set_column(0, "key", pa.array([[1]] * 50)))
    with pytest.raises(DataError, match=rf"^{path}: damaged, or not a file of scores: "):
        read_scores(path, table["key"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"^{path}: not an Arrow table: "):
        read_scores(path, table["key"])
    path.unlink()
    with pytest.raises(DataError, match=rf"^{path}: damaged, or not a file of scores: "):
        read_scores(path, table["key"])


@pytest.mark.parametrize(
    ("text", "unit", "rows"),
    [
        ("Image Index,edema\np3_b.png,.1\nx/p2_a.jpg,.2\n", "image", [-1, -1, 1, 0]),
        ("Path,Edema\ntrain/patient1/study1/view2_lateral.jpg,1e-3\np2_a,1\n", "image", [-1, 0, 1, -1]),
        ("patient,study,Edema\n3,2,0.5\npatient00001,1,0\n", "study", [1, 1, -1, 0]),
        ("Study,Edema\nCheXpert/test/patient1/study1/,0.2\nd/p3/study2,0.3\n", "study", [0, 0, -1, 1]),
    ],
)
def test_rows_of_any_file_find_their_images(tmp_path: Path, text: str, unit: str, rows: list[int]) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    notes: list[str] = []
    scores = open_scores(path)
    assert (scores.unit, scores.labels) == (unit, ("Edema",))
    assert scores.align(TRUTH, notes.append).tolist() == rows
    assert len(notes) == 1  # images, or studies, without a row
    packed = tmp_path / "scores.parquet"
    parquet.write_table(read_csv(path), packed)
    np.testing.assert_array_equal(open_scores(packed).values, scores.values)


def test_logits_become_probabilities_and_columns_have_any_names(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("name,out 1,out 2\np2_a,0,2\np3_b,-1,0\n")
    columns = {"key": "name", "Fracture": "out 1", "Edema": "out 2"}
    scores = open_scores(path, columns, logits=True)
    assert scores.labels == ("Edema", "Fracture")
    np.testing.assert_allclose(scores.values, 1 / (1 + np.exp([[-2.0, 0.0], [0.0, 1.0]])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,Edema\np2_a,\np3_b,.1\n", ", line 2, column Edema: '' is not a score"),
        ("key,Edema\np2_a,.1\np3_b,nan\n", ", line 3, column Edema: 'nan' is not a score"),
        ("key,Edema\np2_a,.1\np3_b,2.5\n", f", line 3, column Edema: '2.5' {OUTSIDE}"),
        ("key,Edema\np2_a,.5\np3_b,.5\n", ", column Edema: all 2 scores are 0.5: nothing to judge"),
        ("key,Edema,EDEMA\np2_a,.5,.5\n", ": column Edema appears 2 times"),
        ("key,Edema\n,.1\np3_b,.2\n", ", line 2, column key: blank, so nothing says whose row it is"),
        ("key,Wet\np2_a,.1\n", ": no column is named by a label; it has key, Wet; map them: `columns` Edema=Wet"),
        ("id,Edema\np2_a,.1\n", f": no column says whose row it is: {COLUMNS}"),
        ("key,Edema\na/p2_a.png,.1\np2_a.jpg,.2\n", ": line 2 and line 3 are both of a/p2_a.png"),
        (
            "key,Edema\nx,.1\ny,.2\n",
            f": no row of these 4 images: its first is 'x', the data set's '{TRUTH['key'][0]}'",
        ),
    ],
)
def test_what_is_wrong_with_scores_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with refused(f"{path}{message}"):
        open_scores(path).check().align(TRUTH, print)


def test_a_reader_calls_1_0_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bc4.csv"
    path.write_text("Study,Edema,Support_Devices\nt/patient1/study1,1,\np3/study2,0.0,1\n")
    reads = open_scores(path, calls=True)
    assert reads.labels == ("Edema", "Support Devices")
    taken = reads.take(reads.align(TRUTH, print), ["Support Devices", "Edema"])
    np.testing.assert_array_equal(taken, [[np.nan, 1], [np.nan, 1], [np.nan, np.nan], [1, 0]])
    path.write_text("Study,Edema\np/study1,-1\n")
    with refused(f"{path}, line 2, column Edema: '-1' is not a reader's call: 1, 0 or blank"):
        open_scores(path, calls=True)
    path.write_text("Study,Edema\np/study1,1\n")
    two = pa.table({"key": ["a/x", "b/y"], "patient": ["nih/p", "chexpert/p"], "study": [1, 1]})  # of equal names
    with refused(f"{path}: its rows have names of chexpert and of nih: choose the set that was read, by `where` set=…"):
        open_scores(path, calls=True).align(two, print)
