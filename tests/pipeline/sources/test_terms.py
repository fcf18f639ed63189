"""Data that may not be passed on, and the places where that is said."""

import os
import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from model.runs.folder import describe_start
from pipeline.base.files import is_open_to_all
from pipeline.cli import making
from pipeline.manifest import find_restriction
from pipeline.sources.sets import SETS, find_source, find_terms
from pipeline.synthetic.sample import write_sample
from tests.conftest import run_pipeline

STANFORD = "Stanford University School of Medicine CheXpert Dataset Research Use Agreement"


def test_every_set_is_restricted_or_not_and_drawn_films_have_their_own_terms(tmp_path: Path, originals: Path) -> None:
    free = {name for name, adapter in SETS.items() if not find_restriction(adapter.terms._asdict())}
    assert free == {"nih", "table", "webdataset"}
    assert find_restriction({}) == ""
    assert find_restriction({"license": f"not stated; {STANFORD}"})  # of several sets at once
    homes = (write_sample(tmp_path, images=20), originals / "CheXpert-v1.0-small")
    drawn, real = (find_terms(find_source(home, {}, [])) for home in homes)
    assert (drawn.name, find_restriction(drawn._asdict()), find_restriction(real._asdict())) == ("sample", "", STANFORD)


def test_a_folder_is_open_if_all_above_it_are() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        if not all(parent.stat().st_mode & stat.S_IXOTH for parent in folder.parents):
            pytest.skip("temporary files are private here")
        (folder / "out").mkdir(mode=0o755)
        assert not is_open_to_all(folder / "out")  # as it is in a private one
        folder.chmod(0o755)
        assert is_open_to_all(folder / "out")
        before = os.umask(0o022)
        assert is_open_to_all(folder / "new" / "out")
        os.umask(0o027)
        assert not is_open_to_all(folder / "new" / "out")
        assert os.umask(before) == 0o027
        (folder / "out").chmod(0o751)
        assert not is_open_to_all(folder / "out")


def test_shards_in_an_open_folder_are_warned_of(
    chexpert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "is_open_to_all", lambda folder: True)
    out = tmp_path / "out"
    done = run_pipeline("shards", chexpert, out, "--size", 48, "--workers", 1)
    bound = f"every user of this machine can read it; only people bound by the {STANFORD} may: chmod o-rx {out}"
    assert done.stderr.splitlines()[0] == f"Warning: {out}: {bound}"
    drawn = run_pipeline("shards", write_sample(tmp_path / "films", images=20), tmp_path / "drawn", "--size", 48)
    assert "Warning" not in drawn.stderr


def test_the_start_of_a_run_names_its_terms() -> None:
    of_imagenet = "trained on ImageNet, whose terms are for non-commercial research"
    atto = "convnextv2_atto.fcmae_ft_in1k"
    of_timm = f"trained on what https://huggingface.co/timm/{atto} names, on its terms"
    for arch, pretrained, init_terms, terms in (
        ("resnet18", False, "", "random weights"),
        ("resnet18", False, "CC0", "CC0"),
        ("resnet18", True, "", f"torchvision's ImageNet weights: BSD-3-Clause; {of_imagenet}"),
        ("timm/convnextv2_atto", True, "", f"timm's weights {atto}: cc-by-nc-4.0; {of_timm}"),
    ):
        assert describe_start({"arch": arch, "pretrained": pretrained, "init_terms": init_terms}) == terms
