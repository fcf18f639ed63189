"""Published weights by name; torchxrayvision's, against its own network on the same images."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from model.augment import normalize
from model.checkpoint import UNKNOWN, CheckpointError, read_start
from model.names import published
from model.networks import build_network, load_initial
from model.runs.config import Config, Setup, parse_initial
from model.runs.folder import describe_start
from model.runs.run import open_run
from pipeline.labels import LABELS
from pipeline.manifest import Manifest
from tests.training import call_train

ALL = published()["xrv:densenet121-res224-all"]
OUTPUTS = ALL.outputs.split("|")
RENAMED = {"Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Other"}
NOT_THEIRS = ["No Finding", "Support Devices"]
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
urls = {name: one for name, one in torchxrayvision.models.model_urls.items() if name.startswith("densenet")}
json.dump([torchxrayvision.datasets.default_pathologies, urls], open("facts.json", "w"))
"""

soak = pytest.mark.soak  # it trains, or builds large networks: half a minute


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What REFERENCE writes."""
    folder = tmp_path_factory.mktemp("xrv")
    subprocess.run([sys.executable, "-c", REFERENCE], cwd=folder, check=True, capture_output=True)
    return folder


def our_label(name: str) -> str:
    return RENAMED.get(name, name)


@soak
@torch.no_grad()
@pytest.mark.parametrize("file", ["state.pt", "published.pt"])
def test_films_get_its_own_logits(theirs: Path, file: str) -> None:
    pathologies, _ = json.loads((theirs / "facts.json").read_text())
    assert list(map(our_label, pathologies)) == OUTPUTS
    start = read_start(theirs / file)
    assert (start.scale, start.terms, start.arch) == (ALL.scale, ALL.terms, "densenet121")
    ours = build_network("densenet121", 14).eval()
    fresh = ours.get_parameter("classifier.weight").clone()
    assert load_initial(ours, start).endswith("; fresh: the classifier of No Finding, Support Devices")
    reference = torch.load(theirs / "films.pt", weights_only=True)
    logits = ours(normalize(reference["films"], 127.5, 255 / 2048))
    both = [row for row, name in enumerate(OUTPUTS) if name in LABELS]
    found = logits[:, [LABELS.index(OUTPUTS[row]) for row in both]]
    torch.testing.assert_close(found, reference["logits"][:, both], rtol=0, atol=1e-4)
    assert reference["logits"].std() > 1e-2
    for row in map(LABELS.index, NOT_THEIRS):
        assert torch.equal(ours.get_parameter("classifier.weight")[row], fresh[row])


@soak
def test_outputs_that_were_not_trained_stay_fresh(theirs: Path, tmp_path: Path) -> None:
    """Their thresholds are NaN; of a published file the table says so."""
    _, urls = json.loads((theirs / "facts.json").read_text())
    state = torch.load(theirs / "state.pt", weights_only=True)
    for name, facts in urls.items():
        row = published()[f"xrv:{name}"]
        assert row.weights == facts["weights_url"]
        assert row.outputs.split("|") == list(map(our_label, facts["labels"]))
        state["op_threshs"] = torch.tensor(facts["op_threshs"])
        torch.save(state, tmp_path / "state.pt")
        assert read_start(tmp_path / "state.pt").outputs == row.outputs.split("|")


@soak
def test_what_is_not_its_weights_is_refused(theirs: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not weights of this network, .*; they must be of the same `arch`$"):
        load_initial(build_network("resnet18", 14), read_start(theirs / "state.pt"))
    with pytest.raises(CheckpointError) as caught:
        read_start(theirs / "more.pt")
    assert str(caught.value) == (
        f"{theirs / 'more.pt'}: damaged, or not a checkpoint of this program; a whole network is converted on a "
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
    said = str(caught.value)
    if row.weights.startswith("hf-hub:"):
        owner, repository, *_ = row.weights.removeprefix("hf-hub:").split("/")
        start = (
            f"{name} cannot be downloaded from https://huggingface.co/{owner}/{repository}: <urlopen error no route>; "
        )
        assert said == f"{start}download that file elsewhere and put it here, for `init` FILE"
    elif row.weights.endswith(row.file):
        start = f"{name} cannot be downloaded from {row.weights}: <urlopen error no route>; "
        place = tmp_path / "hub/checkpoints" / row.file
        assert said == f"{start}download that file elsewhere and put it here, as {place}, or anywhere for `init` FILE"
    else:
        assert said == f"{name}: programs cannot download it; get {row.file} from {row.weights}, then `init` that file"


def test_a_file_of_the_hub_is_read_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / "weights.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    save_file({"head.weight": torch.ones(2, 3)}, tmp_path / "weights.safetensors")
    for text, start in (("hf-hub:a/b", UNKNOWN), ("hf-hub:a/b/c/d.pt", UNKNOWN), ("eva-x-tiny", "train")):
        (entry,) = read_start(parse_initial(text)).seen
        assert (entry["split"], entry["sets"]) == (start, published()[text].seen.split() if start == "train" else [])
    assert asked[:2] == [("a/b", "model.safetensors"), ("a/b", "c/d.pt")]
    assert asked[2:] == [("MapleF/eva_x", "eva_x_tiny_patch16_merged520k_mim.pt")]


def test_published_encoders_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_train("networks") == 0
    said = capsys.readouterr().out
    assert all(row.name in said and row.license in said and row.seen in said for row in published().values())


@soak
def test_a_name_starts_a_run_with_its_network_size_and_scale(
    theirs: Path, sample_shards: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    row = published()["xrv:densenet121-res224-nih"]
    place = tmp_path / "hub/checkpoints" / row.file
    place.parent.mkdir(parents=True)
    shutil.copy(theirs / "published.pt", place)
    job = open_run(Config(), Setup(shards=(str(sample_shards[0]),), init=Path(row.name)), tmp_path / "run")
    assert job.start is not None
    assert job.start.path == place
    assert (job.config.arch, job.config.image_size) == ("densenet121", "224")
    assert job.pixels == {"mean": 127.5, "std": 255 / 2048}
    assert describe_start(asdict(job.config)) == row.terms
    words = ("embed", row.name, "--shards", sample_shards[0], "--split", "valid", "--out", tmp_path / "valid.parquet")
    assert call_train(*words) == 0
    assert len(pq.read_table(tmp_path / "valid.parquet")["embedding"][0]) == 1024
    for of in (place.with_name("renamed.pt"), place):
        shutil.copy(theirs / "state.pt", of)
        assert [entry["sets"] for entry in read_start(of).seen] == [(row if of == place else ALL).seen.split()]
