"""Input that nobody has thought of: what is made of it is sound, or it is refused with a name."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pipeline import DataError
from pipeline.labels import COLUMNS
from pipeline.manifest import Manifest, read_manifest, write_manifest
from pipeline.sources.sets import read_any_table
from tests.fuzz import TARGETS, feed, make_example, manifest_target

ROUNDS = range(100)
ROW = "CheXpert-v1.0-small/train/patient{}/study1/view1_frontal.jpg,Female,60,Frontal,AP" + ",1.0,,0.0,-1.0,,,,,,,,,,"
CSV = "\n".join([",".join(COLUMNS), *(ROW.format(f"{number:05d}") for number in range(1, 6))]) + "\n"
# Bytes that matter to parsers.
TOKENS = 'é|NaN|inf|1e0| 1.0|-1|2.0|=1+1|../|/etc/passwd|patient|study|",|,|\n|\r\n|\0|\\|\ufeff'.encode().split(b"|")
TOKENS += [b"\xff", b"9" * 120, b"x" * 70_000]


def damage(data: bytes, seed: int) -> bytes:
    """The data with one to four places cut out or replaced, by a token or by any bytes."""
    random = Random(seed)
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(data))
        end = random.randint(start, min(len(data), start + 40))
        token = random.choice(TOKENS) if random.random() < 0.5 else random.randbytes(random.randint(0, 8))
        data = data[:start] + token + data[end:]
    return data


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, beside which are the other sound files that inputs are bred from."""
    return make_example(tmp_path_factory.mktemp("example"))


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "dicom"])
def test_a_damaged_file_is_sound_or_refused(name: str, example: Path, tmp_path: Path) -> None:
    make_target, seeds = TARGETS[name]
    target = make_target(tmp_path, example)
    files = [path.read_bytes() for path in sorted(example.glob(seeds))]
    for seed in ROUNDS:
        message = feed(target, damage(files[seed % len(files)], seed))
        assert message.startswith(str(tmp_path) if message else ""), message


LABEL = ", line 2, column No Finding: '{}' is not a label: 1.0, 0.0, -1.0 or blank"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Path", "\ufeffPath", ""),
        ("\n", "\r\n", ""),
        ("Female", '"Female"', ""),
        (",1.0,", ',"1.0",', ""),
        (",1.0,", ",1,", ""),
        (",1.0,", ",1e0,", ""),
        (",1.0,", ", 1.0,", ""),
        (",1.0,", ",NaN,", LABEL.format("NaN")),
        (",1.0,", ",inf,", LABEL.format("inf")),
        ("\n", ",Edema\n", ": column Edema appears 2 times"),
        ("patient00002", "patient00001", ", lines 2 and 3: the same image"),
        ("patient00002", "pätient00002", ", line 3, column Path: "),
        ("00002", "2" * 100, ", line 3, column Path: "),
        ("Female", "F" * 10_000_000, ": not a readable CSV: "),
        ("Female", "F\udce9male", ": not a readable CSV: "),
    ],
)
def test_tables_as_programs_write_them(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(CSV.replace(old, new, 1 if len(new) > 1000 else -1).encode(errors="surrogateescape"))
    if complaint:
        with pytest.raises(DataError) as caught:
            read_any_table(path)
        assert str(caught.value).startswith(f"{path}{complaint}")
    else:
        assert read_any_table(path)["No Finding"].to_pylist() == [1] * 5


def test_utf_16_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(CSV, encoding="utf-16")
    with pytest.raises(DataError, match=f"^{path}: not a readable CSV: "):
        read_any_table(path)


HOSTILE = "\x1b[2J\ufeff.tar"


PLACES = ("splits", "splits train table", "splits train shards 0 file", "policies uncertain", "version")


@pytest.mark.parametrize("place", PLACES)
def test_no_text_of_a_manifest_reaches_the_terminal_raw(shards: tuple[Path, Manifest], place: str) -> None:
    folder, manifest = shards
    write_manifest(folder, manifest)
    document: Any = json.loads((folder / "manifest.json").read_bytes())
    *above, last = place.split()
    inner = document
    for name in above:
        inner = inner[int(name) if name == "0" else name]
    inner[last] = {HOSTILE: inner[last]["train"]} if last == "splits" else HOSTILE
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=rf"^{folder}/") as caught:
        read_manifest(folder)
    assert str(caught.value).isprintable()
    assert "\\x1b[2J" in str(caught.value)


VALUES: list[Any] = [None, True, -1, 0, 2**31, 2**63, 10**400, 1.5, [], [[]], {}]
VALUES += ["", "x", "\x1b[2J", "\ufeff", "../x", "/etc/passwd"]


def test_a_manifest_with_other_values_is_refused_by_name(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    whole = (folder / "manifest.json").read_bytes()
    target = manifest_target(folder, folder)
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
        feed(target, json.dumps(document).encode())
