"""What a run is for once it is trained: evaluate, predict, export."""

import shutil
from pathlib import Path

import pytest

import train
from model import scoring
from model.run import StopFlag
from pipeline import DataError
from pipeline.manifest import Manifest


@pytest.fixture(scope="module")
def trained(sample_shards: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch; tests get copies."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert call_train("train", "--shards", sample_shards[0], "--run", run, *SMALL) == 0
    return run


SMALL = (
    "--arch",
    "rescnn",
    "--image-size",
    32,
    "--epochs",
    1,
    "--batch-size",
    16,
    "--amp",
    "off",
    "--workers",
    2,
)


class NeverStop(StopFlag):
    """Leaves the signals of the tests' process alone."""

    def __init__(self) -> None:
        self.code = 0


def call_train(*words: object) -> int:
    """`python train.py` in this process, with few resamples and no page, which would take longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "RESAMPLES", 20)
        patch.setattr(scoring, "render_report", lambda *_: "a page")
        patch.setattr(train, "StopFlag", NeverStop)
        return int(train.main.main([str(word) for word in words], standalone_mode=False))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_predict_keeps_earlier_scores_where_no_image_can_be_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.csv"
    out.write_text("earlier")
    films = tmp_path / "films"
    films.mkdir()
    for name in ("a.png", "b.JPG", "c.dcm", "d.DCM", "e.tif", "f"):
        (films / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"^none of 2 images can be read; {out} is left as it was$"):
        call_train("predict", "--run", run, "--out", out, films)
    assert out.read_text() == "earlier"
    said = capsys.readouterr().err
    for text in ("2 .dcm files", "1 .tif files", "1 other files"):
        assert f"{films}: {text} skipped: only JPEG and PNG can be read\n" in said
    assert f"{films / 'a.png'}: not a readable JPEG or PNG" in said
    new = tmp_path / "new.csv"
    with pytest.raises(DataError, match=f"^none of 1 images can be read; {new} is not written$"):
        call_train("predict", "--run", run, "--out", new, films / "a.png")
    assert not new.exists()
