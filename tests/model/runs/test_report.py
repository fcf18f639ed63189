import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from model.runs.report import (
    describe_gaps,
    draw_training,
    list_variables,
    render_model_card,
    render_report,
    summarize,
)
from model.runs.summary import print_evaluations, print_gain, print_verdicts
from pipeline.measure.belief import assess_belief
from pipeline.measure.compare import measure_gain
from pipeline.measure.evaluate import Scored, assess, calibrate, study_level
from pipeline.measure.readers import assess_readers

NAMES = ["Edema", "Pleural Effusion", "Fracture", "Rare"]
CONFIG = {
    "arch": "resnet18",
    "lr": 1e-4,
    "manifest": "ab12",
    "uncertain": "best",
    "blank": "zeros",
    "where": (),
    "labels": tuple(NAMES),
    "keep": "best",
    "choose_by": "all",
    "pretrained": False,
    "init": None,
    "init_terms": "",
}
HISTORY = [
    {
        "epoch": 0.5,
        "train_loss": 0.7,
        "dev_loss": 0.8,
        "macro_auroc": 0.6,
        "macro10_auroc": None,
        "mean5_auroc": None,
    },
    {
        "epoch": 1,
        "train_loss": 0.5,
        "dev_loss": 0.6,
        "macro_auroc": 0.7,
        "macro10_auroc": 0.72,
        "mean5_auroc": None,
    },
]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def draw_images(seed: int) -> Scored:
    """300 images with signal; no Fracture, and 5 rare positives."""
    random = np.random.default_rng(seed)
    target = (random.random((300, 4)) < 0.3).astype(np.float32)
    target[:, 2], target[:, 3] = 0, np.arange(300) % 60 == 0
    logits = random.normal(-1, 1, target.shape) + 1.5 * target
    return Scored(
        (1 / (1 + np.exp(-3 * logits))).astype(np.float32),
        target,
        np.ones(target.shape, bool),
        np.char.mod("patient%05d", np.arange(300) // 2),
        np.arange(300) % 3,
        random.choice(["Female", "Male"], 300),
        random.integers(10, 95, 300),
        random.choice(["AP", "PA", "LL"], 300),
    )


@pytest.fixture(scope="module")
def images() -> Scored:
    return draw_images(0)


@pytest.fixture(scope="module")
def evaluation(images: Scored) -> dict[str, Any]:
    calibration = calibrate(NAMES, draw_images(1))
    found = assess(NAMES, images, calibration, against=("runs/other", images.scores[::-1]), resamples=200)
    male = (images.sex == "Male").astype(float)
    return found | {"belief": assess_belief(NAMES, images, {"Male": male}, {"sex": images.sex})}


@pytest.fixture(scope="module")
def page(images: Scored, evaluation: dict[str, Any]) -> str:
    return render_report("runs/first", CONFIG, HISTORY, {"valid": evaluation}, {"valid": images})


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and the rows of its tables by their class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: dict[str, list[list[list[str]]]] = {}
        self._rows: list[list[str]] | None = None
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
            self.tables.setdefault(dict(attrs)["class"] or "", []).append(self._rows)
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell and self._rows is not None:
            self._rows[-1][-1] += data


def places(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def few(label: dict[str, Any]) -> str:
    return " (few)" if min(label["positives"], label["negatives"]) < 10 else ""


def show_rate(point: dict[str, Any], rate: str) -> str:
    ranged = point and rate in ("sensitivity", "specificity")
    return places(point.get(rate)) + (f" {limits(point['intervals'][rate])}" if ranged else "")


def show_group(label: dict[str, Any], figure: str) -> str:
    if figure == "auroc" and few(label):
        return f"{label['positives']:,} positives, {label['negatives']:,} negatives (few)"
    if figure == "tpr" and label["positives"] < 10:
        return "–"
    return f"{places(label[figure])} {limits(label['intervals'][figure])}"


def limits(found: dict[str, Any]) -> str:
    return "–" if found["low"] is None else f"[{found['low']:.3f}, {found['high']:.3f}]"


def test_the_tables_hold_the_numbers_of_the_json(page: str, evaluation: dict[str, Any]) -> None:
    tables = Page(page).tables
    for part, metrics, rates, against in zip(
        (evaluation, evaluation["study"]), tables["metrics"], tables["rates"], tables["against"], strict=True
    ):
        auroc, auprc = (part["intervals"][name] for name in ("auroc", "auprc"))
        calibrations = ("brier", "brier_calibrated", "ece", "ece_calibrated")
        expected = [
            [name + few(label)]
            + [places(label["auroc"]), limits(auroc[name]), places(label["auprc"]), limits(auprc[name])]
            + [f"{label['positives']:,}", f"{label['negatives']:,}"]
            + [places(label[metric]) for metric in calibrations]
            for name, label in part["labels"].items()
        ]
        titles = {"macro": "macro", "macro10": "macro, ≥ 10 patients", "mean5": "mean of competition's 5"}
        for mean, title in titles.items():
            areas = [places(part[f"{mean}_auroc"]), limits(auroc[mean])]
            areas += [places(part[f"{mean}_auprc"]), limits(auprc[mean])]
            others = [places(part[f"{mean}_{metric}"]) for metric in calibrations]
            expected.append([title, *areas, "", "", *others])
        assert metrics[1:] == expected
        assert rates[2:] == [
            [name + few(label)]
            + [
                show_rate(label["operating_points"][rule] or {}, rate)
                for rule in ("youden", "max_f1", "sensitivity")
                for rate in ("threshold", "sensitivity", "specificity", "ppv", "npv", "f1")
            ]
            for name, label in part["labels"].items()
        ]
        said = {True: "yes", False: "no", None: "–"}
        assert against[1:] == [
            [titles.get(name, name) + (few(part["labels"][name]) if name in NAMES else "")]
            + [
                text
                for found in (part["against"][metric][name] for metric in ("auroc", "auprc"))
                for text in (places(found["difference"]), limits(found), said[found["excludes_zero"]])
            ]
            for name in (*NAMES, *titles)
        ]
    for (variable, found), rows in zip(evaluation["subgroups"].items(), tables["groups"], strict=True):
        groups = found["groups"].values()
        heads = [f"{name} (n = {group['images']:,})" for name, group in found["groups"].items()]
        assert rows[0] == ["", *heads, ""]
        assert rows[1] == [variable, *["AUROC", "TPR"] * len(heads), "TPR gap"]
        assert rows[2:-1] == [
            [name]
            + [
                show_group(label, figure)
                for label in (group["labels"][name] for group in groups)
                for figure in ("auroc", "tpr")
            ]
            + [f"{places(found['tpr_gap'][name])} {limits(found['tpr_gap_limits'][name])}"]
            for name in NAMES
        ]
        macros = [f"{places(group['macro_auroc'])} {limits(group['interval'])}" for group in groups]
        assert rows[-1][1:-1:2] == macros


def test_verdicts_stand_beside_the_figures(
    page: str, evaluation: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    belief = evaluation["belief"]
    assert list(belief) == ["Edema", "Pleural Effusion"]  # the others are few
    read = Page(page)
    text = " ".join(read.text.split())
    print_verdicts({"dev": {}, "valid": evaluation})
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    card = render_model_card("first", CONFIG, {}, {"valid": evaluation})
    for found, row in zip(belief.values(), read.tables["belief"][0][1:], strict=True):
        assert all(found["verdict"] in where for where in (text, printed, card))
        figures = [
            f"{places(part['auroc'])} {limits(part)}"
            for part in (*(found["within"][name] for name in list_variables(evaluation)), found["balanced"])
        ]
        assert row[1:7] == [places(found["auroc"]["auroc"]), limits(found["auroc"]), *figures]


def test_the_page_names_settings_and_what_is_left_out(page: str, evaluation: dict[str, Any]) -> None:
    text = " ".join(Page(page).text.split())
    assert "For research. Not for clinical use." in text
    settings = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page[page.index('id="settings"') :]))
    expected = CONFIG | {"labels": ", ".join(NAMES)}
    assert settings == {name: "–" if value in (None, ()) else str(value) for name, value in expected.items()}
    shown, folded = page[page.index('id="settings"') :].split("<details>")
    assert re.findall("<dt>(.*?)</dt>", shown) == ["arch", "manifest", "uncertain", "blank", "labels"]
    assert "<summary>7 more, at their defaults</summary>" in folded
    macro10 = f"{evaluation['macro10_auroc']:.3f} {limits(evaluation['intervals']['auroc']['macro10'])}"
    assert f"valid, 300 images of 150 patients {macro10} AUROC, macro, ≥ 10 patients" in text
    assert f"In no group: LL {evaluation['subgroups']['projection']['others']['LL']}." in text
    less = evaluation["subgroups"]["sex"]["less_first"]["Male"]
    assert f"Macro less the first group's: Male {less['difference']:.3f} {limits(less)}." in text
    lost = 200 - evaluation["intervals"]["auprc"]["Rare"]["resamples"]
    assert lost > 0
    gaps = describe_gaps(evaluation)
    named = describe_gaps(evaluation | {"many_groups": {"zip_code": 1200}})
    assert named == [*gaps, "zip_code: 1,200 values, too many to compare as groups."]
    assert all(gap in text for gap in gaps)
    assert gaps[:3] == [
        "Fracture, images: no positives, so no AUROC, no AUPRC, and in no mean.",
        "Rare, images: 5 of one class, too few to tell; marked few.",
        "mean of competition's 5, images: undefined, for lack of labels.",
    ]
    assert (
        f"Rare, images: {lost} of 200 resamples have one class and are left out of AUPRC's interval." in gaps
    )
    assert not [gap for gap in gaps if ": 0 of" in gap]
    assert "Fracture, images of dev: one class: no thresholds, scores as they are." in gaps


def test_the_first_screen_says_what_was_measured_and_what_to_distrust(
    images: Scored, evaluation: dict[str, Any]
) -> None:
    scores = {name: {"auroc": 0.5, "low": 0.4, "high": 0.6} for name in NAMES}
    told = evaluation | {"sanity": {"center covered": {"labels": scores, "kept": ["Edema"]}}}
    found = {"dev": told, "valid": evaluation}
    data = {"title": "synthetic images by `pipeline sample`"}
    page = Page(render_report("r", CONFIG, [], found, dict.fromkeys(found, images), data))
    first = " ".join(page.text.split()).split(" Settings ")[0]
    studies = f"{evaluation['study']['rows']} studies of 150 patients"
    assert first.index(f"valid of synthetic images by pipeline sample: {studies}.") < first.index(
        "dev of synthetic"
    )
    marks = [found["mark"] for found in evaluation["belief"].values()]
    assert summarize("valid", evaluation) == [
        *([("none", "No shortcut found for: Edema, Pleural Effusion.")] if marks == ["none"] * 2 else []),
        ("unclear", "Too few patients of a class to tell: Fracture, Rare."),
    ]
    assert [text for _, text in summarize("dev", told) if "few" not in text and "shortcut" not in text] == [
        "Used to select the checkpoint and thresholds, so its figures are optimistic.",
        "Recognized without the lungs: Edema.",
    ]
    assert all(text in first for _, text in summarize("dev", told))
    less = evaluation["against"]["auroc"]["macro10"]
    assert f"less runs/other {less['difference']:+.3f} {limits(less)} difference in AUROC" in first
    assert "valid, compared" in first


def test_tables_without_figures_are_left_out(images: Scored) -> None:
    lone = images.take(np.arange(3))
    evaluation = assess(NAMES, lone, calibrate(NAMES, lone), resamples=0)
    tables = Page(render_report("r", CONFIG, [], {"dev": evaluation}, {"dev": lone})).tables
    assert "groups" not in tables


def test_the_legend_names_the_lines_that_are_there() -> None:
    (_, loss), (_, auroc) = draw_training(HISTORY)
    assert ">macro, ≥ 10 patients<" in auroc
    assert "competition" not in auroc
    assert [f">{split}<" in loss for split in ("train", "dev", "valid")] == [True, True, False]
    for svg in (loss, auroc):
        texts = re.findall(r"<text[^>]*>(.*?)</text>", svg)
        assert texts[: texts.index("epoch")] == ["1"]


def test_the_terminal_marks_the_same_labels(
    evaluation: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_evaluations({"valid": evaluation})
    lines = [line for line in capsys.readouterr().out.splitlines() if "few" in line]
    assert [line.split()[1] for line in lines] == ["Fracture", "Rare"]
    assert f"few 5 / {evaluation['labels']['Rare']['negatives']}" in lines[1]


def test_the_page_needs_nothing_else(page: str) -> None:
    assert "://" not in page
    tags = Page(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    targets = {attrs["id"] for _, attrs in tags if "id" in attrs}
    for _, attrs in tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src"):
                assert value is not None
                assert value[0] == "#"
                assert value[1:] in targets
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    assert "@import" not in page


def test_figures_follow_the_page_and_none_is_of_a_skipped_label(page: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    names = [re.findall(r'aria-label="(.*?)"', svg)[0] for svg in svgs]
    assert names == ["loss of train and dev by epoch", "AUROC on dev by epoch"] + [
        f"{kind} curve of {name}"
        for kind in ("ROC", "precision-recall", "reliability", "decision")
        for name in ("Edema", "Pleural Effusion", "Rare")
    ]
    for svg in svgs:
        assert "var(--first)" in svg
        assert "currentColor" in svg
        assert not re.findall(r"(?:fill|stroke): #", svg)


def test_a_decision_curve_has_its_gain_below(page: str, evaluation: dict[str, Any]) -> None:
    text = " ".join(Page(page).text.split())
    for name in ("Edema", "Pleural Effusion"):
        gains = {at["threshold"]: at["gain"] for at in evaluation["labels"][name]["net_benefit"]}
        assert list(gains) == [0.05, 0.1, 0.2, 0.3, 0.5]
        shown = [f"at {at} {places(gains[at]['difference'])} {limits(gains[at])}" for at in (0.1, 0.3)]
        assert f"{name} {', '.join(shown)}" in text


def test_readers_are_points_on_the_curves_of_studies(images: Scored, evaluation: dict[str, Any]) -> None:
    studies = study_level(images)
    keys = [f"{p}/study{s}" for p, s in zip(studies.patient, studies.study, strict=True)]
    reads: dict[str, dict[str, int | None]] = {
        key: {"Edema": int(cell)} for key, cell in zip(keys, studies.target[:, 0], strict=True)
    }
    found = assess_readers(NAMES, studies, {"<bc4>": reads, "always": {key: {"Edema": 1} for key in keys}})
    page = render_report("run", CONFIG, [], {"valid": evaluation | {"readers": found}}, {"valid": images})
    (svg,) = re.findall(
        r'<svg[^>]*aria-label="readers beside the ROC curve of Edema".*?</svg>', page, re.DOTALL
    )
    assert svg.count("<use") - svg.count("xtick") >= 2 or svg.count("var(--third)") >= 2
    assert "0 of 2 (readers times labels) are below" in page
    ((heading, edema, *_),) = Page(page).tables["readers"]
    of = found["labels"]["Edema"]["<bc4>"]
    assert heading[2].startswith(f"<bc4> (n = {len(keys)})")
    rates = [f"1.000 {limits(of['intervals'][rate])}" for rate in ("sensitivity", "specificity")]
    assert edema[:7] == [
        "Edema",
        "0 of 2",
        f"{of['positives']}",
        f"{of['negatives']}",
        *rates,
        places(of["network"]),
    ]


def test_the_same_run_gives_the_same_page(page: str, images: Scored, evaluation: dict[str, Any]) -> None:
    assert render_report("runs/first", CONFIG, HISTORY, {"valid": evaluation}, {"valid": images}) == page
    assert 'id="training"' in page
    assert 'id="training"' not in render_report("r", CONFIG, [], {"valid": evaluation}, {"valid": images})


def test_hostile_names_are_text(images: Scored) -> None:
    names = [HOSTILE, "$\\frac{1}", "{{ config }}", "a|b\n# c"]
    calibration = calibrate(names, images)
    against = (HOSTILE, images.scores)
    evaluation = assess(names, images, calibration, against=against, resamples=0)
    html = render_report(HOSTILE, {HOSTILE: HOSTILE}, [], {HOSTILE: evaluation}, {HOSTILE: images})
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert page.text.count(HOSTILE) > 20
    assert "{{ config }}" in page.text

    card = render_model_card(
        HOSTILE, CONFIG | {"arch": HOSTILE}, {HOSTILE: dict.fromkeys(("samples", "studies", "patients"), 1)},
        {HOSTILE: evaluation},
    )  # fmt: skip
    assert not {tag for tag, _ in Page(card).tags}
    assert "\n# c" not in card
    assert "a|b" not in card


def test_the_model_card_states_data_metrics_and_limits(evaluation: dict[str, Any]) -> None:
    data = {"train": {"samples": 1200, "studies": 1100, "patients": 700}}
    card = render_model_card("runs/first", CONFIG, data, {"valid": evaluation})
    lines = card.splitlines()
    assert lines[0] == "# Model card: runs/first"
    assert "**For research. Not for clinical use.**" in card
    assert "A network that scores 4 findings on chest" in card
    assert "manifest of sha256 `ab12`" in card
    assert "The checkpoint is the one with the best AUROC on dev: macro, ≥ 10 patients." in lines
    assert "| train | 1,200 | 1,100 | 700 |" in lines
    assert "| lr | 0.0001 |" in lines
    label, found = evaluation["labels"]["Edema"], evaluation["intervals"]
    youden = label["operating_points"]["youden"]
    edema = [
        "Edema", f"{label['positives']}", f"{label['negatives']}",
        f"{label['auroc']:.3f} {limits(found['auroc']['Edema'])}",
        f"{label['auprc']:.3f} {limits(found['auprc']['Edema'])}",
        f"{label['brier_calibrated']:.3f}", f"{label['ece_calibrated']:.3f}",
        show_rate(youden, "sensitivity"), show_rate(youden, "specificity"),
    ]  # fmt: skip
    assert f"| {' | '.join(edema)} |" in lines
    gaps = evaluation["subgroups"]["sex"]["tpr_gap"]
    gap, name = max((gap, name) for name, gap in gaps.items() if gap is not None)
    sex = evaluation["subgroups"]["sex"]
    female, male = sex["groups"]["Female"], sex["groups"]["Male"]
    assert (
        f"| sex Female | {female['images']} | {female['macro_auroc']:.3f} {limits(female['interval'])} | | 2 "
        f"| {name} {gap:.3f} {limits(sex['tpr_gap_limits'][name])} |"
    ) in lines
    less = sex["less_first"]["Male"]
    assert (
        f"| sex Male | {male['images']} | {male['macro_auroc']:.3f} {limits(male['interval'])} "
        f"| {less['difference']:.3f} {limits(less)} | 2 | |"
    ) in lines
    assert [line for line in lines if line.startswith("| Rare (few) | 5 |")]
    assert all(f"- {gap}" in lines for gap in describe_gaps(evaluation))
    assert "\n\n\n" not in card
    columns = {
        line.count("|") for block in card.split("\n\n") if "| label |" in block for line in block.split("\n")
    }
    assert columns == {10}


def test_the_gain_of_an_ensemble_is_a_table(
    images: Scored, evaluation: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    members = {"runs/a": images.scores**2 * 0.5, "runs/b": images.scores[::-1]}
    told = evaluation | {"gain": measure_gain(NAMES, images, members)}
    table = Page(render_report("both", CONFIG, [], {"valid": told}, {"valid": images})).tables["gain"][0]
    gain = told["gain"]["Edema"]
    figures = [gain["auroc"], *gain["members"].values(), gain["mean_member"], gain["difference"]]
    assert table[0][:4] == ["label", "ensemble", "runs/a", "runs/b"]
    assert table[1] == ["Edema", *map(places, figures), limits(gain)]
    print_gain(told)
    assert f"{gain['difference']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" in capsys.readouterr().out
