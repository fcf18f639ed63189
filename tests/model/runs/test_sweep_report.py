import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

from model.runs.sweep import Trial
from model.runs.sweep_report import best_points, draw_contour, format_csv, positions, render_sweep

DEV = {(1e-4, 1e-4): 0.71, (1e-4, 1e-2): 0.72, (1e-3, 1e-4): 0.81, (1e-3, 1e-2): 0.84}


def make_trial(number: int, dev: float | None, state: str = "complete", **parameters: Any) -> Trial:
    history = [(epoch, (dev or 0.5) - 0.1 / epoch) for epoch in (1.0, 2.0)]
    steps = (0.0, 0.01, 0.1, -0.05, -0.08, -0.02)
    values = [None if dev is None else dev + step for step in steps]
    seconds = 30.0 if dev is None else 90.0
    trial = Trial(Path(f"t{number}"), parameters, number, parameters, state, seconds=seconds, history=history)
    trial.dev, trial.same, trial.train, trial.valid, trial.low, trial.high = values
    trial.labels = None if dev is None else 9
    return trial


@pytest.fixture
def trials() -> list[Trial]:
    points = enumerate(DEV.items())
    found = [make_trial(n, dev, lr=lr, weight_decay=decay) for n, ((lr, decay), dev) in points]
    return [*found, make_trial(4, None, "pruned", lr=0.1, weight_decay=1e-2)]


def test_the_csv_has_every_figure(trials: list[Trial]) -> None:
    rows = list(csv.reader(io.StringIO(format_csv([trials[3], trials[4]]))))
    heading = "number,state,lr,weight_decay,dev_auroc,same_labels,dev_same_auroc,train_auroc,"
    heading += "valid_auroc,valid_low,valid_high,epochs,seconds,run"
    assert rows[0] == heading.split(",")
    figures = [f"{value:.6f}" for value in (0.84, 0.85, 0.94, 0.79, 0.76, 0.82, 2, 90)]
    assert rows[1] == ["3", "complete", "0.001", "0.01", figures[0], "9", *figures[1:], "t3"]
    assert rows[2] == ["4", "pruned", "0.1", "0.01", *[""] * 7, "2.000000", "30.000000", "t4"]
    assert format_csv([]).startswith("number,state,dev_auroc")


def test_the_page_says_what_trials_are_compared_by(trials: list[Trial]) -> None:
    page = render_sweep("first", trials, None, "Edema")
    assert page.count("dev AUROC: Edema") == 3  # the tile, a contour and the curves
    assert "Sorted by the first dev, the AUROC that decides: Edema. The second" in page
    page = render_sweep("first", trials, None)
    assert "the AUROC that decides: macro, ≥ 10 patients, or macro where no label" in page


def test_the_page_has_the_best_first_and_valid_beside_it(trials: list[Trial]) -> None:
    page = render_sweep("<first>", trials, {"lr": 0.9, "weight_decay": 0.1})
    assert "<h1>&lt;first&gt;</h1>" in page
    assert page.count("<svg") == 5
    assert "://" not in page.replace("http://www.w3.org", "")
    body = page.split("<tbody>")[1]
    assert [body.index(f"<tr><th>{number}</th>") for number in (3, 2, 1, 0, 4)] == sorted(
        body.index(f"<tr><th>{number}</th>") for number in range(5)
    )
    figures = "".join(f"<td>{value}</td>" for value in ("0.840", 9, "0.850", "0.940", "0.790"))
    assert f'{figures}<td class="limits">[0.760, 0.820]</td>' in body
    assert "90%" in page


@pytest.mark.parametrize(
    "some",
    [
        [],
        [make_trial(0, 0.8, lr=1e-3)],
        [make_trial(0, None, "running", lr=1e-3, weight_decay=0.0)],
        [make_trial(n, 0.8, arch=arch) for n, arch in enumerate(("rescnn", "resnet18"))],
        [make_trial(n, 0.8, lr=1e-3 * n, weight_decay=1e-3 * n) for n in range(5)],
    ],
)
def test_sweeps_with_little_in_them_have_a_page(some: list[Trial]) -> None:
    page = render_sweep("sweep", some, None)
    assert page.count("<tr><th>") == len(some) + 1
    assert ("Left out: it takes four finished trials" in page) == (sum(t.dev is not None for t in some) > 1)


def test_zero_is_a_decade_below_the_lowest_value() -> None:
    assert positions([1e-2, 0.0, 1e-4]) == ([-2.0, -5.0, -4.0], {-2.0: "0.01", -5.0: "0", -4.0: "0.0001"})


def test_of_trials_at_one_point_the_best_on_dev_counts() -> None:
    some = [
        make_trial(n, dev, lr=1e-3, batch_size=size) for n, (dev, size) in enumerate([(0.7, 32), (0.8, 64)])
    ]
    assert best_points(some, "train") == {(1e-3, 1.0): pytest.approx(0.9)}
    assert best_points([make_trial(0, 0.7, arch="rescnn")], "dev") == {}


def test_contours_have_the_points_where_they_belong() -> None:
    figure = Figure()
    axes = figure.subplots()
    draw_contour(axes, DEV, "black")
    points = axes.collections[-1]
    assert isinstance(points, PathCollection)
    np.testing.assert_allclose(np.asarray(points.get_offsets()), [np.log10(place) for place in DEV])
    np.testing.assert_allclose(np.asarray(points.get_array()), list(DEV.values()))
    star = axes.lines[0]
    assert (star.get_xdata(), star.get_ydata()) == ([-3.0], [-2.0])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.0001", "0.001"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0.0001", "0.01"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning rate", "weight decay")


def test_the_field_is_linear_in_the_logarithms(tmp_path: Path) -> None:
    """A plane in the logarithms: its colors change along it alone."""
    plane = {(10.0**x, 10.0**y): 0.6 + 0.1 * x for x in (-3, -2, -1) for y in (-3, -2, -1)}
    figure = Figure(figsize=(4, 4))
    axes = figure.add_axes((0, 0, 1, 1))
    draw_contour(axes, plane, "none")
    figure.savefig(tmp_path / "plane.png", dpi=50)
    pixels = np.asarray(Image.open(tmp_path / "plane.png").convert("RGB")).astype(int)
    row = pixels[len(pixels) * 3 // 8, 20:120]  # between the points, in the field
    assert (np.diff(row[:, 2] - row[:, 0]) <= 8).all()  # from blue to yellow
    assert len(np.unique(row, axis=0)) >= 5


def test_small_values_are_written_out(trials: list[Trial]) -> None:
    assert (
        render_sweep("sweep", trials, None).count(">0.0001</text>") == 6
    )  # two axes twice, and two parameters
