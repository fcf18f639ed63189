import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from model.runs.sweep import FIGURES, Sweep, Trial, best_points, draw_plane, place, render_sweep, write_sweep_report

DEV = {(1e-4, 1e-4): 0.71, (1e-4, 1e-2): 0.72, (1e-3, 1e-4): 0.81, (1e-3, 1e-2): 0.84}


def make_trial(number: int, dev: float | None, state: str = "complete", **parameters: Any) -> Trial:
    if dev is None:
        return Trial(Path(f"t{number}"), parameters, number, parameters, state, seconds=30.0)
    figures = dict(zip(FIGURES, (dev, 9, dev + 0.01, dev + 0.1, dev - 0.05, dev - 0.08, dev - 0.02), strict=True))
    return Trial(Path(f"t{number}"), parameters, number, parameters, state, seconds=90.0, figures=figures)


def render(title: str, trials: list[Trial], choose_by: str = "all") -> str:
    sweep = Sweep(Path(title), {}, {"choose_by": choose_by}, "grid", 0)
    return render_sweep(sweep, trials, {trial.number: [(1.0, 0.6), (2.0, 0.7)] for trial in trials})


@pytest.fixture
def trials() -> list[Trial]:
    points = enumerate(DEV.items())
    complete = [make_trial(n, dev, lr=lr, weight_decay=decay) for n, ((lr, decay), dev) in points]
    return [*complete, make_trial(4, None, "failed", lr=0.1, weight_decay=1e-2)]


def test_the_csv_has_every_figure(trials: list[Trial], tmp_path: Path) -> None:
    write_sweep_report(Sweep(tmp_path, {}, {}, "grid", 0), trials[3:], [], "")
    heading, *rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert heading == f"number,state,lr,weight_decay,{','.join(FIGURES)},seconds,run"
    first = "3,complete,0.001,0.01,0.840000,9,0.850000,0.940000,0.790000,0.760000,0.820000,90.000000,t3"
    assert rows == [first, "4,failed,0.1,0.01,,,,,,,,30.000000,t4"]


def test_the_page_says_what_trials_are_compared_by(trials: list[Trial]) -> None:
    page = render("first", trials, "Edema")
    assert page.count("dev AUROC: Edema") == 3  # the tile, a plane and the curves
    assert "Sorted by dev, the AUROC that decides: Edema. Train" in page
    assert "the AUROC that decides: macro, ≥ 10 patients, or macro if no label" in render("first", trials)


def test_the_page_has_the_best_first_and_valid_beside_it(trials: list[Trial]) -> None:
    page = render("<first>", trials)
    assert "<h1>&lt;first&gt;</h1>" in page
    assert page.count("<svg") == 3
    assert "://" not in page.replace("http://www.w3.org", "")
    body = page.split("<tbody>")[1]
    assert re.findall(r"<tr><th>(\d)</th>", body) == ["3", "2", "1", "0", "4"]
    figures = "".join(f"<td>{value}</td>" for value in ("0.840", 9, "0.850", "0.940"))
    assert f'{figures}<td>0.790 <span class="limits">[0.760, 0.820]</span></td>' in body
    assert "The best learning rate, 0.001, is the highest of those tried: try 0.01, too." in page
    assert "The best weight decay, 0.01, is the highest of those tried: try 0.1, too." in page  # a decade at most


def test_sweeps_with_little_in_them_have_a_page() -> None:
    cases: list[tuple[list[Trial], int]] = [
        ([], 0),
        ([make_trial(0, 0.8, lr=1e-3)], 1),
        ([make_trial(0, None, "unfinished", lr=1e-3, weight_decay=0.0)], 1),
        ([make_trial(n, 0.8, arch=arch) for n, arch in enumerate(("rescnn", "resnet18"))], 2),
        ([make_trial(n, 0.8, lr=1e-3 * n, weight_decay=1e-3 * n) for n in range(1, 9)], 3),
    ]
    for some, drawn in cases:
        page = render("sweep", some)
        assert (page.count("<tr><th>"), page.count("<svg")) == (len(some) + bool(some), drawn)


def test_numbers_lie_on_a_logarithmic_scale_and_words_side_by_side() -> None:
    axes = Figure().subplots()
    assert place(axes, "x", [1e-2, 0.0, 1e-4], "weight_decay") == [1e-2, 0, 1e-4]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.0001", "0.01"]
    assert axes.get_xlabel() == "weight decay"
    x, _ = axes.transData.transform([(x, 0) for x in (0, 1e-4, 1e-3, 1e-2)]).T
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0])
    assert place(axes, "y", [0.0, *(10.0**-n for n in range(7))], "lr")[1:] == [10.0**-n for n in range(7)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "0.001", "1"]
    assert place(Figure().subplots(), "x", ["b", "a", "b"], "arch") == [1, 0, 1]


def test_of_trials_at_one_point_the_best_on_dev_counts() -> None:
    point: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
    some = [make_trial(n, dev, **point, batch_size=size) for n, (dev, size) in enumerate([(0.7, 32), (0.8, 64)])]
    assert best_points(some, "train") == {(1e-3, 0.1): some[1]}
    assert best_points([make_trial(0, 0.7, lr=1e-3)], "dev") == {}


def test_points_are_colored_with_a_star_at_the_best_on_dev(trials: list[Trial]) -> None:
    trials[0].figures = {**trials[0].figures, "train_auroc": 0.99}  # the best on train alone
    axes = Figure().subplots()
    draw_plane(axes, best_points(trials, "train"), "train")
    (points,) = axes.collections
    corners = [(1e-3, 1e-2), (1e-3, 1e-4), (1e-4, 1e-2), (1e-4, 1e-4)]
    np.testing.assert_allclose(np.asarray(points.get_offsets()), corners)
    np.testing.assert_allclose(np.asarray(points.get_array()), [0.94, 0.91, 0.82, 0.99])
    assert [text.get_text() for text in axes.texts] == ["0.940", "0.910", "0.820", "0.990"]
    (star,) = axes.lines
    assert (star.get_xdata(), star.get_ydata()) == ([1e-3], [1e-2])
