"""The pages in a real browser: needs `chromium`; `make test-pages` installs it."""

import html
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.runs.report import render_report
from pipeline.labels import LABELS
from pipeline.look.label_report import STRENGTH
from pipeline.measure.evaluate import Scored, add_other, assess, calibrate
from pipeline.measure.evaluation import Evaluation
from tests.conftest import Shards, run_pipeline
from tests.model.runs.test_sweep_report import make_trial, render

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.pages, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]
LIGHT, DARK = 1, 0  # of Blink's setting preferredColorScheme
FRAME = Path(__file__).with_name("frame.html").read_text()


@pytest.fixture(scope="module")
def judged() -> tuple[Scored, Evaluation]:
    """400 images with signal, of all 14 labels."""
    random = np.random.default_rng(0)
    target = (random.random((400, 14)) < 0.3).astype(np.float32)
    scores = 1 / (1 + np.exp(1 - random.normal(0, 1, target.shape) - 2 * target))
    rows, mask = np.arange(400), np.ones(target.shape, bool)
    sex, projection = random.choice(["Female", "Male"], 400), random.choice(["AP", "PA"], 400)
    facts = rows // 2, rows, sex, random.integers(18, 95, 400), projection
    images = Scored(scores.astype(np.float32), target, mask, *facts)
    evaluation = assess(LABELS, images, calibrate(LABELS, images), split="valid")
    evaluation.head |= {"against": [other := "runs/" + "a-long-name-" * 12]}
    add_other(evaluation, images, other, images.scores**2)
    return images, evaluation


def open_page(folder: Path, page: str, width: int, scheme: int) -> dict[str, Any]:
    """Lay the page out at that width; what FRAME finds, and what the browser complained of."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(page)))
    command = [CHROMIUM, "--headless", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    command += ["--dump-dom", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={scheme}"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []  # a container has no user for it
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    (measured,) = re.findall('data-measured="(.*?)"', done.stdout)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return dict(json.loads(html.unescape(measured))) | {"complaints": complaints}


def luminance(color: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.1)."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", color)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colors, 1 to 21 (WCAG 2.1)."""
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


SIZES_AND_SCHEMES = pytest.mark.parametrize(("width", "scheme"), [*itertools.product((1280, 390), (LIGHT, DARK))])


def look(folder: Path, page: str, width: int, scheme: int) -> dict[str, Any]:
    """What is seen of a page on which nothing is too wide, cut, flat or refused, in the colors of the scheme."""
    seen = open_page(folder, page, width, scheme)
    nothing = {"complaints": [], "wide": [], "flat": 0, "cut": [], "broken": 0, "beyond": 0}
    assert {name: seen[name] for name in nothing} == nothing
    assert seen["width"] == seen["scrolled"] == width
    assert (luminance(seen["background"]) < 0.1) == (scheme == DARK)
    assert contrast(seen["color"], seen["background"]) > 7
    return seen


@SIZES_AND_SCHEMES
def test_the_report_is_legible(judged: tuple[Scored, Evaluation], tmp_path: Path, width: int, scheme: int) -> None:
    images, evaluation = judged
    config = {"arch": "resnet18", "manifest": "0123456789abcdef" * 4, "labels": LABELS}
    names = ("macro_auroc", "macro10_auroc", "mean5_auroc", "train_loss", "dev_loss")
    history = [{"epoch": epoch} | dict.fromkeys(names, 1 / epoch) for epoch in (1, 2)]
    page = render_report("runs/" + "long-" * 30, config, history, [evaluation], {"valid": images})
    seen = look(tmp_path, page, width, scheme)
    assert seen["scaled"]
    assert seen["headline"][0] == evaluation.get("auroc", "macro10").shown
    assert seen["ticks"] == [seen["color"]]
    drawn = [color for color in seen["series"] if color.startswith("rgb")]
    assert len(drawn) == 5  # ink, faint and three series
    assert all(contrast(color, seen["background"]) > 3 for color in drawn)


def test_what_is_wrong_with_a_page_is_noticed(judged: tuple[Scored, Evaluation], tmp_path: Path) -> None:
    images, evaluation = judged
    page = render_report("runs/first", {}, [], [evaluation], {"valid": images})
    wrong = "<p style='width: 600px'>…</p><img src='https://127.0.0.1:9/'><script>1</script></main>"
    seen = open_page(tmp_path, page.replace("</main>", wrong), 390, LIGHT)
    assert seen["scrolled"] > 600
    assert len(seen["wide"]) == 1
    assert len(seen["complaints"]) == 2  # the page's own policy lets it load nothing and run nothing


@SIZES_AND_SCHEMES
def test_the_label_report_is_legible(shards: Shards, tmp_path: Path, width: int, scheme: int) -> None:
    path = tmp_path / "labels.html"
    counted = run_pipeline("stats", shards[0], "--policy", "best", "--format", "json", "--html", path)
    document = json.loads(counted.stdout)
    seen = look(tmp_path, path.read_text(), width, scheme)
    assert seen["scaled"]
    assert seen["headline"] == [str(document[unit]) for unit in ("images", "studies", "patients")]
    # Names of labels in ink; numbers in black on the three colors of states, which are the same in the dark.
    assert set(seen["ticks"]) == {seen["color"], "rgb(0, 0, 0)"}
    states = {state: color for state, color in seen["states"].items() if state != "blank"}
    assert len(set(states.values())) == 3
    assert all(contrast("rgb(0, 0, 0)", color) > 4.5 for color in states.values())
    assert contrast(seen["color"], seen["states"]["blank"]) > 4.5
    assert contrast(seen["color"], blend(seen["blue"], seen["background"], STRENGTH)) > 4


@SIZES_AND_SCHEMES
def test_the_sweep_report_is_legible(tmp_path: Path, width: int, scheme: int) -> None:
    trials = [
        make_trial(number, 0.7 + 0.02 * number, lr=lr, weight_decay=decay)
        for number, (lr, decay) in enumerate(itertools.product((1e-4, 1e-3, 1e-2), (0.0, 1e-4, 1e-2)))
    ]
    trials.append(make_trial(9, None, "failed", lr=0.1, weight_decay=1e-2))
    seen = look(tmp_path, render("runs/sweep", trials), width, scheme)
    assert seen["headline"] == ["0.860", "0.810 [0.780, 0.840]"]
    assert seen["ticks"] == [seen["color"]]


def blend(color: str, background: str, share: float) -> str:
    """A color of that opacity on a background."""
    pairs = zip(*(map(int, re.findall(r"\d+", text)) for text in (color, background)), strict=True)
    return "rgb({}, {}, {})".format(*(round(share * over + (1 - share) * under) for over, under in pairs))
