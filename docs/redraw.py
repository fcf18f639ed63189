"""Redraw docs/pictures and write docs/sample anew, from the synthetic sample and its run: `make pictures`.

All is made by the project's own commands and pages, in build/pictures, which looks to make like a clone of its own.
What was trained there is not trained again: remove the folder for that. Needs Chromium.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageChops
from rich.console import Console
from rich.text import Text

from pipeline import open_shards
from pipeline.base.pages import open_templates
from pipeline.labels import LABELS

DOCS = Path(__file__).resolve().parent
PICTURES, SAMPLE = DOCS / "pictures", DOCS / "sample"
WORK = DOCS.parent / "build" / "pictures"
NEEDED = ("Makefile", "pyproject.toml", "requirements.lock", "train.py", ".venv")  # in WORK, by make
RUN, SWEEP = "runs/sample", "runs/sample-sweep"
CUED = "cued --images 1000 --shortcut Atelectasis=corners:0.9 --shortcut Pneumonia=marker:0.9"
FILMS = " ".join(f"sample/CheXpert-v1.0-small/valid/patient{number:05}" for number in range(580, 592))
PREDICT = ".venv/bin/python -m train predict"
COMMANDS = {  # what makes what is in WORK, besides make train
    "shards/synthetic/manifest.json": "make shards DATA=sample OUT=shards/synthetic SIZE=320 DEV=0.2",
    "labels.html": ".venv/bin/pipeline stats shards/synthetic --policy best --html labels.html",
    "shards/cued/manifest.json": f".venv/bin/pipeline sample {CUED} && .venv/bin/pipeline shards cued shards/cued",
    "audit.html": ".venv/bin/pipeline audit shards/cued --html audit.html",
    f"{RUN}/predictions.csv": f"make predict IMAGES='{FILMS}'",
    "maps.csv": f"{PREDICT} --run {RUN} --out maps.csv --heatmaps maps --heatmap-labels 14 {FILMS}",
    "report.html": f"cp {RUN}/report.html .",
    f"{SWEEP}/sweep.csv": "make sweep LR='5e-4 2e-3 8e-3' WD='1e-4 1e-2 1' SIZE=32 EPOCHS=3 ARGS='--png pictures'",
}
COPIED = [f"{RUN}/{name}" for name in ("model-card.md", "metrics.jsonl", "predictions.csv")]  # to SAMPLE
COPIED.append(f"{SWEEP}/sweep.csv")
SIGNS = {"+": 1, "?": -1, "−": 0}  # of states, in captions
# How much of a page is drawn, in pixels.
HEIGHTS = {"report.png": 850, "labels.png": 870, "audit.png": 1000}
CURVES, MAPS = ("Cardiomegaly", "Atelectasis"), ("Cardiomegaly", "Pleural Effusion")  # in front
COLUMNS, ROWS, SPACING = 100, 46, 24.4  # of the recorded terminal; rich's pixels from line to line
PAUSE, HOLD = 0.5, 10.0  # seconds: the longest wait for a line, and how long the end stays
# As in a terminal, but each progress bar only as it ends.
TERMINAL = {"COLUMNS": str(COLUMNS), "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "PYTHONUNBUFFERED": "1"}
SVG = """<svg viewBox="0 0 {width} %(bottom)d" xmlns="http://www.w3.org/2000/svg"><style>
text {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }}
text {{ font-size: {char_height}px }} #lines {{ transform: translateY(%(end).1fpx) }} {styles}
@media (prefers-reduced-motion: no-preference) {{ #lines {{ animation: %(seconds).1fs step-end infinite roll }} }}
@keyframes roll {{ %(frames)s }}
</style><defs><clipPath id="window"><rect width="{width}" height="%(window)d"/></clipPath>{lines}</defs>
<rect width="{width}" height="%(bottom)d" rx="8" fill="#292929"/>
<g transform="translate(10 10)" clip-path="url(#window)"><g id="lines">{backgrounds}{matrix}</g></g></svg>
"""
FRONT = """{% extends "base.html" %}{% block main %}<style>
main { max-width: none; padding: 0; display: grid; grid-template-columns: 430px 1fr; gap: 18px; align-items: center }
main img { display: block; width: 100% } figcaption { text-align: center } .panels { grid-template-columns: 1fr 1fr }
.films { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px } .films figcaption { font-size: 11px }
</style><div><p>Synthetic images: + positive, ? uncertain, − negative</p><div class="films">
{% for film, caption in films %}<figure><img src="{{ film }}"><figcaption>{{ caption }}
</figcaption></figure>{% endfor %}</div></div><div class="panels">{{ curves | join | safe }}
{% for label, map in maps.items() %}<figure><img src="{{ map }}"><figcaption>heat map: {{ label }}</figcaption></figure>
{% endfor %}</div>{% endblock %}"""


def main() -> None:
    """Run what has not been run, draw, and copy what the runs wrote."""
    for name in ("MAKEFLAGS", "MAKELEVEL"):  # of the make that runs this
        os.environ.pop(name, None)
    recorded = WORK / "make-train.json"
    if not recorded.exists():
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir(parents=True)
        for name in NEEDED:
            (WORK / name).symlink_to(DOCS.parent / name)
        recorded.write_text(json.dumps(record("make train")))
    for made, command in COMMANDS.items():
        if not (WORK / made).exists():
            subprocess.run(command, shell=True, cwd=WORK, check=True)
    for path in COPIED:
        shutil.copy(WORK / path, SAMPLE)
    (PICTURES / "make-train.svg").write_text(draw_recording(json.loads(recorded.read_text())))
    photograph("front.jpg", compose_front(), 830, 2000)
    for name, height in HEIGHTS.items():
        photograph(name, (WORK / name).with_suffix(".html").read_text(), 1200, height)
    save(Image.open(WORK / "pictures/dev-auroc.png").convert("RGB"), "sweep.png")


def record(command: str) -> list[tuple[float, str]]:
    """The lines that a terminal shows of a command, each with the seconds since its start."""
    start, lines = time.monotonic(), [(0.0, f"$ {command}\n")]
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command.split(), cwd=WORK, env=os.environ | TERMINAL, **piped) as process:
        lines += [(time.monotonic() - start, line) for line in process.stdout or ()]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return lines


def draw_recording(lines: list[tuple[float, str]]) -> str:
    """A terminal that plays the lines, without long waits, as SVG; where nothing may move, it shows their end."""
    console = Console(record=True, file=io.StringIO(), width=COLUMNS)
    clock, before, shown = 0.0, 0.0, 0
    moments: list[tuple[float, float]] = []  # when, and by how many pixels the lines are moved down
    for at, line in lines:
        if line != "\x1b[?25h\n":  # rich ends a bar that does not move with a line of its own
            wrapped = Text.from_ansi(line.rstrip("\n").expandtabs()).wrap(console, COLUMNS) or [Text()]
            console.print(*wrapped, sep="\n", no_wrap=True)
            clock, before, shown = clock + min(at - before, PAUSE), at, shown + len(wrapped)
            moments.append((clock, SPACING * (ROWS - shown)))
    frames = (f"{100 * at / (clock + HOLD):.2f}% {{{{ transform: translateY({y:.1f}px) }}}}" for at, y in moments)
    places = {"bottom": ROWS * SPACING + 20, "window": ROWS * SPACING, "end": moments[-1][1]}
    svg = SVG % {**places, "seconds": clock + HOLD, "frames": " ".join(frames)}
    return console.export_svg(code_format=svg, unique_id="t")


def compose_front() -> str:
    """A page of synthetic images, the report's ROC curves and predict's heat maps."""
    train = open_shards(WORK / "shards/synthetic")["train"]
    batch = next(iter(train.batches(batch_size=6, size=256, epoch=0, seed=1)))
    films = []
    for pixels, row in zip(batch.images, train.split.table.take(batch.step.images).to_pylist(), strict=True):
        states = {sign: [name for name in LABELS if row[name] == state] for sign, state in SIGNS.items()}
        caption = "; ".join(f"{sign} {', '.join(names)}" for sign, names in states.items() if names)
        films.append((embed_picture(Image.fromarray(pixels[0])), caption))
    report, scores = (WORK / "report.html").read_text(), pd.read_csv(WORK / "maps.csv")
    named = f'<figure><svg[^>]*"ROC curve of (?:{"|".join(CURVES)})".*?</figure>'
    curves = re.findall(named, report, re.DOTALL)[: len(CURVES)]  # of valid, which comes first
    maps = {}
    for label in MAPS:  # on the film with the highest score
        name = f"{scores[label].idxmax() + 1:05d}-*-{label.lower().replace(' ', '-')}.png"
        maps[label] = embed_picture(Image.open(next((WORK / "maps").glob(name))))
    template = open_templates("pipeline.look").from_string(FRONT)
    return template.render(title="", films=films, curves=curves, maps=maps)


def embed_picture(picture: Image.Image) -> str:
    """A picture as a JPEG data URI."""
    data = io.BytesIO()
    picture.convert("RGB").save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def photograph(name: str, page: str, width: int, height: int) -> None:
    """Draw the top of a page at that size, without what is empty below it; two pixels for each of CSS."""
    path, picture = WORK / "page.html", WORK / "page.png"
    path.write_text(page)
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=2"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # a container has no user for it
    options += ["--blink-settings=preferredColorScheme=1", f"--window-size={width},{height}"]
    options += [f"--user-data-dir={WORK / 'profile'}", f"--screenshot={picture}", path.as_uri()]
    subprocess.run(["chromium", *options], check=True, capture_output=True, timeout=120)
    shot = Image.open(picture).convert("RGB")
    drawn = ImageChops.difference(shot, Image.new("RGB", shot.size, "white")).getbbox() or (0, 0, 0, 0)
    save(shot.crop((0, 0, shot.width, min(drawn[3] + 24, shot.height))), name)


def save(picture: Image.Image, name: str) -> None:
    """Write a picture to PICTURES, small."""
    if name.endswith(".png"):
        picture = picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(PICTURES / name, optimize=True, quality=80)


if __name__ == "__main__":
    main()
