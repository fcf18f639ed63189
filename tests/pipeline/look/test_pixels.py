"""`pipeline audit`: it measures the pixels of shards, and finds what is planted in them."""

import json
import re
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import laplace

from pipeline.labels import LABELS
from pipeline.look.pixels import CORNERS, measure_content, measure_edge, measure_shards
from pipeline.stream.samples import open_split
from pipeline.synthetic.sample import CUES
from tests.conftest import Shards, default_options, make_shards, refusal, run_pipeline, write_rows
from tests.model.runs.test_report import Page

PLANTED = {"Pneumonia": "marker", "Edema": "border", "Fracture": "corners"}


@pytest.fixture(scope="module")
def cued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of noise films, one a patient, each with the cue of every label that is positive in it; valid has none."""
    root = tmp_path_factory.mktemp("cued") / "CheXpert-v1.0-small"
    random = np.random.default_rng(0)
    for split, patients in (("train", range(1, 81)), ("valid", range(81, 121))):
        rows = []
        for patient in random.permutation(patients).tolist():
            path = root / split / f"patient{patient:05d}" / "study1" / "view1_frontal.jpg"
            path.parent.mkdir(parents=True)
            coarse = Image.fromarray(random.integers(40, 120, (8, 10), dtype=np.uint8))
            pixels = np.array(coarse.resize((390, 320), Image.Resampling.BICUBIC))
            states = dict.fromkeys(LABELS, "") | {label: str(random.integers(2)) for label in PLANTED}
            for label, cue in PLANTED.items():
                if states[label] == "1" and split == "train":
                    CUES[cue](pixels)
            Image.fromarray(pixels).save(path, quality=90)
            facts = {"Sex": "Male", "Age": "50", "Frontal/Lateral": "Frontal", "AP/PA": "AP"}
            rows.append({"Path": f"x/{path.relative_to(root)}"} | facts | states)
        write_rows(root / f"{split}.csv", rows)
    make_shards(root, root.parent / "shards", default_options(size=224))
    return root.parent


def test_gray_levels_are_those_of_the_pixels() -> None:
    random = np.random.default_rng(0)
    films = random.integers(0, 256, (3, 224, 224), dtype=np.uint8)
    films[1, 100:120, :] = 0
    films[2, 187:, :37] = 7
    films[2, 200, 10:22] = 200  # a letter's twelve pixels
    near, far = slice(7, 37), slice(-37, -7)
    corners = dict(zip(CORNERS, product((near, far), repeat=2), strict=True))
    edge, content = measure_edge(films), measure_content(films)
    for row, film in enumerate(films.astype(float)):
        border = (film.sum() - film[7:-7, 7:-7].sum()) / (224**2 - 210**2)
        assert edge["border's gray level"][row] == pytest.approx(border)
        for name, place in corners.items():
            levels = np.sort(film[place].ravel())
            assert edge[f"darkest in the {name} corner"][row] == levels[11]
            assert edge[f"brightest in the {name} corner"][row] == levels[-12]
        expected = film.mean(), film.std(), laplace(film, mode="mirror").var(), (film <= 5).mean(), (film >= 250).mean()
        np.testing.assert_allclose([levels[row] for levels in content.values()], expected, rtol=1e-4)
    assert edge["brightest in the lower left corner"][2] == 200
    assert list(content)[2:4] == ["sharpness", "share of black pixels"]


def test_images_are_measured_in_table_order(study_shards: Shards) -> None:
    folder, manifest = study_shards
    splits = list(manifest.splits)
    counts: list[int] = []
    edge, content = measure_shards([(folder, name) for name in splits], "lateral", threads=2, progress=counts.append)
    rows, means = [], []
    for name in splits:
        split = open_split(folder, manifest, name)
        for row in split.table.select(["shard", "offset", "length", "view"]).to_pylist():
            if row["view"] == "lateral":
                data = (folder / split.shards[row["shard"]].shard.file).read_bytes()[row["offset"] :][: row["length"]]
                image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
                assert image is not None
                means.append(image.mean())
                rows.append(row["length"])
    assert counts[-1] == len(rows) == 20
    assert content["stored bytes"].tolist() == rows
    np.testing.assert_allclose(content["mean gray level"], means, atol=1.5)  # of the image enlarged
    assert {len(values) for values in (edge | content).values()} == {20}


def test_planted_shortcuts_are_found_unprompted(cued: Path, tmp_path: Path) -> None:
    html = tmp_path / "audit.html"
    done = run_pipeline(
        "audit", cued / "shards", "--strict", "--threads", 1, "--format", "json", "--html", html, code=3
    )
    audit = json.loads(done.stdout)
    assert (audit["images"], audit["patients"]) == (80, 80)  # train and dev alone
    alarms: dict[str, list[str]] = {}
    for clue in audit["clues"]:
        if clue["exceeds"] and clue["kind"] == "acquisition":
            alarms.setdefault(clue["label"], []).append(clue["covariate"])
    assert alarms["Pneumonia"] == ["brightest in the upper left corner"]
    assert alarms["Edema"][0] == "border's gray level"
    assert any(name.startswith("darkest in the ") for name in alarms["Fracture"])
    assert alarms.keys() == PLANTED.keys()
    assert set(audit["few"]) == set(LABELS) - PLANTED.keys()
    page = Page(html.read_text())
    assert "train and dev, if they exist; all views" in page.text
    tiles = re.findall('<p class="value">(.*?)</p><p class="note">(.*?)</p>', html.read_text())
    assert tiles == [("80", "images"), ("80", "patients"), ("3", "labels with an alarm")]
    assert "Pneumonia: brightest in the upper left corner alone predicts it with AUROC 1.00" in page.text
    (rows,) = page.tables["audit"]
    assert {row[0] for row in rows[1:]} == PLANTED.keys()
    # The other split has no cue; nothing else tells its labels.
    done = run_pipeline("audit", cued / "shards", "--strict", "--split", "valid")
    assert "40 images of 40 patients; alarms (!): 0" in done.stdout


def test_a_table_is_audited_without_images(cued: Path) -> None:
    table = cued / "CheXpert-v1.0-small"
    done = run_pipeline("audit", table)
    assert "80 images of 80 patients; alarms (!): 0" in done.stdout
    assert "content" not in done.stdout
    same = ("study number", "lateral", "AP", "Male")
    unknown = ("original width", "original height", "bit depth", "JPEG quality")
    reasons = [f"{name} (unknown)" for name in unknown] + [f"{name} (the same in all images)" for name in same]
    line = next(line for line in done.stdout.splitlines() if line.startswith("Not tested: "))
    assert set(line.removeprefix("Not tested: ").removesuffix(".").split(", ")) >= set(reasons)
    message = "Error: --images needs shards: pipeline shards SOURCE OUT, then audit OUT"
    assert refusal("audit", table, "--images") == (2, message)
    done = run_pipeline("audit", cued / "shards", "--no-images", "--format", "json")
    names = {clue["covariate"] for clue in json.loads(done.stdout)["clues"]}
    assert names == {"patient number", "file bytes", "all together"}


def test_a_table_of_few_patients_without_facts_leaves_nothing_to_test(chexpert: Path) -> None:
    lines = (chexpert / "train.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines]
    (chexpert / "train.csv").write_text("\n".join(",".join([row[0], *row[5:]]) for row in cells) + "\n")
    done = run_pipeline("audit", chexpert / "train.csv")
    assert "48 images of 16 patients: nothing to test." in done.stdout
    assert "Male (unknown)" in done.stdout
