"""Checkpoints, and published weights by name; torchxrayvision's, against its own network on the same images."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from model.augment import normalize
from model.checkpoint import UNKNOWN, CheckpointError, load_checkpoint, read_start, save_checkpoint
from model.names import published
from model.networks import build_network, load_initial
from model.runs.config import Config, Setup, parse_initial
from model.runs.folder import describe_start
from model.runs.run import open_run
from pipeline.labels import LABELS
from tests.conftest import Shards
from tests.training import call_train

ALL = published()["xrv:densenet121-res224-all"]
OUTPUTS = ALL.outputs.split("|")
RENAMED = {"Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Other"}
# In a process of its own: the package has a module `model`, as we do.
REFERENCE = """
import json, numpy, torch, torchxrayvision
torch.manual_seed(0)
network = torchxrayvision.models.DenseNet()
films = numpy.random.default_rng(0).integers(0, 256, (2, 1, 224, 224), numpy.uint8)
scaled = numpy.stack([torchxrayvision.utils.normalize(film, 255) for film in films])
with torch.no_grad():
    for layer in network.modules():
        layer.momentum = 1.0
    network.train()(torch.from_numpy(scaled))  # normalized by these films
    logits = network.eval()(torch.from_numpy(scaled))
torch.save(dict(network.state_dict()) | {"op_threshs": torch.full((18,), 0.5)}, "state.pt")
torch.save({"films": torch.from_numpy(films), "logits": logits}, "films.pt")
for layer in network.modules():
    del layer._non_persistent_buffers_set  # which old files lack
torch.save(network, "published.pt")
network.extra = torchxrayvision.datasets.NIH_Dataset  # a class that no network needs
torch.save(network, "more.pt")
urls = {name: url for name, url in torchxrayvision.models.model_urls.items() if name.startswith("densenet")}
json.dump([torchxrayvision.datasets.default_pathologies, urls], open("facts.json", "w"))
"""

soak = pytest.mark.soak  # it trains, or builds large networks: half a minute


def test_checkpoints_come_back_and_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    state = {"weights": {"a": torch.arange(3.0)}, "epoch": 3, "history": [{"auroc": None}]}
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"]["a"], torch.arange(3.0))
    assert (loaded["epoch"], loaded["history"]) == (3, [{"auroc": None}])
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"weights": Payload()}, path)
    with pytest.raises(CheckpointError, match=r"last.pt: damaged, or not a checkpoint of this program$"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(CheckpointError, match=r"none.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"cannot be read: Is a directory$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_cut_anywhere_are_damaged(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.arange(3.0), "b": [1, None]}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"weights.pth: damaged, or not a checkpoint of this program$"):
            load_checkpoint(path)


def test_a_checkpoint_that_claims_more_than_it_holds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"{path}: damaged, or not a checkpoint of this program"
    assert str(caught.value.__cause__) == "its members are larger than the file"


@pytest.fixture(scope="module")
def xrv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What REFERENCE writes."""
    folder = tmp_path_factory.mktemp("xrv")
    subprocess.run([sys.executable, "-c", REFERENCE], cwd=folder, check=True, capture_output=True)
    return folder


@soak
@torch.no_grad()
@pytest.mark.parametrize("file", ["state.pt", "published.pt"])
def test_films_get_its_own_logits(xrv: Path, file: str) -> None:
    pathologies, _ = json.loads((xrv / "facts.json").read_text())
    assert [RENAMED.get(name, name) for name in pathologies] == OUTPUTS
    start = read_start(xrv / file)
    assert (start.scale, start.terms, start.arch) == (ALL.scale, ALL.terms, "densenet121")
    ours = build_network("densenet121", 14).eval()
    fresh = ours.get_parameter("classifier.weight").clone()
    assert load_initial(ours, start).endswith("; fresh: the classifier of No Finding, Support Devices")
    reference = torch.load(xrv / "films.pt", weights_only=True)
    logits = ours(normalize(reference["films"], 127.5, 255 / 2048))
    both = [row for row, name in enumerate(OUTPUTS) if name in LABELS]
    shared = logits[:, [LABELS.index(OUTPUTS[row]) for row in both]]
    torch.testing.assert_close(shared, reference["logits"][:, both], rtol=0, atol=1e-4)
    assert reference["logits"].std() > 1e-2
    for row in (LABELS.index(name) for name in ("No Finding", "Support Devices")):
        assert torch.equal(ours.get_parameter("classifier.weight")[row], fresh[row])


