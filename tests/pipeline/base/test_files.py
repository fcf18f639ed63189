from pathlib import Path

import pytest

from pipeline import DataError
from pipeline.base.files import check_folder, claimed

FOREIGN = Path("/sys/kernel")  # where root may make no file either


def test_a_folder_that_may_not_be_written_to_is_named() -> None:
    with pytest.raises(DataError) as caught, claimed(FOREIGN):
        pass
    assert str(caught.value) in [
        f"{FOREIGN}: cannot be written: {reason}"
        for reason in ("Permission denied", "Operation not permitted", "Read-only file system")
    ]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError) as caught:
        check_folder(tmp_path / "none" / "scores.csv")
    assert str(caught.value) == f"{tmp_path}/none/scores.csv: there is no folder {tmp_path}/none"
    check_folder(tmp_path / "scores.csv")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write to any
    with pytest.raises(DataError) as caught:
        check_folder(tmp_path / "scores.csv")
    assert str(caught.value) == (
        f"{tmp_path}/scores.csv: cannot be written: no right to write to {tmp_path}; choose another folder"
    )
