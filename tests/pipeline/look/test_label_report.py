import json
import re
from pathlib import Path

from pipeline.labels import LABELS
from pipeline.stream.samples import open_split
from tests.conftest import Shards, run_pipeline
from tests.model.runs.test_report import Page


def write_page(path: Path, *arguments: object) -> str:
    run_pipeline("stats", *arguments, "--html", path)
    return path.read_text()


def test_the_page_has_the_numbers_of_the_json(chexpert: Path, tmp_path: Path) -> None:
    options = ("--policy", "best,blank=ignore")
    html = write_page(tmp_path / "labels.html", chexpert / "train.csv", *options, "--png", tmp_path / "png")
    pictures = {path.name for path in (tmp_path / "png").iterdir()}
    assert pictures == {"co-occurrence.png", "share-of-images-by-state.png"}
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


def test_the_page_tells_nothing_of_a_single_patient(shards: Shards, tmp_path: Path) -> None:
    folder, manifest = shards
    page = write_page(tmp_path / "labels.html", folder)
    assert "://" not in page
    assert "<img" not in page
    assert str(tmp_path) not in page
    table = open_split(folder, manifest, "train").table
    for column in ("key", "patient"):
        assert not [name for name in table[column].to_pylist() if name in page]


def test_hostile_names_are_text(chexpert: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)<"
    hostile.mkdir()
    (chexpert / "train.csv").rename(hostile / "<img src=x>.csv")
    page = Page(write_page(tmp_path / "labels.html", hostile / "<img src=x>.csv"))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "Labels of <img src=x>.csv" in page.text
