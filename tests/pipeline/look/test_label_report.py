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
    words = (chexpert / "train.csv", "--policy", "best,blank=ignore")
    html = write_page(tmp_path / "labels.html", *words, "--png", tmp_path / "png")
    pictures = {path.name for path in (tmp_path / "png").iterdir()}
    assert pictures == {"co-occurrence.png", "share-of-images-by-state.png"}
    page = Page(html)
    variables = ("view", "sex", "projection")  # all of train are of one age band
    reports = [json.loads(run_pipeline("stats", *words, "--format", "json", "--by", by).stdout) for by in variables]
    text, report = " ".join(page.text.split()), reports[0]
    assert "Labels of train.csv all views" in text
    assert f"Fewer than 10 patients in a class: {', '.join(LABELS)}." in text
    tiles = re.findall('<p class="value">(.*?)</p><p class="note">(.*?)</p>', html)
    assert tiles == [(f"{report[unit]}", unit) for unit in ("images", "studies", "patients")]
    states = ("positive", "uncertain", "negative", "blank")
    assert page.tables["counts"][0][1:] == [
        [label, *(f"{row[state]:,}" for state in states), f"{100 * row['share_positive']:.1f}"]
        for label, row in report["labels"].items()
    ]
    for grouped, rows in zip(reports, page.tables["groups"], strict=True):
        groups = grouped["by"]["groups"]
        assert rows[0] == ["label", *(f"{name} (n = {group['images']})" for name, group in groups.items())]
        shares = {label: [group["labels"][label]["share_positive"] for group in groups.values()] for label in LABELS}
        assert rows[1:] == [[label, *(f"{100 * share:.1f}" for share in row)] for label, row in shares.items()]
    assert page.tables["policy"][0][1:] == [
        [label, row["policy"], *(str(row[name]) for name in ("positives", "negatives", "open", "masked"))]
        + ["–" if row[name] is None else f"{row[name]:.3f}" for name in ("mean_target", "pos_weight")]
        for label, row in report["policy"]["labels"].items()
    ]


def test_what_was_not_asked_for_or_is_not_there_is_left_out(chexpert: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path / "labels.html", chexpert, "--split", "valid", "--views", "frontal")
    assert "split valid, frontal views" in page
    headings = ["States", "Groups", "Co-occurrence", "Shortcut audit"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    assert re.findall('<a href="#.*?">(.*?)</a>', page) == headings
    assert re.findall("<h3>(.*?)</h3>", page) == ["positive % by sex", "positive % by age"]


def test_the_page_tells_nothing_of_a_single_patient(shards: Shards, tmp_path: Path) -> None:
    page, table = write_page(tmp_path / "labels.html", shards[0]), open_split(*shards, "train").table
    names = ["://", "<img", str(tmp_path), *table["key"].to_pylist(), *table["patient"].to_pylist()]
    assert [name for name in names if name in page] == []


def test_hostile_names_are_text(chexpert: Path, tmp_path: Path) -> None:
    (hostile := tmp_path / "<script>alert(1)<").mkdir()
    csv = (chexpert / "train.csv").rename(hostile / "<img src=x>.csv")
    page = Page(write_page(tmp_path / "labels.html", csv))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "Labels of <img src=x>.csv" in page.text