@soak
def test_outputs_that_were_not_trained_stay_fresh(xrv: Path, tmp_path: Path) -> None:
    """Their thresholds are NaN; of a published file the table says so."""
    _, urls = json.loads((xrv / "facts.json").read_text())
    state = torch.load(xrv / "state.pt", weights_only=True)
    for name, facts in urls.items():
        row = published()[f"xrv:{name}"]
        assert row.weights == facts["weights_url"]
        assert row.outputs.split("|") == [RENAMED.get(name, name) for name in facts["labels"]]
        state["op_threshs"] = torch.tensor(facts["op_threshs"])
        torch.save(state, tmp_path / "state.pt")
        assert read_start(tmp_path / "state.pt").outputs == row.outputs.split("|")


@soak
def test_a_network_with_other_classes_is_refused(xrv: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_start(xrv / "more.pt")
    assert str(caught.value) == (
        f"{xrv / 'more.pt'}: damaged, or not a checkpoint of this program; a whole network is converted on a "
        "machine that you trust: torch.save(model.state_dict(), FILE)"
    )


def fail(*_: object, **__: object) -> None:
    raise URLError("no route")


@pytest.mark.parametrize("name", published())
def test_what_cannot_be_downloaded_says_where_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    row = published()[name]
    with pytest.raises(CheckpointError) as caught:
        read_start(Path(name))
    if row.weights.startswith("hf-hub:"):
        url = "https://huggingface.co/" + "/".join(row.weights.removeprefix("hf-hub:").split("/")[:2])
        place = "for `init` FILE"
    else:
        url, place = row.weights, f"as {tmp_path / 'hub/checkpoints' / row.file}, or anywhere for `init` FILE"
    how = f"cannot be downloaded from {url}: <urlopen error no route>; download that file elsewhere and put it here"
    if row.weights.startswith("hf-hub:") or row.weights.endswith(row.file):
        assert str(caught.value) == f"{name} {how}, {place}"
    else:
        how = f"programs cannot download it; get {row.file} from {row.weights}, then `init` that file"
        assert str(caught.value) == f"{name}: {how}"


def test_a_file_of_the_hub_is_read_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repository: str, file: str) -> str:
        asked.append(f"{repository} {file}")
        return str(tmp_path / "weights.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    save_file({"head.weight": torch.ones(2, 3)}, tmp_path / "weights.safetensors")
    for text, split in (("hf-hub:a/b", UNKNOWN), ("hf-hub:a/b/c/d.pt", UNKNOWN), ("eva-x-tiny", "train")):
        (entry,) = read_start(parse_initial(text)).seen
        assert (entry["split"], entry["sets"]) == (split, published()[text].seen.split() if split == "train" else [])
    assert asked == ["a/b model.safetensors", "a/b c/d.pt", "MapleF/eva_x eva_x_tiny_patch16_merged520k_mim.pt"]


def test_published_encoders_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_train("networks") == 0
    output = capsys.readouterr().out
    assert all(cell in output for row in published().values() for cell in (row.name, row.license, row.seen))


@soak
def test_a_name_starts_a_run_with_its_network_size_and_scale(
    xrv: Path, sample_shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    row = published()["xrv:densenet121-res224-nih"]
    place = tmp_path / "hub/checkpoints" / row.file
    place.parent.mkdir(parents=True)
    shutil.copy(xrv / "published.pt", place)
    run = open_run(Config(), Setup(shards=(str(sample_shards[0]),), init=Path(row.name)), tmp_path / "run")
    assert run.start is not None
    assert run.start.path == place
    assert (run.config.arch, run.config.image_size) == ("densenet121", "224")
    assert run.pixels == {"mean": 127.5, "std": 255 / 2048}
    assert describe_start(asdict(run.config)) == row.terms
    words = ("embed", row.name, "--shards", sample_shards[0], "--split", "valid", "--out", tmp_path / "valid.parquet")
    assert call_train(*words) == 0
    assert len(pq.read_table(tmp_path / "valid.parquet")["embedding"][0]) == 1024
    for path, known in ((place.with_name("renamed.pt"), ALL), (place, row)):
        shutil.copy(xrv / "state.pt", path)
        assert [entry["sets"] for entry in read_start(path).seen] == [known.seen.split()]
