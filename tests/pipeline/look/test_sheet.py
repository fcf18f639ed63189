import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.augment import augment
from model.names import AUGMENTATIONS
from model.runs.commands import main
from pipeline import open_shards
from pipeline.labels import LABELS
from pipeline.look.sheet import GAP, LINE, NARROWEST, describe_sample, draw_sheet, find_state, fit, spread_rows
from pipeline.manifest import read_manifest
from pipeline.stream.samples import OpenSplit, open_split
from tests.conftest import Shards, default_options, flip, make_shards, run_pipeline

TOP = LINE + 2 * GAP  # pixels: where the first picture begins


def show(*arguments: object) -> str:
    return run_pipeline("show", *arguments).stdout


def test_the_sheet_has_the_images_of_that_state(shards: Shards, tmp_path: Path) -> None:
    folder, manifest = shards
    split = open_split(folder, manifest, "train")
    rows = [row for row, value in enumerate(split.table["Edema"].to_pylist()) if value == -1]
    out = tmp_path / "edema.png"
    said = show(folder, "--label", "edema", "--state", "uncertain", "--out", out)
    assert said == f"{out}: train: {len(rows)} of {len(rows)} images uncertain for Edema, seed 0\n"
    sheet = np.asarray(Image.open(out).convert("RGB"))
    height, width = np.asarray(Image.open(io.BytesIO(stored(folder, split, rows[0])))).shape
    columns = int(np.ceil(np.sqrt(len(rows))))
    assert sheet.shape[1] == columns * (max(NARROWEST, 2 * width) + GAP) + GAP
    for column, row in enumerate(rows[:columns]):  # the first row of pictures
        expected = Image.open(io.BytesIO(stored(folder, split, row))).resize((2 * width, 2 * height))
        left = GAP + column * (max(NARROWEST, 2 * width) + GAP) + max(0, NARROWEST - 2 * width) // 2
        tile = sheet[TOP : TOP + 2 * height, left : left + 2 * width].astype(int)
        assert (tile == tile[..., :1]).all()  # gray
        assert abs(tile[..., 0] - np.asarray(expected, int)).mean() < 3


def stored(folder: Path, split: OpenSplit, row: int) -> bytes:
    """The bytes of an image in its tar."""
    where = {name: split.table[name][row].as_py() for name in ("shard", "offset", "length")}
    data = (folder / split.shards[where["shard"]].shard.file).read_bytes()
    image: bytes = data[where["offset"] :][: where["length"]]
    return image


