"""docs/pictures and docs/sample, which `make pictures` makes."""

import re
from pathlib import Path

from docs.redraw import PICTURES, SAMPLE, draw_recording
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]


def test_every_picture_is_small_and_shown_on_a_page() -> None:
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+\.(?:png|jpg|svg))\)", page.read_text())
        if "://" not in target
    }
    pictures = {path.resolve() for path in PICTURES.iterdir()}
    assert linked == pictures
    assert {path.name for path in pictures if path.stat().st_size > 300_000} == set()


def test_the_sample_is_small_and_its_readme_names_every_file() -> None:
    files = [path for path in SAMPLE.iterdir() if path.name != "README.md"]
    assert sum(path.stat().st_size for path in files) < 600_000
    readme = (SAMPLE / "README.md").read_text()
    assert len(readme.splitlines()) <= 30
    assert set(re.findall(r"\]\(([\w.-]+)\)", readme)) == {path.name for path in files}


def test_the_sample_tells_nothing_of_the_machine_that_made_it() -> None:
    folders = r"(?<![\w.])/(home|root|work|tmp|usr|opt|mnt|var|data|Users)/\w"
    for path in (*SAMPLE.iterdir(), PICTURES / "make-train.svg"):
        text = re.sub(r'"data:[^"]*"', "", path.read_text())
        assert re.findall(folders, text) == [], path.name


def test_a_recording_plays_its_lines_without_the_long_waits(tmp_path: Path) -> None:
    lines = [
        (0.0, "$ make it\n"),
        (99.0, "\x1b[32mgreen\x1b[0m <1>\n"),
        (99.0, "\x1b[?25h\n"),
        (99.1, "x" * 150 + "\n"),
    ]
    svg = draw_recording(lines)
    assert re.findall(r"<text[^>]*>([^<\n]+)</text>", svg) == [
        "$&#160;make&#160;it",
        "green",
        "&#160;&lt;1&gt;",
        "x" * 100,
        "x" * 50,
    ]
    assert "animation: 10.6s" in svg  # of which 0.5 s are the pause, and 10 its end
    heights = [float(height) for height in re.findall(r"% { transform: translateY\((.*?)px\)", svg)]
    assert heights == [1098.0, 1073.6, 1024.8]  # of 46 lines, 45, 44 and 42 are below those shown
    assert "#lines { transform: translateY(1024.8px) }" in svg
