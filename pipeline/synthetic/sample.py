"""A synthetic CheXpert: the real set's folders, CSVs and label quirks, with synthetic chest X-rays.

A study draws correlated latent severities (`FINDINGS`). A severity draws its sign into the image, and the CSV states
what a report would: positive for a clear sign; uncertain for a faint one that is really there only in a share of cases
(the share that radiologists confirm); negative or blank for none. Train follows the real set's frontal state
frequencies, except that the rarest labels (Enlarged Cardiomediastinum, Lung Lesion, Pneumonia, Pleural Other, Fracture)
are raised to 5-7 % positive, so that a sample of 2,000 images has some to evaluate. Valid states the truth, as its
radiologists do, without blank or uncertain cells. Lung Opacity follows from its children; Enlarged Cardiomediastinum
is only correlated with Cardiomegaly, as in the real reports.
"""

import csv
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg

from pipeline.base.csvs import read_data
from pipeline.base.errors import DataError, quote
from pipeline.base.files import named_writes, write_csv
from pipeline.base.workers import run_tasks
from pipeline.labels import COLUMNS, LABELS, find_label
from pipeline.synthetic.anatomy import VISIBLE, Array, Finding, Findings, Gray, draw_image

FOLDER = "CheXpert-v1.0-small"
Row = tuple[str, str, str, int, int, int, int]  # of boxes.csv
STUDIES_PER_TASK = 40
NOTICE = (
    "The images in this folder are procedurally generated drawings, not patients. "
    "They follow CheXpert's layout for first runs and tests and have no medical meaning.\n"
)
# APP0 would normally follow SOI; decoders accept a comment (marker FFFE, its length, the text) before it.
COMMENT = b"\xff\xfe\x00\x0bsynthetic"

# How often reports give each state, in shares of frontals (the rest is blank), of which Lung Opacity's positive one is
# for haze with no other cause; the share of uncertain findings that are really there; `lateral` as in Finding; loads on
# the factors congestion, infection and care; corners of the box that holds the sign's place.
FINDINGS = {row.pop("label"): [*map(float, row.values())] for row in read_data(Path(__file__).parent, "latent.csv")}
OPACITIES = ("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Lung Lesion")


class Study(NamedTuple):
    """One examination of a patient."""

    patient: int
    sex: str
    age: int
    number: int  # the patient's first is 1
    views: list[tuple[str, str]]  # kind and projection
    states: dict[str, float | None]  # None is blank
    findings: Findings


class Shortcut(NamedTuple):
    """A cue unrelated to the disease, such as the marker of a portable device, that a network may learn instead.

    From such markers, networks have learned pneumonia: Zech et al., Variable generalization performance of a deep
    learning model to detect pneumonia, PLOS Medicine 15, 2018.
    """

    label: str
    cue: str
    strength: float  # from 0, not tied to the label, to 1, always


def parse_shortcut(text: str) -> Shortcut:
    """The shortcut that `Pneumonia=marker:0.9` describes. Raises DataError."""
    name, _, tie = text.partition("=")
    cue, _, number = tie.partition(":")
    label = find_label(name)
    with suppress(ValueError):
        if label is not None and cue in CUES and 0 <= float(number) <= 1:
            return Shortcut(label, cue, float(number))
    cues = ", ".join(CUES)
    raise DataError(f"'{quote(text, 80)}' is not LABEL=CUE:STRENGTH: a label, one of {cues}, and a number from 0 to 1")


