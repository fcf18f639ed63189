import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.labels import LABELS
from pipeline.look.label_report import find_examples
from pipeline.manifest import Manifest
from pipeline.stream.samples import open_split
from tests.conftest import run_pipeline
from tests.model.runs.test_report import Page


def write_page(path: Path, *arguments: object) -> str:
    done = run_pipeline("stats", *arguments, "--html", path)
    assert done.returncode == 0, done.stderr
    return path.read_text()


def images_of(page: str) -> list[tuple[str, str, np.ndarray]]:
    """State, label and pixels of each image on the wall."""
    found = re.findall(
        r'<div class="(\w+)"><img src="data:image/jpeg;base64,(.*?)" alt="(\w+) for (.*?)"', page
    )
    assert all(state == said for state, _, said, _ in found)
    return [
        (state, label, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), int))
        for state, data, _, label in found
    ]


def stored_images(folder: Path, manifest: Manifest) -> tuple[pa.Table, list[np.ndarray]]:
    """The tables of all splits and, in their order, the images, read from the tars by Pillow."""
    tables, images = [], []
    for name in manifest.splits:
        split = open_split(folder, manifest, name)
        tables.append(split.table)
        for row in split.table.select(["shard", "offset", "length"]).to_pylist():
            data = (folder / split.shards[row["shard"]].file).read_bytes()[row["offset"] :][: row["length"]]
            images.append(np.asarray(Image.open(io.BytesIO(data)), int))
    return pa.concat_tables(tables), images


def test_the_page_has_the_numbers_of_the_json(chexpert: Path, tmp_path: Path) -> None:
    options = ("--policy", "best,blank=ignore")
    html = write_page(tmp_path / "labels.html", chexpert / "train.csv", *options)
    page = Page(html)
    command = ("stats", chexpert / "train.csv", "--format", "json", *options)
    found = {
        by: json.loads(run_pipeline(*command, "--by", by).stdout)
        for by in ("view", "sex", "projection")  # all of train are of one age band
    }
    report = found["view"]
    text = " ".join(page.text.split())
    assert "Labels of train.csv all views" in text
    assert "Shortcut audit" in text
    assert f"Fewer than 10 patients in a class: {', '.join(LABELS)}." in text
    tiles = re.findall('<p class="value">(.*?)</p><p class="note">(.*?)</p>', html)
    assert tiles == [(f"{report[unit]}", unit) for unit in ("images", "studies", "patients")]
    assert page.tables["counts"][0][1:] == [
        [
            label,
            *(f"{row[state]:,}" for state in ("positive", "uncertain", "negative", "blank")),
            f"{100 * row['share_positive']:.1f}",
        ]
        for label, row in report["labels"].items()
    ]
    for grouped, rows in zip(found.values(), page.tables["groups"], strict=True):
        groups = grouped["by"]["groups"]
        assert rows[0] == ["label", *(f"{name} (n = {group['images']})" for name, group in groups.items())]
        assert rows[1:] == [
            [label, *(f"{100 * group['labels'][label]['share_positive']:.1f}" for group in groups.values())]
            for label in LABELS
        ]
    assert page.tables["policy"][0][1:] == [
        [label, row["policy"], *(str(row[name]) for name in ("positives", "negatives", "open", "masked"))]
        + ["–" if row[name] is None else f"{row[name]:.3f}" for name in ("mean_target", "pos_weight")]
        for label, row in report["policy"]["labels"].items()
    ]
    assert not [tag for tag, _ in page.tags if tag == "img"]  # a CSV has no images


def test_what_was_not_asked_for_or_is_not_there_is_left_out(chexpert: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path / "labels.html", chexpert, "--split", "valid", "--views", "frontal")
    assert "split valid, frontal views" in page
    headings = ["States", "Groups", "Co-occurrence", "Shortcut audit"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    assert re.findall('<a href="#.*?">(.*?)</a>', page) == headings
    assert re.findall("<h3>(.*?)</h3>", page) == ["positive % by sex", "positive % by age"]


def test_examples_are_images_of_that_state(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = shards
    page = write_page(tmp_path / "labels.html", folder)
    table, stored = stored_images(folder, manifest)
    counts: dict[tuple[str, str], list[int]] = {}
    for state, label, pixels in images_of(page):
        # The thumbnail is enlarged: the stored image nearest to it when it is made small again.
        small = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize(stored[0].shape[::-1]), int)
        distances = [abs(small - image).mean() for image in stored]
        row = int(np.argmin(distances))
        assert distances[row] < 3 < sorted(distances)[1]
        assert table[label][row].as_py() == {"positive": 1, "uncertain": -1}[state]
        counts.setdefault((label, state), []).append(row)
    assert all(len(set(rows)) == len(rows) for rows in counts.values())
    for label in LABELS:
        there = {value: table[label].to_pylist().count(value) for value in (1, -1)}
        unsure = min(2, there[-1])
        assert len(counts.get((label, "uncertain"), [])) == unsure
        assert len(counts[label, "positive"]) == min(8 - unsure, there[1])
    assert write_page(tmp_path / "again.html", folder) == page


def test_the_page_tells_nothing_of_a_single_patient(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = shards
    page = write_page(tmp_path / "labels.html", folder)
    assert "://" not in page
    assert str(tmp_path) not in page
    words = re.sub(r"base64,[^\"]*", "", page)
    table, _ = stored_images(folder, manifest)
    for column in ("key", "patient"):
        assert not [name for name in table[column].to_pylist() if name in words]
    for _, _, pixels in images_of(page):
        assert max(pixels.shape) <= 160
    datas = re.findall(r"base64,(.*?)\"", page)
    for data in datas:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_hostile_names_are_text(chexpert: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)<"
    hostile.mkdir()
    (chexpert / "train.csv").rename(hostile / "<img src=x>.csv")
    page = Page(write_page(tmp_path / "labels.html", hostile / "<img src=x>.csv"))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "Labels of <img src=x>.csv" in page.text


def test_a_split_and_a_view_decide_the_examples(shards: tuple[Path, Manifest]) -> None:
    folder, _ = shards
    everything, valid = find_examples(folder, None, "all"), find_examples(folder, "valid", "all")
    assert everything != valid
    assert not any(found.get("uncertain") for found in valid.values())  # CheXpert's valid has none
    assert not any(find_examples(folder, None, "lateral").values())


def test_damage_is_named(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, _ = shards
    for path in folder.glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[600] ^= 1  # inside the first image
        path.write_bytes(data)
    failed = run_pipeline("stats", folder, "--html", tmp_path / "labels.html")
    assert failed.returncode == 1
    assert re.fullmatch(
        rf"Error: {folder}/\w+-\d+.tar: sample patient\d+_study\d_view1_frontal: "
        "its bytes do not match the checksum in the index\n",
        failed.stderr,
    )
    assert not (tmp_path / "labels.html").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels.htm", "Error: --html labels.htm: the name must end in .html"),
        ("missing/labels.html", "Error: --html missing/labels.html: there is no folder missing"),
    ],
)
def test_a_page_that_cannot_be_written_is_a_usage_error(chexpert: Path, name: str, message: str) -> None:
    failed = run_pipeline("stats", chexpert, "--html", name)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1] == message
