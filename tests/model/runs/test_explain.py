"""Heat maps: predict --heatmaps, and localize; embeddings as a table; training with a frozen backbone."""

import json
import shutil
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

import train
from model import networks
from model.checkpoint import load_checkpoint, save_checkpoint
from model.networks import build_network
from model.predict import embed
from model.runs import explain
from pipeline import DataError, open_shards
from pipeline.labels import LABELS
from tests.conftest import Shards, refused
from tests.training import Capture, MakeRun, Patch, call_train


def test_predict_writes_a_picture_for_the_highest_scores(run: Path, tmp_path: Path) -> None:
    Image.effect_noise((80, 60), 50).save(tmp_path / "a.png")
    words = ("predict", "--run", run, "--out", tmp_path / "s.csv", "--heatmaps", tmp_path / "maps")
    assert call_train(*words, "--heatmap-labels", 2, tmp_path / "a.png") == 0
    scores = pd.read_csv(tmp_path / "s.csv").loc[0, list(LABELS)].astype(float)
    expected = {f"00001-a.png-{name.lower().replace(' ', '-')}.png" for name in scores.nlargest(2).index}
    assert {path.name for path in (tmp_path / "maps").iterdir()} == expected


def test_maps_are_of_one_run_by_images(run: Path, tmp_path: Path) -> None:
    Image.effect_noise((80, 60), 50).save(tmp_path / "a.png")
    other, studies = (Path(shutil.copytree(run, tmp_path / name)) for name in ("other", "studies"))
    settings = json.loads((studies / "config.json").read_text()) | {"fusion": "max"}
    (studies / "config.json").write_text(json.dumps(settings))
    words = ("predict", "--out", tmp_path / "s.csv", "--heatmaps", tmp_path / "maps", tmp_path / "a.png", "--run")
    message = "--heatmaps is for single images and one run, not for studies or several networks"
    for more in ((run, "--run", other), (run, "--group-by", "study"), (studies,)):
        with refused(message, click.UsageError):
            call_train(*words, *more)


def test_localize_measures_the_boxes_of_drawn_signs(
    run: Path, sample_shards: Shards, tmp_path: Path, capsys: Capture
) -> None:
    words = ("localize", "--run", run, "--shards", sample_shards[0], "--boxes")
    assert call_train(*words, sample_shards[0].parent / "boxes.csv") == 0
    then = f"evaluate --run {run} --shards {sample_shards[0]} --split valid --sanity"
    assert capsys.readouterr().err.endswith(f"\nnext: python -m train {then}\n")
    results = json.loads((run / "localization-valid.json").read_text())
    assert results["splits"] == ["valid"]
    assert results["labels"]["all"]["cells"] > 20
    bad = tmp_path / "boxes.csv"
    bad.write_text("key,label,x,y,w,h\npatient1,Edema,1,2,3,\n")
    with pytest.raises(DataError, match=r"boxes\.csv, line 2, column h: '' is not a number$"):
        call_train(*words, bad)
    key = open_shards(sample_shards[0])["valid"].table["key"][0].as_py()
    everywhere = {"size": [10, 12], "counts": [0, 120]}  # COCO's run lengths: no 0s, then 1s alone
    masks = tmp_path / "gt_segmentations.json"
    masks.write_text(json.dumps({key: {"Airspace Opacity": everywhere}}))
    assert call_train(*words, masks) == 0
    (label, cell), _ = json.loads((run / "localization-valid.json").read_text())["labels"].items()
    assert (label, cell["hits"], cell["cells"], cell["chance"]) == ("Lung Opacity", 1, 1, 1.0)
    pickled = tmp_path / "map.pkl"
    pickled.write_bytes(b"x")
    with pytest.raises(DataError, match=r"a pickle would run code$"):
        call_train(*words, pickled)


def values_of(table: pa.Table) -> np.ndarray:
    return np.stack(table["embedding"].to_numpy())