def write_sample(
    out: Path,
    images: int = 2000,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    laterals: float | None = None,
    valid: float = 0.12,
    shortcuts: Sequence[Shortcut] = (),
) -> Path:
    """Write a synthetic data set of exactly `images` images into `out` and return its CheXpert-v1.0-small.

    Beside it, boxes.csv locates the signs that a radiologist would call present, in pixels. `laterals` is the share of
    studies that have a lateral too; None approximates the real set's share. It changes no frontal or label, but more
    laterals make fewer studies of as many images. `valid` is the share of images in valid.csv. `shortcuts` are drawn
    into the images of train.csv alone: a network that learns them fails on valid. `progress` gets (images done, total).

    The bytes depend only on these options, seed from 0 to 2^63-1, not on the number of `workers`, which are processes
    (a script must call this under `if __name__ == "__main__"`). The folder appears only when complete. Raises
    FileExistsError if it exists, ValueError if images < 1, DataError, naming the file, if one cannot be written.
    """
    final, partial = out / FOLDER, out / f".{FOLDER}.tmp"
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    if final.exists():
        raise FileExistsError(f"{final} already exists: remove it or choose another folder")
    if partial.exists():
        shutil.rmtree(partial)
    valid_images = max(1, round(images * valid))
    train = list(draw_studies(seed, 1, images - valid_images, False, laterals))
    held_out = list(draw_studies(seed, train[-1].patient + 1 if train else 1, valid_images, True, laterals))
    planted = (f"Planted in train: {cue} for {label}, strength {strength:g}.\n" for label, cue, strength in shortcuts)
    tasks, boxes, done = list[DrawTask](), list[Row](), 0
    for split, studies, cues in (("train", train, shortcuts), ("valid", held_out, ())):
        (partial / split).mkdir(parents=True)
        with named_writes(path := partial / f"{split}.csv"), path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for study, view, image in list_images(studies):
                kind, projection = study.views[view - 1]
                facts = (f"{FOLDER}/{split}/{image}", study.sex, study.age, kind.title(), projection)
                writer.writerow([*facts, *(study.states[label] for label in LABELS)])
        for start in range(0, len(studies), STUDIES_PER_TASK):
            tasks.append(DrawTask(partial / split, seed, studies[start : start + STUDIES_PER_TASK], cues))
    with named_writes(path := partial / "SYNTHETIC.txt"):
        path.write_text(NOTICE + "".join(planted))
    for written, rows in run_tasks(write_studies, tasks, min(workers, len(tasks))):
        boxes += rows
        done += written
        progress(done, images)
    write_csv(out / "boxes.csv", [("split", "key", "label", "x", "y", "w", "h"), *sorted(boxes)])
    return partial.rename(final)


class DrawTask(NamedTuple):
    """Some studies of one split to draw into `folder`, with cues."""

    folder: Path
    seed: int
    studies: list[Study]
    shortcuts: Sequence[Shortcut]

    def __str__(self) -> str:
        return f"{self.folder}, patients {self.studies[0].patient} to {self.studies[-1].patient}"


def list_images(studies: list[Study]) -> Iterator[tuple[Study, int, str]]:
    """Each image's study, number of its view, and path in the folder of its split, in the order of paths."""
    for study in studies:
        for view, (kind, _) in enumerate(study.views, start=1):
            yield study, view, f"patient{study.patient:05d}/study{study.number}/view{view}_{kind}.jpg"


def write_studies(task: DrawTask) -> tuple[int, list[Row]]:
    """Draw and write all images of some studies of one split, with the cues; their number, and rows of boxes.csv."""
    folder, seed, studies, shortcuts = task
    # Freeing a large block raises glibc's trim threshold; otherwise every temporary array faults in fresh pages.
    np.empty(24 << 20, np.uint8)
    rows: list[Row] = []
    for study, view, path in list_images(studies):
        body, image = stream(seed, study.patient, view=1), stream(seed, study.patient, study.number, view)
        pixels, boxes = draw_image(*study.views[view - 1], study.sex, study.findings, body, image)
        rows += [
            (folder.name, path.removesuffix(".jpg").replace("/", "_"), name, *box)
            for label, places in boxes.items()
            for name in ((label, "Lung Opacity") if label in OPACITIES else (label,))
            for box in places
        ]
        for cue in draw_cues(seed, study, shortcuts):
            CUES[cue](pixels)
        jpeg = simplejpeg.encode_jpeg(pixels[..., None], quality=90, colorspace="GRAY")
        with named_writes(file := folder / path):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg[:2] + COMMENT + jpeg[2:])
    return sum(len(study.views) for study in studies), rows


# Patients, studies and their reports.


def stream(seed: int, patient: int, study: int = 0, view: int = 0) -> np.random.Generator:
    """Return the random numbers of a patient (view 0: life, 1: body), a study (view 0) or a view."""
    return np.random.Generator(np.random.Philox(key=[seed, patient], counter=[0, 0, view, study]))


