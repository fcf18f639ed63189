"""Input that nobody has thought of: what is made of it is sound, or it is refused with a name."""

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline import DataError
from pipeline.images import ENCODINGS, ImageError, ImageOptions, decode_stored, prepare
from pipeline.labels import COLUMNS, LABELS
from pipeline.manifest import Manifest, read_manifest, write_manifest
from pipeline.sources.sets import read_any_table
from pipeline.stream.samples import open_split
from tests.pipeline.test_images import encode

ROUNDS = range(100)
ROW = (
    "CheXpert-v1.0-small/train/patient{}/study1/view1_frontal.jpg,Female,60,Frontal,AP"
    + ",1.0,,0.0,-1.0,,,,,,,,,,"
)
CSV = "\n".join([",".join(COLUMNS), *(ROW.format(f"{number:05d}") for number in range(1, 6))]) + "\n"
# Bytes that matter to parsers.
TOKENS = [
    *(
        b'"',
        b",",
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        "é".encode(),
        b"NaN",
        b"inf",
        b"1e0",
        b" 1.0",
    ),
    *(b"-1", b"2.0", b"=1+1", b"../", b"/etc/passwd", b"patient", b"9" * 120, b"x" * 70_000, b"\\", b"study"),
]


def damage(data: bytes, seed: int) -> bytes:
    """The data with one to four places cut out or replaced, by a token or by any bytes."""
    random = Random(seed)
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(data))
        end = random.randint(start, min(len(data), start + 40))
        token = random.choice(TOKENS) if random.random() < 0.5 else random.randbytes(random.randint(0, 8))
        data = data[:start] + token + data[end:]
    return data


def check_message(error: DataError, path: Path) -> None:
    """It begins with what it is about, and holds nothing that a terminal would obey."""
    assert str(error).startswith(str(path))
    assert str(error).isprintable()
    assert len(str(error)) < 1000


@pytest.mark.parametrize("seed", ROUNDS)
def test_a_damaged_csv_is_a_sound_table_or_refused_by_name(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(damage(CSV.encode(), seed))
    try:
        table = read_any_table(path)
    except DataError as error:
        check_message(error, path)
        return
    assert len(set(table["key"].to_pylist())) == table.num_rows
    for row in table.to_pylist():
        *folders, patient, study, file = row["path"].split("/")
        assert all(re.fullmatch(r"[\w.-]+", folder) and folder.strip(".") for folder in folders)
        assert re.fullmatch(r"patient\d+/study\d+", f"{patient}/{study}")
        assert re.fullmatch(r"view\d+_(frontal|lateral)\.(?i:jpg|jpeg|png)", file)
        assert len(row["key"]) <= 90  # fits into a tar's header
        assert {row[label] for label in LABELS} <= {1, 0, -1, None}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: "\ufeff" + text, None),
        (lambda text: text.replace("\n", "\r\n"), None),
        (lambda text: text.replace("Female", '"Female"'), None),
        (lambda text: text.replace(",1.0,", ',"1.0",'), None),
        (lambda text: text.replace(",1.0,", ",1,"), None),
        (lambda text: text.replace(",1.0,", ",1e0,"), None),
        (lambda text: text.replace(",1.0,", ", 1.0,"), None),
        (
            lambda text: text.replace(",1.0,", ",NaN,"),
            ", line 2, column No Finding: 'NaN' is not a label: 1.0, 0.0, -1.0 or blank",
        ),
        (
            lambda text: text.replace(",1.0,", ",inf,"),
            ", line 2, column No Finding: 'inf' is not a label: 1.0, 0.0, -1.0 or blank",
        ),
        (
            lambda text: text.replace("\n", ",,,,\n").replace("Devices,,,,", "Devices,Edema,,X,Edema", 1),
            ": column Edema appears 3 times",
        ),
        (lambda text: text.replace("patient00002", "patient00001"), ", lines 2 and 3: the same image"),
        (lambda text: text.replace("patient00002", "pätient00002"), ", line 3, column Path: "),
        (lambda text: text.replace("00002", "2" * 100), ", line 3, column Path: "),
        (lambda text: text.replace("Female", "F" * 10_000_000, 1), ": not a readable CSV: "),
        (lambda text: text.encode("utf-16"), ": not a readable CSV: "),
        (lambda text: text.encode().replace(b"Female", b"F\xe9male"), ": not a readable CSV: "),
    ],
)
def test_tables_as_programs_write_them(tmp_path: Path, change: Any, complaint: str | None) -> None:
    path = tmp_path / "train.csv"
    content = change(CSV)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if complaint is None:
        table = read_any_table(path)
        assert table["No Finding"].to_pylist() == [1] * 5
    else:
        with pytest.raises(DataError) as caught:
            read_any_table(path)
        assert str(caught.value).startswith(f"{path}{complaint}")