@torch.no_grad()
def test_a_runs_embeddings_are_what_its_last_layer_takes(
    one_epoch: Path, sample_shards: Shards, tmp_path: Path, monkeypatch: Patch
) -> None:
    words = ("embed", one_epoch, "--shards", sample_shards[0], "--split", "valid", "--out")
    assert call_train(*words, tmp_path / "valid.arrow") == 0
    monkeypatch.setattr(explain, "EVALUATION_BATCH", 7)
    assert call_train(*words, tmp_path / "valid.parquet") == 0
    arrow = feather.read_table(tmp_path / "valid.arrow")
    parquet = pq.read_table(tmp_path / "valid.parquet")
    columns = ["key", "patient", *LABELS]
    selected = open_shards(sample_shards[0])["valid"]
    assert arrow.column_names == [*columns, "embedding"]
    assert arrow.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert parquet.schema.equals(arrow.schema)
    assert arrow.select(columns).equals(selected.table.select(columns))
    assert parquet.select(columns).equals(arrow.select(columns))
    np.testing.assert_allclose(values_of(parquet), values_of(arrow), rtol=0, atol=1e-5)

    (batch,) = selected.batches(len(arrow), 32, epoch=None)
    network, best = networks.ResCNN(14).eval(), load_checkpoint(one_epoch / "best.pt")
    network.load_state_dict(best["weights"])
    inputs = (torch.from_numpy(batch.images).float() - best["pixels"]["mean"]) / best["pixels"]["std"]
    expected = network.blocks(network.stem(inputs)).mean(dim=(2, 3))
    np.testing.assert_allclose(values_of(arrow), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_networks_embeddings_are_torchvisions(sample_shards: Shards, tmp_path: Path) -> None:
    network = resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    words = ("embed", "resnet18", "--init", tmp_path / "weights.pth", "--image-size", 32, "--split", "dev")
    assert call_train(*words, "--shards", sample_shards[0], "--out", tmp_path / "dev.arrow") == 0
    network.fc = torch.nn.Identity()
    shards = open_shards(sample_shards[0])
    (batch,) = shards["dev"].batches(len(shards["dev"].table), 32, epoch=None)
    pixels = shards.manifest.pixels
    inputs = (torch.from_numpy(batch.images).float() - pixels["mean"]) / pixels["std"]
    embeddings = values_of(feather.read_table(tmp_path / "dev.arrow"))
    np.testing.assert_allclose(embeddings, network(inputs.expand(-1, 3, -1, -1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("equalize", [False, True])
def test_weights_of_a_run_take_images_as_it_did(run: Path, originals: Path, tmp_path: Path, equalize: bool) -> None:
    """On shards of other gray levels, too."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"equalize": equalize}))
    save_checkpoint(run / "best.pt", load_checkpoint(run / "best.pt") | {"equalize": equalize})
    again, shards = tmp_path / "again", ("--shards", originals / "shards")
    assert call_train("adopt", "--init", run / "best.pt", *shards, "--run", again, "--workers", 1) == 0
    for source in (run, again):
        assert call_train("embed", source, *shards, "--split", "valid", "--out", f"{source}.arrow") == 0
    before, after = (values_of(feather.read_table(f"{source}.arrow")) for source in (run, again))
    np.testing.assert_array_equal(before, after)


def test_a_network_that_does_not_end_in_a_linear_layer_has_no_embeddings() -> None:
    network = build_network("rescnn", 14).eval()
    network.register_forward_hook(lambda _, __, logits: 2 * logits)
    with refused("embeddings are for networks that end in a linear layer"):
        embed(network, torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize("augment", ["none", pytest.param("robust", marks=pytest.mark.soak)])
def test_only_the_last_layer_learns(make_run: MakeRun, one_epoch: Path, monkeypatch: Patch, augment: str) -> None:
    monkeypatch.setattr(train, "finish_run", lambda run: {})
    run = make_run("run", init=one_epoch / "best.pt", freeze=True, augment=augment, epochs=1, ema=0.0)
    train.train(run)
    before, after = (load_checkpoint(folder / "best.pt")["weights"] for folder in (one_epoch, run.folder))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"head.2.weight", "head.2.bias"}
    optimizer = load_checkpoint(run.folder / "last.pt")["optimizer"]
    assert [tuple(state["exp_avg"].shape) for state in optimizer["state"].values()] == [(14, 32), (14,)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet18"], "resnet18 is no folder, and a network needs --init or --pretrained"),
        (["{run}", "--pretrained"], "{run} is a run: it has its own weights and image size"),
        (["{run}", "--out", "e.csv"], "--out e.csv: it must end in .arrow or .parquet"),
    ],
)
def test_what_cannot_be_embedded_is_a_usage_error(one_epoch: Path, words: list[str], message: str) -> None:
    typed = [word.format(run=one_epoch) for word in words]
    with refused(message.format(run=one_epoch), click.UsageError):
        call_train("embed", "--out", "e.arrow", *typed)
