"""What a run is for once it is trained: evaluate, predict, export."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pandas import read_feather as read_frame
from PIL import Image

from model.checkpoint import load_checkpoint, save_checkpoint
from model.runs import results
from model.runs.commands import main
from pipeline import DataError, Judging, judge, open_shards
from pipeline.base.files import read_arrow
from pipeline.base.pages import draw_svg
from pipeline.labels import LABELS
from pipeline.manifest import read_table
from pipeline.measure import belief
from pipeline.measure.calibration import apply_calibrations
from pipeline.measure.evaluation import MEANS, read_evaluation
from tests.conftest import Capture, Shards, refused
from tests.dicoms import make_dicom
from tests.training import WORDS, call_train


def test_predict_keeps_earlier_scores_where_no_image_can_be_read(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out, new, films = tmp_path / "scores.csv", tmp_path / "new.csv", tmp_path / "films"
    out.write_text("earlier")
    films.mkdir()
    for name in ("a.png", "b.JPG", "c.bmp", "d.BMP", "e.tif", "f"):
        (films / name).write_bytes(b"x")
    (films / "z.png").symlink_to("nowhere")
    with refused(f"none of 3 images can be read; {out} is left as it was"):
        call_train("predict", "--run", run, "--out", out, films)
    assert out.read_text() == "earlier"
    stderr = capsys.readouterr().err
    for text in ("2 .bmp files", "1 .tif files", "1 other files"):
        assert f"{films}: {text} skipped: only JPEG, PNG and DICOM can be read\n" in stderr
    assert f"{films / 'a.png'}: not a readable JPEG, PNG or DICOM" in stderr
    with refused(f"none of 1 image can be read; {new} is not written"):
        call_train("predict", "--run", run, "--out", new, films / "a.png")
    assert not new.exists()
    Image.effect_noise((80, 60), 50).save(films / "a.png")
    assert call_train("predict", "--run", run, "--out", out, "--strict", films / "a.png", films / "b.JPG") == 3
    assert pd.read_csv(out)["Edema"].isna().tolist() == [False, True]
    with refused(f"{run}: no .jpg, .jpeg, .png, .dcm, .dicom file"):
        call_train("predict", "--run", run, "--out", out, run)


def test_evaluate_writes_its_figures_for_slides(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = partial(draw_svg, lambda axes: None, "A line, rising", (1, 1))
    monkeypatch.setattr(results, "render_report", lambda *_: draw())
    main.main(["evaluate", "--run", str(run), "--png", str(tmp_path / "figures")], standalone_mode=False)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["a-line-rising.png"]


def test_predict_scores_dicoms_as_their_pixels(run: Path, tmp_path: Path) -> None:
    pixels = np.linspace(0, 255, 80 * 96).astype(np.uint8).reshape(80, 96)
    of_8_bits = partial(make_dicom, BitsStored=8, HighBit=7)
    (tmp_path / "films").mkdir()
    Image.fromarray(pixels).save(tmp_path / "films" / "a.png")
    for name, content in {
        "b.dcm": of_8_bits(pixels),
        "c.DICOM": of_8_bits(255 - pixels, PhotometricInterpretation="MONOCHROME1"),
        "d.dicom": of_8_bits(pixels, BurnedInAnnotation="YES"),
    }.items():
        (tmp_path / "films" / name).write_bytes(content)
    assert call_train("predict", "--run", run, "--out", tmp_path / "scores.csv", tmp_path / "films") == 0
    scores = pd.read_csv(tmp_path / "scores.csv").set_index("file")[list(LABELS)]
    assert [Path(file).name for file in scores.index] == ["a.png", "b.dcm", "c.DICOM", "d.dicom"]
    assert scores.iloc[0].notna().all()
    np.testing.assert_allclose(scores.iloc[1:3], scores.iloc[[0, 0]], atol=2e-6)
    assert scores.iloc[3].isna().all()


def test_what_evaluate_wrote_is_said_and_a_comparison_stays(run: Path, capsys: Capture) -> None:
    other = Path(shutil.copytree(run, run.with_name("other")))

    def written(*words: object) -> list[Path]:
        assert call_train("evaluate", "--run", run, *words) == 0  # on its own shards
        output = capsys.readouterr()
        assert output.err.endswith(f"next: python -m train predict --run {run} --out scores.csv IMAGES\n")
        return [Path(line.removesuffix(": written")) for line in output.out.splitlines() if line.endswith(": written")]

    compared = written("--against", other)
    names = ["scores-valid.arrow", "evaluation-valid-against-other.json", "report-valid-against-other.html"]
    assert [path.name for path in compared] == names
    before = compared[1].read_bytes()
    plain = written()
    assert [path.name for path in plain] == ["scores-valid.arrow", "evaluation-valid.json", "report-valid.html"]
    assert all(path.is_file() for path in (*compared, *plain))
    assert compared[1].read_bytes() == before


@pytest.mark.parametrize(("by", "columns"), [("study", ["patient", "study"]), (r"patient\d+", ["patient"])])
def test_predict_decides_on_studies_as_evaluate_does(
    by: str, columns: list[str], run: Path, sample_shards: Shards, tmp_path: Path
) -> None:
    shards, films = sample_shards[0], sample_shards[0].parent / "CheXpert-v1.0-small" / "train"
    assert call_train("evaluate", "--run", run, "--shards", shards, "--split", "train", "--study", "mean") == 0
    scores = read_frame(run / "scores-train.arrow")
    views = scores.groupby(columns).size()
    assert views.max() > 1
    fits = json.loads((run / "calibration.json").read_text())["study"]
    keys = open_shards(shards)["train"].table["key"].to_pylist()
    files = [films.joinpath(*key.split("_", 2)).with_suffix(".jpg") for key in keys]
    out = tmp_path / "scores.csv"
    words = ("predict", "--run", run, "--out", out, "--threshold", "youden", "--group-by", by)
    assert call_train(*words, *files) == 0
    table = pd.read_csv(out)
    parts = table["study"].str.extract(r"(?P<patient>patient\d+)(?:/study(?P<study>\d+))?")
    order = [(row.patient, int(row.study)) if "study" in columns else row.patient for row in parts.itertuples()]
    expected = scores.groupby(columns)[list(LABELS)].mean().loc[order]
    np.testing.assert_allclose(table[list(LABELS)], apply_calibrations(LABELS, expected.to_numpy(), fits), atol=2e-6)
    for label in LABELS:
        limit, calls = fits[label]["thresholds"]["youden"], table[f"{label} positive"]
        assert calls.isna().all() if limit is None else ((expected[label].to_numpy() >= limit) == calls).all()


def test_fewer_labels_are_compared_over_those_of_both_runs(run: Path, sample_shards: Shards, capsys: Capture) -> None:
    other = run.with_name("few")
    shards = ("--shards", sample_shards[0])
    assert call_train("train", *shards, "--run", other, *WORDS, "--labels", "Edema,Fracture,Pleural Effusion") == 0
    capsys.readouterr()
    assert call_train("evaluate", *shards, "--run", run, "--against", other) == 0
    printed = capsys.readouterr().out
    assert "over the 3 labels that both have scores of" in printed
    compared = read_evaluation(run / "evaluation-valid-against-few.json")
    few = read_evaluation(other / "evaluation-valid.json")
    rows = compared.select(metric="auroc_difference", level="image", scorer=str(other))
    less = {row.label: row.value for row in rows}
    assert list(less) == ["Edema", "Pleural Effusion", "Fracture", *MEANS]
    differences = []
    for label in few.labels:
        value, other_value = (each.get("auroc", label).value for each in (compared, few))
        if value is None or other_value is None:
            assert less[label] is None
        else:
            assert less[label] == pytest.approx(value - other_value)
            differences.append(value - other_value)
    assert less["macro"] == pytest.approx(sum(differences) / len(differences))
    assert compared.get("auroc_difference", "macro", scorer=str(other)).change in printed
    assert compared.head["against"] == [str(other)]
    assert read_evaluation(run / "evaluation-valid.json").head["against"] == []
    alone = run.with_name("none")
    assert call_train("train", *shards, "--run", alone, *WORDS, "--labels", "Cardiomegaly") == 0
    with pytest.raises(DataError, match=r"few/scores-valid.arrow: none of the labels Cardiomegaly$"):
        call_train("evaluate", *shards, "--run", alone, "--against", other)
    (other / "scores-valid.arrow").unlink()
    first = f"no scores-valid.arrow; first run: python -m train evaluate --run {other} --split valid"
    with refused(f"`against` {other}: {first}"):
        call_train("evaluate", *shards, "--run", run, "--against", other)


def test_other_conditions_choose_what_is_scored(run: Path, sample_shards: Shards, capsys: Capture) -> None:
    before = (run / "evaluation-valid.json").read_bytes()
    shards, manifest = sample_shards
    capsys.readouterr()
    assert call_train("evaluate", "--shards", shards, "--run", run, "--where", "sex=Male") == 0
    files = [line.removesuffix(": written") for line in capsys.readouterr().out.splitlines() if "written" in line]
    table = read_table(shards, manifest.split("valid")).to_pandas()
    evaluation = read_evaluation(Path(files[1]))
    assert evaluation.get("images").value == (table["sex"] == "Male").sum() < len(table)
    assert evaluation.head["chosen_by"] == ["sex=Male"]
    assert (run / "evaluation-valid.json").read_bytes() == before
    assert re.fullmatch(r"evaluation-valid-[0-9a-f]{8}.json", Path(files[1]).name)
    with pytest.raises(DataError, match=r"no lateral images among the"):
        call_train("evaluate", "--shards", shards, "--run", run, "--views", "lateral")


def test_readers_stand_beside_the_network(run: Path, sample_shards: Shards, tmp_path: Path, capsys: Capture) -> None:
    table = read_table(sample_shards[0], sample_shards[1].splits["valid"]).to_pandas()
    readers = [tmp_path / "bc4.csv", tmp_path / "bc6.csv"]
    for path, flip in zip(readers, (False, True), strict=True):
        rows = [f"test/{row.patient}/study{row.study},{int(row['Edema'] == 1) ^ flip}" for _, row in table.iterrows()]
        path.write_text("\n".join(["Study,Edema", *rows]))
    shards = ("--shards", sample_shards[0])
    words = ("--readers", readers[0], "--readers", readers[1])
    assert call_train("evaluate", "--run", run, *shards, *words) == 0
    evaluation = read_evaluation(run / "evaluation-valid.json")
    rates = [evaluation.get("sensitivity", "Edema", "study", scorer=name) for name in ("bc4", "bc6")]
    assert [row.value for row in rates] == [1, 0]
    assert rates[0].positives == (table.groupby(["patient", "study"])["Edema"].max() == 1).sum()
    below = [row.number for row in evaluation.select(metric="below")]
    assert (below[0], len(below)) == (0, 2)
    assert f"below the curve: {sum(below):.0f} of 2" in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    shutil.copy(readers[0], tmp_path / "b")
    with pytest.raises(DataError, match=r"bc4.csv: two files of one name, by which they are shown; rename one$"):
        call_train("evaluate", "--run", run, *shards, *words[:2], "--readers", tmp_path / "b" / "bc4.csv")


def test_predict_reads_16_bit_images_as_the_shards_did(run: Path, tmp_path: Path, capsys: Capture) -> None:
    best = load_checkpoint(run / "best.pt")
    save_checkpoint(run / "best.pt", best | {"images": best["images"] | {"bits": 12}})
    levels = np.arange(80 * 96).reshape(80, 96) // 130  # dark: up to 59 of 255, for which 10 bits would do
    (tmp_path / "images").mkdir()
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "images" / "8.png")
    Image.fromarray((levels * 16 + levels // 16).astype(np.uint16)).save(tmp_path / "images" / "16.png")
    assert call_train("predict", "--run", run, "--out", tmp_path / "scores.csv", tmp_path / "images") == 0
    assert capsys.readouterr().err.endswith(f"next: python -m train export --run {run} --out model.onnx\n")
    deep, plain = pd.read_csv(tmp_path / "scores.csv")[list(LABELS)].to_numpy()
    np.testing.assert_allclose(deep, plain, atol=1e-6)


def test_a_runs_scores_through_judge_are_its_evaluation(run: Path, sample_shards: Shards, tmp_path: Path) -> None:
    """The same scores, thresholds chosen on dev's, against the same shards: the same rows."""
    shards, manifest = sample_shards
    assert call_train("evaluate", "--run", run, "--shards", shards) == 0
    files = [run / f"scores-{split}.arrow" for split in ("dev", "valid")]
    both = pa.concat_tables(read_arrow(file, file.read_bytes()) for file in files)
    path = tmp_path / "scores.arrow"
    with pa.ipc.new_file(path, both.schema) as writer:
        writer.write_table(both)
    asked = Judging(split="valid", dev="dev")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(belief, "predict", lambda covariates, *_: np.nan_to_num(covariates[:, 0]))
        judged = judge(path, shards, asked).evaluation
    own = read_evaluation(run / "evaluation-valid.json")
    assert judged.rows == own.rows
    shared = {name: value for name, value in own.head.items() if name.startswith("shared_")}
    left_out = judged.head.pop("left_out")
    assert len(left_out) == 1  # the scores of dev are not of valid
    assert judged.head | shared == own.head
    assert len(read_table(shards, manifest.split("valid"))) == own.get("images").value