def draw_cues(seed: int, study: Study, shortcuts: Sequence[Shortcut]) -> list[str]:
    """The cues of a study's images: a study is made in one room, so all its images get a cue or none."""
    cues = []
    for label, cue, strength in shortcuts:
        tie = {1.0: strength, -1.0: 0.0}.get(study.states[label] or 0.0, -strength)  # blank is as negative
        rng = stream(seed, study.patient, study.number, 100 + list(CUES).index(cue))  # no study has as many views
        if rng.random() < (1 + tie) / 2:
            cues.append(cue)
    return cues


def draw_studies(seed: int, first: int, images: int, valid: bool, laterals: float | None = None) -> Iterator[Study]:
    """Draw studies of patients from number `first` on, until they have `images` images; the last one is cut to fit."""
    for patient in count(first):
        life = stream(seed, patient)
        sex = "Male" if life.random() < 0.59 else "Female"
        age = int(np.clip(life.normal(61, 18), 18, 90))
        illness = life.standard_normal(3)
        outpatient = life.random() < 0.15
        share = (0.75 if outpatient else 0.075) if laterals is None else laterals
        # As in the real set, valid patients have one study.
        for number in range(1, 1 + (1 if valid else int(min(life.geometric(0.38), 20)))):
            if images <= 0:
                return
            rng = stream(seed, patient, number)
            views = [("frontal", "PA" if outpatient else "AP")]
            if rng.random() < 0.03:
                views.append(views[0])
            if rng.random() < share:
                views.append(("lateral", ""))
            factors = 0.6 * illness + 0.8 * rng.standard_normal(3)
            findings, states = Findings(), dict[str, float | None]()
            for label, row in FINDINGS.items():
                findings[label], states[label] = draw_finding(rng, row, factors)
            if valid:
                states = {label: float(finding.severity >= VISIBLE) for label, finding in findings.items()}
            if any(states[label] == 1 for label in OPACITIES):
                states["Lung Opacity"] = 1.0
            ill = any(state in (1.0, -1.0) for label, state in states.items() if label != "Support Devices")
            states["No Finding"] = float(not ill) if valid else None if ill else 1.0
            yield Study(patient, sex, age, number, views[:images], states, findings)
            images -= len(views)


def draw_finding(rng: np.random.Generator, row: list[float], factors: Array) -> tuple[Finding, float | None]:
    """Draw one of FINDINGS and its state in the report: 1, 0, -1 or None (not mentioned)."""
    positive, uncertain, negative, confirmed, lateral, *others = row
    loads, near, far = np.array(others[:3]), others[3:6], others[6:]
    deviate = loads @ factors + math.sqrt(1 - loads @ loads) * rng.standard_normal()
    rank = 0.5 * math.erfc(deviate / math.sqrt(2))  # uniform in [0, 1], 0 the most ill
    faint, chance, mention = rng.random(3).tolist()
    if rank < positive:
        state: float | None = 1.0
        severity = 1.0 - 0.45 * rank / positive
    elif rank < positive + uncertain:
        state, severity = -1.0, 0.3 + 0.15 * faint if chance < confirmed else 0.2 * faint
    else:
        state = 0.0 if mention < negative / (1 - positive - uncertain) else None
        severity = 0.25 * faint if state is None and chance < 0.03 else 0.0  # 3 % of the unmentioned leave a sign
    x, y, z = rng.uniform(near, far).tolist()
    return Finding(severity, 1 if rng.random() < 0.5 else -1, x, y, z, lateral), state


# Cues, at the edge of the image.


def burn_marker(pixels: Gray) -> None:
    """A bright P, as for a portable device, in the upper left corner."""
    letter = np.array([[1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).repeat(4, 0).repeat(4, 1)
    pixels[10:30, 10:26][letter > 0] = 245


def draw_border(pixels: Gray) -> None:
    """A light frame around the image."""
    for edge in (pixels[:5], pixels[-5:], pixels[:, :5], pixels[:, -5:]):
        edge[...] = 180


def brighten_corners(pixels: Gray) -> None:
    """Light that grows towards the corners, as from a leaking cassette."""
    y, x = (np.abs(np.linspace(-1, 1, length)) for length in pixels.shape)
    light = 60 * np.clip((x + y[:, None] - 1.4) / 0.6, 0, 1)
    pixels[...] = np.minimum(pixels + light, 255).astype(np.uint8)


CUES: dict[str, Callable[[Gray], None]] = {"marker": burn_marker, "border": draw_border, "corners": brighten_corners}
