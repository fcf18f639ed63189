"""torchxrayvision's weights, against its own network on the same films."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from model.augment import normalize
from model.checkpoint import CheckpointError
from model.chest import OUTPUTS, SCALE, TERMS, download_chest, name_outputs
from model.initial import read_start
from model.networks import build_network, load_initial
from model.runs.config import Config, Setup
from model.runs.folder import describe_start
from model.runs.job import open_job
from pipeline.base.errors import DataError
from pipeline.labels import LABELS
from pipeline.manifest import Manifest

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
torch.save(network, "published.pt")
torch.save(dict(network.state_dict()) | {"op_threshs": torch.full((18,), 0.5)}, "state.pt")
torch.save({"films": torch.from_numpy(films), "logits": logits}, "films.pt")
network.extra = torchxrayvision.datasets.NIH_Dataset  # a class that no network needs
torch.save(network, "more.pt")
urls = {name: one for name, one in torchxrayvision.models.model_urls.items() if name.startswith("densenet")}
json.dump([torchxrayvision.datasets.default_pathologies, urls], open("facts.json", "w"))
"""

pytestmark = pytest.mark.soak  # it trains, or builds large networks: half a minute


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What REFERENCE writes."""
    folder = tmp_path_factory.mktemp("xrv")
    subprocess.run([sys.executable, "-c", REFERENCE], cwd=folder, check=True, capture_output=True)
    return folder


def our_label(name: str) -> str:
    return RENAMED.get(name, name)


@torch.no_grad()
@pytest.mark.parametrize("file", ["state.pt", "published.pt"])
def test_films_get_its_own_logits(theirs: Path, file: str) -> None:
    pathologies, _ = json.loads((theirs / "facts.json").read_text())
    assert tuple(map(our_label, pathologies)) == OUTPUTS
    start = read_start(theirs / file)
    assert (start.scale, start.terms) == (SCALE, TERMS)
    ours = build_network("densenet121", 14).eval()
    fresh = ours.get_parameter("classifier.weight").clone()
    assert load_initial(ours, start).endswith("; fresh: the classifier of No Finding, Support Devices")
    reference = torch.load(theirs / "films.pt", weights_only=True)
    logits = ours(normalize(reference["films"], *SCALE))
    both = [row for row, name in enumerate(OUTPUTS) if name in LABELS]
    found = logits[:, [LABELS.index(OUTPUTS[row]) for row in both]]
    torch.testing.assert_close(found, reference["logits"][:, both], rtol=0, atol=1e-4)
    assert reference["logits"].std() > 1e-2
    for row in map(LABELS.index, NOT_THEIRS):
        assert torch.equal(ours.get_parameter("classifier.weight")[row], fresh[row])


def test_outputs_that_were_not_trained_stay_fresh(theirs: Path, tmp_path: Path) -> None:
    """Their thresholds are NaN; of a published file they are known by its name."""
    _, urls = json.loads((theirs / "facts.json").read_text())
    state = torch.load(theirs / "state.pt", weights_only=True)
    without = {name: value for name, value in state.items() if name != "op_threshs"}
    assert len(urls) == 7
    for of in urls.values():
        trained = set(map(our_label, of["labels"]))
        expected = [name if name in trained else "" for name in OUTPUTS]
        found = name_outputs(without, of["weights_url"].rpartition("/")[2])
        assert [name for name in found if name in LABELS] == [name for name in expected if name in LABELS]
        state["op_threshs"] = torch.tensor(of["op_threshs"])
        assert name_outputs(state, "state.pt") == expected


def test_what_is_not_its_weights_is_refused(theirs: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not weights of this network: .*they must be of the same `arch`$"):
        load_initial(build_network("resnet18", 14), read_start(theirs / "state.pt"))
    with pytest.raises(CheckpointError) as caught:
        read_start(theirs / "more.pt")
    assert str(caught.value) == (
        f"{theirs / 'more.pt'}: a whole network of torchxrayvision that holds more than weights; "
        "convert it on a machine that you trust: torch.save(model.state_dict(), FILE)"
    )


def test_a_name_is_downloaded_once(
    theirs: Path, sample_shards: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail(url: str, *_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    name = "nih-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
    place = tmp_path / "hub/checkpoints" / name
    _, urls = json.loads((theirs / "facts.json").read_text())
    for known, of in urls.items():
        with pytest.raises(CheckpointError, match=f"from {of['weights_url']}: <urlopen error no route>; "):
            download_chest(known)
    with pytest.raises(CheckpointError) as caught:
        download_chest("densenet121-res224-nih")
    assert str(caught.value) == (
        "xrv:densenet121-res224-nih cannot be downloaded from "
        f"https://github.com/mlmed/torchxrayvision/releases/download/v1/{name}: <urlopen error no route>; "
        f"download that file elsewhere and put it here, as {place}, or anywhere for `init` FILE"
    )
    with pytest.raises(DataError, match=r"^`init` xrv:all: there are densenet121-res224-all, densenet121-res224-nih, "):
        download_chest("all")

    shutil.copy(theirs / "published.pt", place)
    setup = Setup(shards=(str(sample_shards[0]),), init=Path("xrv:densenet121-res224-nih"))
    job = open_job(Config(arch="densenet121"), setup, tmp_path / "run")
    assert job.start is not None
    assert job.start.path == place
    assert job.pixels == {"mean": 127.5, "std": 255 / 2048}
    assert describe_start(asdict(job.config)) == TERMS