def test_the_same_seed_gives_the_same_bytes_and_another_other_images(shards: Shards, tmp_path: Path) -> None:
    sheets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / f"{name}.png"
        assert show(shards[0], "--n", 4, "--seed", seed, "--out", out).endswith(f" images, seed {seed}\n")
        sheets.append(out.read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
    rows = np.arange(1000) * 3
    chosen = spread_rows(rows, 10, seed=5)
    assert [row // 300 for row in chosen] == list(range(10))
    assert set(chosen) <= set(rows)
    assert spread_rows(rows[:3], 10, seed=5).tolist() == [0, 3, 6]
    # Conditions are not named beside keys.
    women = open_split(*shards, "train").table["sex"].to_pylist().count("Female")
    out = tmp_path / "women.jpg"
    said = show(shards[0], "--where", "sex=Female", "--n", 3, "--out", out)
    assert said == f"{out}: train: 3 of {women} images under conditions, seed 0\n"
    with Image.open(out) as image:
        assert image.format == "JPEG"


def test_a_caption_has_key_and_labels_alone() -> None:
    row = dict.fromkeys(LABELS) | {"Edema": 1, "Pleural Effusion": 1, "Fracture": -1, "Pneumonia": 0}
    caption = describe_sample(row | {"key": "patient1_study2_view1_frontal", "sex": "Female", "age": 71})
    assert [text for text, _ in caption] == [
        "patient1_study2_view1_frontal", "+ Edema, Pleural Effusion", "? Fracture", "− Pneumonia"
    ]  # fmt: skip


def test_captions_stay_below_their_picture() -> None:
    """Long keys and captions are wrapped: nothing is written beside the column of a picture."""
    tiles = [np.zeros((40, 50), np.uint8)] * 2
    caption = [("key_" * 30 + "x" * 60, "#ffffff"), ("+ Edema, " * 20, "#ffffff")]
    alone, beside = (draw_sheet("", tiles, [caption, other], 2) for other in ([], caption))
    middle = 2 * GAP + NARROWEST  # where the second column begins
    assert alone.size == beside.size
    paper = np.unique(np.asarray(alone)[TOP + 40 :, middle - GAP :].reshape(-1, 3), axis=0)
    assert len(paper) == 1
    assert (np.asarray(alone)[:, :middle] == np.asarray(beside)[:, :middle]).all()
    assert [fit(np.zeros(shape, np.uint8), 256).shape for shape in ((300, 600), (20, 10))] == [(128, 256), (40, 20)]


@pytest.mark.parametrize("kind", ["affine", "crop", "robust"])
def test_variants_are_what_training_sees(
    shards: Shards, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = shards
    out = tmp_path / "augmented.png"
    options = f"--shards {folder} --augment {kind} --image-size 192 --n 3 --seed 7 --out {out}".split()
    main.main(["inputs", *options], standalone_mode=False)
    said = capsys.readouterr()
    assert said.out == f"{out}: train: 3 of 24 images, seed 7, augmented ({kind})\n"
    then = f"--shards {folder} --augment {kind} --image-size 192 --run RUN"
    assert said.err == f"next: python -m train {then}\n"
    split = open_split(folder, manifest, "train")
    rows = spread_rows(np.arange(split.table.num_rows), 3, seed=7)
    chosen = dataclasses.replace(open_shards(folder)["train"], rows=rows)
    (batch,) = chosen.batches(3, 192, epoch=None)
    mean, std = manifest.pixels["mean"], manifest.pixels["std"]
    expected = [batch.images[:, 0]]
    for epoch in range(4):
        inputs = augment(torch.from_numpy(batch.images), mean, std, (7, epoch, 0), AUGMENTATIONS[kind])
        expected.append((inputs * std + mean).round().clamp(0, 255)[:, 0].byte().numpy())
    sheet = np.asarray(Image.open(out).convert("RGB"))[..., 0]
    for column, variants in enumerate(expected):
        left = GAP + column * (192 + GAP)
        found = sheet[TOP:, left : left + 192]
        assert (found[:192] == variants[0]).all()
        # The other rows of pictures are lower by captions of any height.
        for picture in variants[1:]:
            assert [top for top in range(len(found) - 191) if (found[top : top + 192] == picture).all()]


def test_raw_and_png_shards_are_shown_too(chexpert: Path, tmp_path: Path) -> None:
    for encoding in ("png", "raw"):
        make_shards(chexpert, tmp_path / encoding, default_options(encoding=encoding))
        show(tmp_path / encoding, "--n", 2, "--out", tmp_path / f"{encoding}.png")
    png, raw = (np.asarray(Image.open(tmp_path / f"{encoding}.png")) for encoding in ("png", "raw"))
    assert (png == raw).all()


def test_a_state_that_no_image_is_in_says_what_there_is(shards: Shards, tmp_path: Path) -> None:
    folder, _ = shards
    split = open_split(folder, read_manifest(folder), "valid")
    states = split.table["Edema"].to_pylist()
    failed = run_pipeline("show", folder, "--split", "valid", "--label", "Edema", "--state", "uncertain",
                          "--out", tmp_path / "x.png", code=1)  # fmt: skip
    assert failed.stderr == (
        f"Error: valid: no image is uncertain for Edema; there are {states.count(1)} positive, 0 uncertain, "
        f"{states.count(0)} negative, 0 blank\n"
    )
    blank = find_state(open_split(folder, read_manifest(folder), "train"), np.arange(10), "Edema", "blank")
    train_states = open_split(folder, read_manifest(folder), "train").table["Edema"].to_pylist()
    assert blank.tolist() == [row for row in range(10) if train_states[row] is None]


def test_damage_is_named(shards: Shards, tmp_path: Path) -> None:
    folder, _ = shards
    path = folder / "train-000000.tar"
    flip(path, 600)  # inside the first image
    failed = run_pipeline("show", folder, "--n", 100, "--out", tmp_path / "x.png", code=1)
    assert re.fullmatch(
        rf"Error: {path}: sample patient\d+_study\d_view1_frontal: "
        "its bytes do not match the checksum in the index\n",
        failed.stderr,
    )
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "x.gif"], 2, "Error: --out x.gif: the name must end in .png or .jpg or .jpeg"),
        (["--out", "missing/x.png"], 2, "Error: --out missing/x.png: there is no folder missing"),
        (["--state", "blank", "--out", "x.png"], 2, "Error: --state needs --label"),
        (
            ["--split", "test", "--out", "x.png"],
            1,
            "Error: split 'test' does not exist; these shards hold train, dev, valid",
        ),
        (
            ["--where", "sex=Other", "--out", "x.png"],
            1,
            "Error: condition 'sex=Other' leaves none of 24 images, whose values are Female, Male",
        ),
    ],
)
def test_errors_say_what_to_do(shards: Shards, arguments: list[str], code: int, message: str) -> None:
    failed = run_pipeline("show", shards[0], *arguments, code=code)
    assert failed.stderr.splitlines()[-1] == message