FILM = np.add.outer(np.arange(40), np.arange(48)).astype(np.uint8)
SOURCES = {
    "jpeg": simplejpeg.encode_jpeg(FILM[..., None], colorspace="GRAY"),
    "progressive": encode(Image.fromarray(FILM), progressive=True),
    "cmyk": encode(Image.merge("CMYK", [Image.fromarray(FILM)] * 4)),
    "png": encode(Image.fromarray(FILM), format="PNG"),
    "png16": encode(Image.fromarray(FILM.astype(np.uint16) * 256), format="PNG"),
}
OPTIONS = ImageOptions(size=32, square="no", encoding="jpeg", quality=95, max_pixels=10_000)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_damaged_image_is_an_image_or_refused(kind: str) -> None:
    for seed in ROUNDS:
        try:
            image = prepare(damage(SOURCES[kind], seed), OPTIONS)
        except ImageError:
            continue
        assert image.pixels.dtype == np.uint8, seed
        assert image.pixels.size <= OPTIONS.max_pixels, seed
        assert decode_stored(image.data, "jpeg").shape == image.pixels.shape, seed


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_damage_to_what_is_stored_is_an_image_or_refused(encoding: str) -> None:
    stored = prepare(SOURCES["jpeg"], OPTIONS._replace(encoding=encoding)).data
    for seed in ROUNDS:
        try:
            pixels = decode_stored(damage(bytes(stored), seed), encoding)
        except ValueError:  # which the stream names by shard and key
            continue
        assert pixels.dtype == np.uint8, seed
        assert pixels.ndim == 2, seed


def open_all(folder: Path, manifest: bytes) -> None:
    """Open the splits of such a manifest, or be refused by name."""
    (folder / "manifest.json").write_bytes(manifest)
    try:
        found = read_manifest(folder)
        for name in found.splits:
            open_split(folder, found, name)
    except DataError as error:
        check_message(error, folder)


def test_a_damaged_manifest_is_one_or_refused_by_name(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    whole = (folder / "manifest.json").read_bytes()
    for seed in ROUNDS:
        open_all(folder, damage(whole, seed))


HOSTILE = "\x1b[2J\ufeff.tar"


def hostile_split(document: Any) -> None:
    document["splits"][HOSTILE] = document["splits"].pop("dev")


@pytest.mark.parametrize(
    "change",
    [
        hostile_split,
        lambda document: document["splits"]["train"].update(table=HOSTILE),
        lambda document: document["splits"]["train"]["shards"][0].update(file=HOSTILE),
        lambda document: document["policies"].update(uncertain=HOSTILE),
        lambda document: document.update(version=HOSTILE),
    ],
)
def test_no_text_of_a_manifest_reaches_the_terminal_raw(shards: tuple[Path, Manifest], change: Any) -> None:
    folder, manifest = shards
    write_manifest(folder, manifest)
    document = json.loads((folder / "manifest.json").read_bytes())
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        read_manifest(folder)
    check_message(caught.value, folder)
    assert "\\x1b[2J" in str(caught.value)


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1.5,
    "",
    "x",
    "\x1b[2J",
    "\ufeff",
    "../x",
    "/etc/passwd",
]
VALUES += [[], [[]], {}]


def test_a_manifest_with_other_values_is_refused_by_name(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    whole = (folder / "manifest.json").read_bytes()
    for seed in ROUNDS:
        random, document = Random(seed), json.loads(whole)
        place: Any = document
        while True:  # down to any place
            key = random.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and random.random() < 0.5:
                place = place[key]
            else:
                break
        place[key] = random.choice(VALUES)
        open_all(folder, json.dumps(document).encode())
